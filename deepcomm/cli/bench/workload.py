# SPDX-License-Identifier: Apache-2.0
"""What is sent in a measurement, and what must arrive: both computable on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from deepcomm.testing.routing import RoutedTokens, make_routing
from deepcomm.types import RecvLayout

if TYPE_CHECKING:
    from deepcomm.cli.bench.args import BenchConfig

__all__ = ["Arrivals", "Payload", "Workload"]

NUM_WINDOWS = 4099
"""Distinct rows before the code in the first elements is added; a prime."""


class Payload:
    """Rows that any rank can make again from (source rank, token).

    A row is a window of one fixed random vector, at a place that depends on source and token, so
    that making it costs no more than a copy; its first elements are overwritten with source and
    token, so that no two rows are equal. All values are exact in BF16.
    """

    def __init__(self, hidden: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(hidden + NUM_WINDOWS - 1, generator=generator).bfloat16()
        self._windows = noise.unfold(0, hidden, 1)

    def rows(self, source: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """Return BF16 [n, H] for int64 [n] sources and tokens."""
        rows = self._windows[(source * 577 + token * 31) % NUM_WINDOWS]
        code = (source, token & 0xFF, token >> 8 & 0xFF, token >> 16)
        rows[:, : len(code)] = torch.stack(code, dim=1).bfloat16()
        return rows


@dataclass(frozen=True, slots=True, eq=False)
class Arrivals:
    """The rows that reach one rank, in the order of a layout.

    Attributes:
        source: int64 [n], rank each row comes from.
        token: int64 [n], its token there.
        choice: int64 [n], which of the token's K experts the row is for (0 for ``TOKEN``).
        index: Where each row lies in the receive tensor: one int64 [n] for each leading dimension.
        num_tokens_per_expert: int64 [L].
    """

    source: torch.Tensor
    token: torch.Tensor
    choice: torch.Tensor
    index: tuple[torch.Tensor, ...]
    num_tokens_per_expert: torch.Tensor


class Workload:
    """One rank's tokens on its device, and the routing of all ranks on the CPU."""

    def __init__(
        self, config: BenchConfig, rank: int, num_tokens: int, device: torch.device
    ) -> None:
        self.config = config
        self.rank = rank
        self.device = device
        self.num_tokens = num_tokens
        self.num_local_experts = config.experts // config.ranks
        self.payload = Payload(config.hidden, config.seed)
        source = make_routing(config.routing, config.shape, config.seed)
        self._routed = [source(peer, num_tokens) for peer in range(config.ranks)]

    @cached_property
    def routed(self) -> RoutedTokens:
        """The choice of this rank's tokens, on the device."""
        routed = self._routed[self.rank]
        topk_weights = routed.topk_weights.to(self.device)
        return RoutedTokens(routed.topk_idx.to(self.device), topk_weights)

    @cached_property
    def x(self) -> torch.Tensor:
        """This rank's tokens, BF16 [T, H], on the device."""
        token = torch.arange(self.num_tokens)
        return self.payload.rows(torch.full_like(token, self.rank), token).to(self.device)

    @cached_property
    def topk_idx(self) -> torch.Tensor:
        """Expert ids of all ranks, int64 [R, T, K]."""
        return torch.stack([routed.topk_idx for routed in self._routed])

    @cached_property
    def topk_weights(self) -> torch.Tensor:
        """Weights of all ranks, float32 [R, T, K]."""
        return torch.stack([routed.topk_weights for routed in self._routed])

    @cached_property
    def destinations(self) -> torch.Tensor:
        """Whether each token goes to each rank, bool [R, T, R]."""
        owner = self.topk_idx // self.num_local_experts
        ranks = range(self.config.ranks)
        return torch.stack([(owner == peer).any(dim=2) for peer in ranks], dim=2)

    @cached_property
    def rows_between(self) -> torch.Tensor:
        """Rows from each source to each destination, int64 [R, R]."""
        return self.destinations.sum(dim=1)

    @cached_property
    def arrivals(self) -> Arrivals:
        """What this rank receives, in the layout of the configuration."""
        return self.arrivals_in(self.config.recv_layout)

    def arrivals_in(self, layout: RecvLayout) -> Arrivals:
        """Return what this rank receives in a layout, without alignment padding."""
        first = self.rank * self.num_local_experts
        here = (self.topk_idx >= first) & (self.topk_idx < first + self.num_local_experts)
        expert = self.topk_idx[here] - first
        count = torch.bincount(expert, minlength=self.num_local_experts)
        if layout is RecvLayout.TOKEN:
            source, token = self.destinations[:, :, self.rank].nonzero().unbind(1)
            place = torch.arange(len(source))
            return Arrivals(source, token, torch.zeros_like(source), (place,), count)
        # Already in the order of (source, token): a stable sort keeps that inside each expert.
        order = expert.argsort(stable=True)
        source, token, choice = here.nonzero()[order].unbind(1)
        place = torch.arange(len(source))
        if layout is RecvLayout.EXPERT:
            return Arrivals(source, token, choice, (place,), count)
        block = expert[order]
        place -= (count.cumsum(0) - count)[block]
        return Arrivals(source, token, choice, (block, place), count)
