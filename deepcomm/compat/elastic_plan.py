# SPDX-License-Identifier: Apache-2.0
"""What a V2 dispatch asks of deepcomm: for a new routing, and for one of a handle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from deepcomm.compat.config import DEFAULT_NUM_SMS
from deepcomm.compat.handles import EPHandle, routing_of
from deepcomm.compat.keys import Routing
from deepcomm.errors import InvalidArgument
from deepcomm.types import RecvLayout

if TYPE_CHECKING:
    import deepcomm
    from deepcomm.types import DispatchOutput

__all__ = ["Asked", "Plan", "plan_first", "plan_repeat"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Asked:
    """Arguments of a dispatch that decide its layout, as given."""

    topk_idx: torch.Tensor | None
    num_experts: int | None
    num_max_tokens_per_rank: int | None
    expert_alignment: int | None
    num_sms: int
    do_cpu_sync: bool | None
    do_expand: bool | None


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One dispatch of a buffer.

    Attributes:
        buffer: Which to use.
        arguments: Of its ``dispatch``: what decides the layout.
        fields: Of the handle to be made; None where the caller's handle stays in use.
        has_gaps: Whether rows that hold no token lie between groups of exact counts.
    """

    buffer: deepcomm.Buffer
    arguments: dict[str, Any]
    fields: dict[str, Any] | None
    has_gaps: bool

    def handle(self, output: DispatchOutput, dtype: torch.dtype) -> EPHandle:
        """Return the handle of a new routing."""
        assert self.fields is not None
        return EPHandle.of(Routing(self.buffer, output.handle, dtype), output, self.fields)


def routing_arguments(asked: Asked) -> tuple[torch.Tensor, int]:
    """Return the ids and E of a new routing.

    Raises:
        InvalidArgument: One of them is missing.
    """
    if asked.topk_idx is None or asked.num_experts is None:
        missing = "topk_idx" if asked.topk_idx is None else "num_experts"
        raise InvalidArgument(f"{missing}: expected it for a dispatch without handle, got None")
    return asked.topk_idx, asked.num_experts


def plan_first(buffer: deepcomm.Buffer, asked: Asked, max_tokens: int) -> Plan:
    """Plan the dispatch of a new routing.

    Args:
        buffer: Which serves it.
        asked: What the caller wants.
        max_tokens: Largest T of any rank, 0 if the buffer was constructed without.
    """
    topk_idx, num_experts = routing_arguments(asked)
    alignment = asked.expert_alignment or 1
    max_tokens = asked.num_max_tokens_per_rank or max_tokens
    arguments: dict[str, Any] = {"topk_idx": topk_idx, "recv_layout": RecvLayout.TOKEN}
    if asked.do_expand:
        arguments |= {"recv_layout": RecvLayout.EXPERT, "expert_alignment": alignment}
    if asked.do_cpu_sync is False:
        num_experts_hit = min(topk_idx.shape[-1], num_experts // buffer.num_ranks)
        rows = most_rows(buffer, max_tokens, num_experts_hit if asked.do_expand else 1)
        arguments["num_recv_tokens"] = with_gaps(buffer, rows, alignment if asked.do_expand else 1)
    fields = {
        "do_expand": bool(asked.do_expand),
        "num_experts": num_experts,
        "expert_alignment": alignment,
        "num_max_tokens_per_rank": max_tokens or buffer.config.max_tokens_per_rank,
        "num_sms": asked.num_sms or DEFAULT_NUM_SMS,
        "topk_idx": topk_idx.clone(),
    }
    gaps = bool(asked.do_expand) and alignment > 1 and asked.do_cpu_sync is not False
    return Plan(buffer, arguments, fields, gaps)


def most_rows(buffer: deepcomm.Buffer, max_tokens: int, rows_of_token: int) -> int:
    """Return the rows that can arrive at one rank."""
    if not max_tokens:
        raise InvalidArgument(
            "num_max_tokens_per_rank: expected it, here or at construction, for a dispatch without "
            "do_cpu_sync, got none"
        )
    return buffer.num_ranks * max_tokens * rows_of_token


def with_gaps(buffer: deepcomm.Buffer, rows: int, alignment: int) -> int:
    """Return the rows when each local expert's group is padded, itself a multiple."""
    num_local = buffer.config.num_experts // buffer.num_ranks
    return -(-(rows + num_local * (alignment - 1)) // alignment) * alignment


def plan_repeat(handle: EPHandle, asked: Asked) -> Plan:
    """Plan a dispatch along the routing of a handle; what is not asked for comes from it.

    Raises:
        InvalidArgument: Ids are given as well.
        NotImplementedError: Another layout is asked for than the handle's.
    """
    if asked.topk_idx is not None:
        raise InvalidArgument("topk_idx: expected None beside handle, got ids")
    for name in ("do_expand", "expert_alignment"):
        wanted, has = getattr(asked, name), getattr(handle, name)
        if wanted is not None and wanted != has:
            raise NotImplementedError(
                f"dispatch(handle=..., {name}={wanted}): the handle's rows are laid out for "
                f"{name}={has}; leave {name} out, or dispatch by topk_idx"
            )
    routing = routing_of(handle)
    record = routing.handle
    gaps = record.expert_alignment > 1 and record.capacity is None
    return Plan(routing.buffer, {"handle": record}, None, gaps)
