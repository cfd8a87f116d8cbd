# SPDX-License-Identifier: Apache-2.0
"""The slot of every row, as a pure function of the routing: part of the executable specification.

A tensor's name ends in its axes: g all tokens of all ranks ordered by (source rank, token),
p the (token, local expert) pairs that reach one rank, n rows of a rank's receive tensor, r ranks,
t tokens of one rank, k top-k, l local experts, h hidden, s scale tiles, b bytes.

On each rank, ``TOKEN`` gives one slot to each token that has at least one expert there, in the
order g. The expert layouts give one slot to each pair, in the order (local expert, g); the group
of expert e starts at offset[e], where ``EXPERT`` has offset[0] = 0 and offset[e + 1] = offset[e] +
round_up(count[e], expert_alignment), and ``EXPERT_PADDED`` offset[e] = e * R * max_tokens_per_rank.

Example: 2 ranks, 4 experts; rank 0 holds token a for experts {0, 2} and b for {1, 0}, rank 1 holds
c for {3}. ``TOKEN``: rank 0 receives a b, rank 1 a c. ``EXPERT`` with alignment 2: rank 0 receives
a b | b - with offsets 0 2 4, rank 1 a - | c - with offsets 0 2 4 (- is padding).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from deepcomm.topology import Topology
from deepcomm.types import RecvLayout

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

__all__ = ["Placement", "ReferenceConfig", "Routing", "place_rows"]


@dataclass(frozen=True, slots=True)
class ReferenceConfig:
    """The facts of a buffer that decide its results; see ``deepcomm.Buffer``."""

    num_experts: int
    num_ranks: int
    ranks_per_node: int
    max_tokens_per_rank: int

    @property
    def num_local_experts(self) -> int:
        """L, experts of each rank."""
        return self.num_experts // self.num_ranks

    @property
    def max_recv_tokens(self) -> int:
        """Most tokens that one rank, or one of its experts, can receive."""
        return self.num_ranks * self.max_tokens_per_rank

    def is_connected(self, src_rank: int, dst_rank: int, masked: AbstractSet[int]) -> bool:
        """Return whether tokens of ``src_rank`` reach ``dst_rank``: no rank on their way is masked.

        The way leads over the rank of the destination's node that is on the source's rail.
        """
        src = Topology(src_rank, self.num_ranks, self.ranks_per_node)
        dst = Topology(dst_rank, self.num_ranks, self.ranks_per_node)
        return masked.isdisjoint((src_rank, src.rank_of(dst.node, src.local), dst_rank))


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where the pairs that reach one rank lie in its receive tensor; columns are int64 [P].

    Attributes:
        token_p: Token of the pair, an index into g.
        k_p: Column of ``topk_idx`` that names the pair's expert.
        expert_p: Local expert.
        slot_p: Row of the receive tensor. ``TOKEN``: the pairs of a token share one.
        offsets_l: int64 [L + 1], first slot of each group and the end of the last; ``EXPERT`` only.
        num_slots: Slots in use, padding included.
        num_rows: Rows of the receive tensor; what lies in a slot at or beyond it is lost.
    """

    token_p: torch.Tensor
    k_p: torch.Tensor
    expert_p: torch.Tensor
    slot_p: torch.Tensor
    offsets_l: torch.Tensor | None
    num_slots: int
    num_rows: int

    @property
    def delivered_p(self) -> torch.Tensor:
        """Bool [P]: the pair's slot lies in the receive tensor."""
        return self.slot_p < self.num_rows

    @property
    def clipped_offsets_l(self) -> torch.Tensor | None:
        """Int32 [L + 1]: the offsets, none of them beyond the receive tensor."""
        return None if self.offsets_l is None else self.offsets_l.clamp(max=self.num_rows).int()

    def select(self, chosen_p: torch.Tensor) -> Placement:
        """Return the chosen pairs alone, where they are."""
        columns = {name: getattr(self, name)[chosen_p] for name in _COLUMNS}
        return replace(self, **columns)


_COLUMNS = ("token_p", "k_p", "expert_p", "slot_p")


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """One exchange of all ranks: the ``records`` of every handle of the reference.

    Attributes:
        config: Facts of the buffer.
        recv_layout: Layout of the delivered rows.
        expert_alignment: Multiple at which groups of ``EXPERT`` start.
        capacities: Rows of the receive tensor on each rank, None = as many as arrive.
        low_latency: Whether receive tensors have the static shapes of the low-latency mode.
        source_g: int64 [G], rank that each token comes from.
        topk_idx_gk: Routing in the dtype it was given.
        topk_weights_gk: float32, or None.
        placements_r: What reaches each rank.
    """

    config: ReferenceConfig
    recv_layout: RecvLayout
    expert_alignment: int
    capacities: tuple[int | None, ...]
    low_latency: bool
    source_g: torch.Tensor
    topk_idx_gk: torch.Tensor
    topk_weights_gk: torch.Tensor | None = None
    placements_r: tuple[Placement, ...] = ()

    @property
    def lost_g(self) -> torch.Tensor:
        """Bool [G]: the token lost at least one row to a capacity."""
        lost_g = torch.zeros_like(self.source_g, dtype=torch.bool)
        for place in self.placements_r:
            lost_g[place.token_p[~place.delivered_p]] = True
        return lost_g

    def connected_g(self, dst_rank: int, masked: AbstractSet[int]) -> torch.Tensor:
        """Bool [G]: the token's rank and ``dst_rank`` are connected."""
        sources = range(self.config.num_ranks)
        connected_r = [self.config.is_connected(src, dst_rank, masked) for src in sources]
        return torch.tensor(connected_r)[self.source_g]

    def present_pairs(self, rank: int, masked: AbstractSet[int]) -> Placement:
        """Return the pairs that were delivered to ``rank`` and that ``masked`` leaves connected."""
        place = self.placements_r[rank]
        return place.select(place.delivered_p & self.connected_g(rank, masked)[place.token_p])


def place_rows(routing: Routing, masked: AbstractSet[int] = frozenset()) -> Routing:
    """Return the routing with its placements; pairs that are not connected are absent from them."""
    ranks = range(routing.config.num_ranks)
    return replace(routing, placements_r=tuple(_place(routing, rank, masked) for rank in ranks))


def _place(routing: Routing, rank: int, masked: AbstractSet[int]) -> Placement:
    """Give every pair that reaches ``rank`` its slot."""
    num_local = routing.config.num_local_experts
    expert_gk = routing.topk_idx_gk.long() - rank * num_local
    here_gk = (expert_gk >= 0) & (expert_gk < num_local)
    here_gk &= routing.connected_g(rank, masked)[:, None]
    token_p, k_p = here_gk.nonzero(as_tuple=True)
    expert_p = expert_gk[token_p, k_p]
    if routing.recv_layout is RecvLayout.TOKEN:
        token_n, slot_p = torch.unique_consecutive(token_p, return_inverse=True)
        num_rows = _num_rows(routing, rank, len(token_n))
        return Placement(token_p, k_p, expert_p, slot_p, None, len(token_n), num_rows)

    by_expert_p = expert_p.argsort(stable=True)
    token_p, k_p, expert_p = token_p[by_expert_p], k_p[by_expert_p], expert_p[by_expert_p]
    count_l = torch.bincount(expert_p, minlength=num_local)
    offsets_l = _group_offsets(routing, count_l)
    first_pair_l = count_l.cumsum(0) - count_l
    slot_p = offsets_l[expert_p] + torch.arange(len(expert_p)) - first_pair_l[expert_p]
    num_slots = int(offsets_l[-1])
    num_rows = _num_rows(routing, rank, num_slots)
    offsets = offsets_l if routing.recv_layout is RecvLayout.EXPERT else None
    return Placement(token_p, k_p, expert_p, slot_p, offsets, num_slots, num_rows)


def _group_offsets(routing: Routing, count_l: torch.Tensor) -> torch.Tensor:
    if routing.recv_layout is RecvLayout.EXPERT_PADDED:
        return torch.arange(len(count_l) + 1) * routing.config.max_recv_tokens
    alignment = routing.expert_alignment
    padded_l = (count_l + alignment - 1) // alignment * alignment
    return pad(padded_l.cumsum(0), (1, 0))


def _num_rows(routing: Routing, rank: int, num_slots: int) -> int:
    if routing.recv_layout is RecvLayout.EXPERT_PADDED:
        return num_slots
    if routing.low_latency:
        return routing.config.max_recv_tokens
    capacity = routing.capacities[rank]
    return num_slots if capacity is None else capacity
