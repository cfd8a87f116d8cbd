# SPDX-License-Identifier: Apache-2.0
"""What dispatch and combine share: their place among stages, refusals, tables of a routing."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepcomm._C import kernels
from deepcomm.backends.cuda import failure as failures
from deepcomm.backends.cuda.tensors import address_of
from deepcomm.types import RecvLayout

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from deepcomm.backends.cuda.domain import Domain
    from deepcomm.backends.cuda.tensors import CudaRecord

__all__ = [
    "ALONE",
    "LAYOUTS",
    "NO_CAPACITY",
    "Asked",
    "RoutingId",
    "Stage",
    "fill_count_outputs",
    "fill_rail_side",
    "refuse",
    "routing_table",
    "taking_turn",
]

NO_CAPACITY = -1
LAYOUTS = {RecvLayout.TOKEN: 0, RecvLayout.EXPERT: 1, RecvLayout.EXPERT_PADDED: 2}


@dataclass(frozen=True, slots=True)
class RoutingId:
    """What a handle's records are recognised by.

    Attributes:
        buffer_id: Of the buffer, alike on its ranks.
        serial: Number of the operation, alike on its ranks.
    """

    buffer_id: bytes
    serial: int


@dataclass(frozen=True, slots=True)
class Asked:
    """What a user has asked for, alike on all ranks.

    Attributes:
        layout: Of the rows that arrive.
        alignment: Of their groups.
        wire: How rows travel (``functions.WIRES``).
        apply_weights: Whether a combine does.
    """

    layout: RecvLayout
    alignment: int
    wire: int = 0
    apply_weights: bool = False


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a domain's part of an operation stands among others.

    Attributes:
        after: The domain of the part before.
        is_last: Whether the host hears from this part, and nobody waits for an earlier one.
        host_waits: Whether the host waits for the verdict on the whole, where this part alone does
            not tell.
        tokens_from: Address of the first token of each origin, where there are several.
        asked: What the whole was asked for, where this part alone does not tell.
    """

    after: Domain | None = None
    is_last: bool = True
    host_waits: bool | None = None
    tokens_from: int = 0
    asked: Asked | None = None


ALONE = Stage()


def refuse(domain: Domain, stage: Stage = ALONE) -> None:
    """Tell the peers that this rank does not take part in the operation that it was asked for."""
    params = kernels.CountParams()
    params.meet = domain.meet(stage.after, reports=stage.is_last)
    params.meet.header = kernels.Header(0, NO_CAPACITY, 0, 0, 1, failures.REFUSED_BY_HOST)
    params.num_topk = 1
    params.tokens_from = domain.workspace.no_tokens.address
    fill_count_outputs(domain, params, domain.scratch_counts)
    domain.launch(domain.functions.count, 1, params, meets=True, has_counts=True)
    domain.runtime.flush()


@contextlib.contextmanager
def taking_turn(domain: Domain, stage: Stage = ALONE) -> Iterator[None]:
    """Refuse an operation if the block fails before it has launched any of it: its peers wait.

    Whoever has launched a part has taken the turn.
    """
    num_launches = domain.num_launches
    try:
        yield
    except Exception:
        if domain.num_launches == num_launches and not domain.runtime.is_capturing():
            refuse(domain, stage)
        raise


def fill_count_outputs(domain: Domain, params: kernels.CountParams, counts: torch.Tensor) -> None:
    """Name the memory that dispatch_count writes to beside the slots."""
    num_local = domain.num_local_experts
    begin = address_of(counts)
    params.counts = begin
    params.offsets = begin + 4 * num_local
    params.num_recv = begin + 4 * (2 * num_local + 1)
    params.overflow = address_of(counts[-1:])
    params.lost = domain.workspace.lost.address
    params.partials = domain.workspace.partials.address
    params.report = domain.workspace.report_memory.device_address
    domain.report_tag += 1
    params.report_tag = domain.report_tag


def fill_rail_side(
    side: kernels.RailSide, domain: Domain, rail: Domain, counts: torch.Tensor | None
) -> None:
    """Name the rail that rows come from, and what says which of them are here.

    Args:
        side: To be filled.
        domain: Where rows are sent on.
        rail: Where they come from.
        counts: Of a new routing, whose lost tokens the rail hears of.
    """
    side.on_rail(rail.meet())
    landed = rail.carrier.landed()
    side.landed, side.part_rows = landed.address, landed.part_rows
    if counts is not None:
        side.lost = domain.workspace.lost.address
        side.overflow = address_of(counts[-1:])


def routing_table(record: CudaRecord) -> kernels.RoutingTable:
    """Return the addresses of a routing's tables."""
    table = kernels.RoutingTable()
    table.topk_idx = address_of(record.topk_idx)
    table.token_slot = address_of(record.token_slot)
    table.pair_slot = address_of(record.pair_slot)
    table.plan = address_of(record.plan)
    return table
