# SPDX-License-Identifier: Apache-2.0
"""What dispatch and combine share: their place among stages, refusals, tables of a routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepcomm._C import kernels
from deepcomm.backends.cuda import failure as failures
from deepcomm.backends.cuda.tensors import address_of
from deepcomm.types import RecvLayout

if TYPE_CHECKING:
    import torch

    from deepcomm.backends.cuda.domain import Domain
    from deepcomm.backends.cuda.tensors import CudaRecord

__all__ = [
    "ALONE",
    "LAYOUTS",
    "NO_CAPACITY",
    "RoutingId",
    "Stage",
    "fill_count_outputs",
    "refuse",
    "routing_table",
]

NO_CAPACITY = -1
LAYOUTS = {RecvLayout.TOKEN: 0, RecvLayout.EXPERT: 1, RecvLayout.EXPERT_PADDED: 2}


@dataclass(frozen=True, slots=True)
class RoutingId:
    """What a handle's records are recognised by.

    Attributes:
        buffer_id: Of the buffer, alike on its ranks.
        serial: Number of the dispatch, alike on its ranks.
    """

    buffer_id: bytes
    serial: int


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a domain's part of an operation stands among others.

    Attributes:
        after: The domain of the part before.
        is_last: Whether the host hears from this part, and nobody waits for an earlier one.
        host_waits: Whether the host waits for the verdict on the whole, where this part alone does
            not tell.
        tokens_from: Address of the first token of each origin, where there are several.
    """

    after: Domain | None = None
    is_last: bool = True
    host_waits: bool | None = None
    tokens_from: int = 0


ALONE = Stage()


def refuse(domain: Domain, stage: Stage = ALONE) -> None:
    """Tell the peers that this rank does not take part in the operation that it was asked for."""
    params = kernels.CountParams()
    params.meet = domain.meet(stage.after, reports=stage.is_last)
    params.meet.header = kernels.Header(0, NO_CAPACITY, 0, 0, 1, failures.REFUSED_BY_HOST)
    params.num_topk = 1
    params.tokens_from = domain.workspace.no_tokens.address
    fill_count_outputs(domain, params, domain.scratch_counts)
    domain.runtime.launch(domain.functions.count, 1, params)
    domain.runtime.flush()


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


def routing_table(record: CudaRecord) -> kernels.RoutingTable:
    """Return the addresses of a routing's tables."""
    table = kernels.RoutingTable()
    table.topk_idx = address_of(record.topk_idx)
    table.token_slot = address_of(record.token_slot)
    table.pair_slot = address_of(record.pair_slot)
    table.plan = address_of(record.plan)
    return table
