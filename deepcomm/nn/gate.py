# SPDX-License-Identifier: Apache-2.0
"""The router: DeepSeek-V3's gate, balanced by a selection bias instead of an auxiliary loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from deepcomm.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

__all__ = ["Gate", "GateConfig", "Routing"]

KEYS_PER_GROUP_SCORE = 2
"""A group is worth the sum of this many of its best keys."""

WEIGHT_SUM_FLOOR = 1e-20
"""Keeps the normalisation finite where all chosen scores underflow."""


@dataclass(frozen=True, slots=True)
class GateConfig:
    """Shape of a gate.

    Attributes:
        num_experts: E.
        num_topk: K, experts a token chooses.
        num_groups: Equal groups of consecutive experts; 1 = no group limit. With one group a node
            (or several) a token reaches at most ``num_chosen_groups`` nodes.
        num_chosen_groups: Groups a token may choose experts from.
        weight_scale: Factor on the normalised weights.
    """

    num_experts: int
    num_topk: int
    num_groups: int = 1
    num_chosen_groups: int = 1
    weight_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check that a token can find its experts inside its groups."""
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise InvalidArgument(
                f"num_groups: expected a divisor of num_experts = {self.num_experts}, "
                f"got {self.num_groups}"
            )
        if not 1 <= self.num_chosen_groups <= self.num_groups:
            raise InvalidArgument(
                f"num_chosen_groups: expected 1..{self.num_groups}, got {self.num_chosen_groups}"
            )
        num_candidates = self.num_chosen_groups * self.group_size
        if not 1 <= self.num_topk <= num_candidates:
            raise InvalidArgument(
                f"num_topk: expected 1..{num_candidates}, the experts in the chosen groups, "
                f"got {self.num_topk}"
            )

    @property
    def group_size(self) -> int:
        """Experts of a group."""
        return self.num_experts // self.num_groups


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """What a gate decided.

    Attributes:
        topk_idx: int64 [T, K], distinct in a row.
        topk_weights: float32 [T, K], positive, summing to ``weight_scale`` in a row.
    """

    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


class Gate(nn.Module):
    """Sigmoid scores choose experts: with a bias for the selection, without it for the weights.

    Attributes:
        weight: [E, H], one vector an expert.
        bias: float32 [E], moved by ``update_bias`` and not by gradients.
        load: int64 [E], tokens of this rank sent to each expert in training mode since the last
            ``update_bias``.
    """

    bias: torch.Tensor
    load: torch.Tensor

    def __init__(self, config: GateConfig, hidden: int) -> None:
        """Draw the weight from the default generator.

        Args:
            config: Shape of the gate.
            hidden: H.
        """
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden))
        nn.init.normal_(self.weight, std=hidden**-0.5)
        self.register_buffer("bias", torch.zeros(config.num_experts))
        self.register_buffer(
            "load", torch.zeros(config.num_experts, dtype=torch.int64), persistent=False
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move or cast like any module, but keep the bias FP32: its steps vanish in BF16."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.bias = self.bias.float()
        return self

    def forward(self, x: torch.Tensor) -> Routing:
        """Route ``x`` [T, H], of any floating dtype; scores are FP32."""
        with torch.autocast(x.device.type, enabled=False):
            scores = functional.linear(x.float(), self.weight.float()).sigmoid()
        topk_idx = self._select(scores.detach() + self.bias)
        if self.training:
            flat_idx = topk_idx.flatten()
            self.load.scatter_add_(0, flat_idx, torch.ones_like(flat_idx))
        chosen = scores.gather(1, topk_idx)
        total = chosen.sum(dim=1, keepdim=True).clamp_min(WEIGHT_SUM_FLOOR)
        return Routing(topk_idx, chosen / total * self.config.weight_scale)

    def _select(self, keys: torch.Tensor) -> torch.Tensor:
        """Return the K best experts [T, K] by ``keys`` [T, E] inside each token's best groups."""
        config = self.config
        if config.num_chosen_groups < config.num_groups:
            groups = keys.view(-1, config.num_groups, config.group_size)
            num_keys = min(KEYS_PER_GROUP_SCORE, config.group_size)
            group_scores = groups.topk(num_keys, dim=2).values.sum(dim=2)
            best = group_scores.topk(config.num_chosen_groups, dim=1).indices
            excluded = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
            keys = groups.masked_fill(excluded.unsqueeze(2), -torch.inf).flatten(1)
        return keys.topk(config.num_topk, dim=1).indices

    @torch.no_grad()
    def update_bias(self, global_load: torch.Tensor, rate: float) -> None:
        """Make crowded experts less, and idle ones more, likely to be selected; reset ``load``.

        Args:
            global_load: [E], ``load`` summed over the ranks that share the experts. It must be the
                same on all of them, or their gates drift apart.
            rate: Step of the bias, up for an expert below the mean load and down for one above.
        """
        load = global_load.to(self.bias.dtype)
        self.bias += rate * torch.sign(load.mean() - load)
        self.load.zero_()
