# SPDX-License-Identifier: Apache-2.0
"""Arguments and results of the operations: the frozen records that the public API exchanges.

Symbols used in shapes here and everywhere: T tokens on this rank, H hidden, K top-k, E experts,
R ranks, L = E / R local experts, N rows received by this rank, S = ceil(H / 128) scale tiles a row.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = [
    "SCALE_TILE",
    "BufferStats",
    "CombineOutput",
    "DispatchOutput",
    "Event",
    "Handle",
    "RecvLayout",
    "ScaledTensor",
]

SCALE_TILE = 128
"""Channels of one token that share one FP8 scale."""


class RecvLayout(enum.Enum):
    """Order of the rows that a dispatch delivers.

    ``TOKEN``: one row per (token, this rank), sorted by (source rank, token).
    ``EXPERT``: one row per (token, local expert), grouped by expert, rows of a group sorted by
    (source rank, token), each group starting at a multiple of ``expert_alignment``.
    ``EXPERT_PADDED``: one block of ``R * max_tokens_per_rank`` rows per local expert, the valid
    rows first, sorted like those of ``EXPERT``.
    """

    TOKEN = "token"
    EXPERT = "expert"
    EXPERT_PADDED = "expert_padded"

    __hash__ = object.__hash__  # members are equal to themselves alone; Enum's hash asks for a name


@dataclass(frozen=True, slots=True, eq=False)
class ScaledTensor:
    """FP8 rows with one scale per 128 channels: value = data * scale.

    Attributes:
        data: float8_e4m3fn [T, H].
        scales: float32 [T, S], or int32 [T, ceil(S / 4)] with four UE8M0 exponents packed in each
            word, lowest byte first.
    """

    data: torch.Tensor
    scales: torch.Tensor


class Event(Protocol):
    """Completion of an operation; errors found after the call surface in ``synchronize``."""

    def synchronize(self) -> None:
        """Block the host until the operation is complete."""

    def current_stream_wait(self) -> None:
        """Make the current stream wait for the operation (on CPUs: block like ``synchronize``)."""

    def query(self) -> bool:
        """Return whether the operation is complete, without blocking."""


@dataclass(frozen=True, slots=True, eq=False)
class Handle:
    """Record of one routing: what ``combine`` and a cached ``dispatch`` need. Stays valid for ever.

    Attributes:
        recv_layout: Layout of the rows this routing delivers.
        expert_alignment: Multiple at which the groups of ``EXPERT`` start.
        capacity: Rows of the receive tensor where a capacity was given, else None.
        num_tokens: T, tokens of this rank.
        num_rows: Rows of ``x`` as delivered, and of ``y`` as ``combine`` wants it: [num_rows, H],
            or for ``EXPERT_PADDED`` [L, num_rows / L, H].
        topk_idx: int32 [T, K], the routing of this rank's tokens, -1 = none.
        topk_weights: float32 [T, K] given at dispatch, or None.
        low_latency: Whether it comes from ``low_latency_dispatch``.
        records: The backend's own tables; opaque.
    """

    recv_layout: RecvLayout
    expert_alignment: int
    capacity: int | None
    num_tokens: int
    num_rows: int
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor | None
    low_latency: bool
    records: Any


@dataclass(frozen=True, slots=True, eq=False)
class DispatchOutput:
    """What a dispatch delivered to this rank.

    Attributes:
        x: Received rows: [N, H] for ``TOKEN`` and ``EXPERT`` (N = capacity where one was given; N
            includes alignment padding for ``EXPERT``), [L, R * max_tokens_per_rank, H] for
            ``EXPERT_PADDED``. The input's dtype, or float8_e4m3fn where rows are FP8. May be a view
            of symmetric memory, which stays valid as long as any tensor shares its storage.
        scales: None unless ``x`` is FP8. ``TOKEN``: [N, S] float32 row-major, or [N, ceil(S / 4)]
            int32 of packed UE8M0. ``EXPERT``: the same shape, column-major: strides
            (1, round_up(N, 4)). ``EXPERT_PADDED``: [L, M, S] with strides (S * M4, 1, M4), M the
            rows of a block and M4 = round_up(M, 4); likewise int32.
        topk_idx: ``TOKEN``: [N, K] local expert ids in the input's dtype, -1 for experts of other
            ranks. None for the expert layouts.
        topk_weights: float32. ``TOKEN``: [N, K], 0 where ``topk_idx`` is -1; ``EXPERT``: [N], one a
            row; ``EXPERT_PADDED``: [L, M]. None where no weights were given. Padding rows hold 0.
        num_tokens_per_expert: int32 [L], rows delivered per local expert, without padding.
        expert_offsets: int32 [L + 1] for ``EXPERT``: first row of each group and the end of the
            last, padding included. None otherwise.
        num_recv_tokens: int32 scalar tensor: rows delivered: N for ``TOKEN``, the end of the last
            group (padding included) for ``EXPERT``, the sum of the counts for ``EXPERT_PADDED``.
        overflow: bool scalar tensor: rows that concern this rank, as receiver or as source, did not
            fit a receiver's capacity and were not delivered.
        handle: Record of this routing.
        event: Completion where ``async_op`` was asked for, else None.
        hook: Where ``return_hook`` was asked for: call it once to finish the operation; the other
            fields are valid only afterwards. Else None.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    num_tokens_per_expert: torch.Tensor
    expert_offsets: torch.Tensor | None
    num_recv_tokens: torch.Tensor
    overflow: torch.Tensor
    handle: Handle
    event: Event | None = None
    hook: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class CombineOutput:
    """What a combine brought back to this rank.

    Attributes:
        x: [T, H] in ``y``'s dtype.
        topk_weights: float32 [T, K], the values carried back from the expert ranks (0 where there
            is no expert, NaN where the row overflowed a capacity), or None.
        event: Completion where ``async_op`` was asked for, else None.
        hook: Where ``return_hook`` was asked for: call it once to finish, else None.
    """

    x: torch.Tensor
    topk_weights: torch.Tensor | None
    event: Event | None = None
    hook: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class BufferStats:
    """Counters of one buffer on this rank since its construction, counted where bytes are written.

    Attributes:
        num_dispatches: Finished dispatches of either mode.
        num_combines: Finished combines of either mode.
        tokens_sent: Source tokens given to dispatch.
        tokens_received: Rows delivered to this rank (one per token and rank).
        bytes_local: Payload bytes this rank wrote for itself.
        bytes_node: Payload bytes this rank wrote for other ranks of its node, forwarding included.
        bytes_network: Payload bytes this rank sent to other nodes.
        wait_us: Microseconds this rank waited for each rank of the group, [R].
    """

    num_dispatches: int
    num_combines: int
    tokens_sent: int
    tokens_received: int
    bytes_local: int
    bytes_node: int
    bytes_network: int
    wait_us: tuple[int, ...]
