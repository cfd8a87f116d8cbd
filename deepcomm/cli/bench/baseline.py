# SPDX-License-Identifier: Apache-2.0
"""The baseline: dispatch and combine as a careful torch user writes them over collectives.

Each token is sent once to each rank that owns one of its experts; ``all_to_all_single`` moves
counts, rows, and the ids and weights that the experts' rank needs; ``index_add_`` sums. Tensors are
fresh in every call, as autograd needs them, or kept, which spares their page faults. It does less
than deepcomm: rows are never grouped by expert, and sums are BF16 instead of FP32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from deepcomm.fp8 import quantize_fp8
from deepcomm.types import ScaledTensor

if TYPE_CHECKING:
    from deepcomm.testing.routing import RoutedTokens

__all__ = ["Plan", "TorchExchange"]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One routing as ``all_to_all_single`` wants it.

    Attributes:
        token: int64 [M], the token of each row sent, ordered by (destination, token).
        send_rows: Rows for each destination, [R].
        recv_rows: Rows from each source, [R].
    """

    token: torch.Tensor
    send_rows: list[int]
    recv_rows: list[int]


class TorchExchange:
    """Dispatch and combine of one rank over a process group that moves tensors of its device."""

    def __init__(
        self, group: dist.ProcessGroup, num_experts: int, *, keep_tensors: bool = False
    ) -> None:
        self._group = group
        self._num_ranks = dist.get_world_size(group)
        self._num_local_experts = num_experts // self._num_ranks
        self._kept: dict[str, torch.Tensor] | None = {} if keep_tensors else None

    def route(self, topk_idx: torch.Tensor) -> Plan:
        """Find who gets which token, and exchange the counts."""
        nowhere = self._num_ranks
        owner = (topk_idx // self._num_local_experts).masked_fill(topk_idx < 0, nowhere)
        sent = owner.new_zeros((len(owner), self._num_ranks + 1), dtype=torch.bool)
        sent = sent.scatter_(1, owner, value=True)[:, :nowhere]
        send_rows = sent.sum(dim=0)
        recv_rows = torch.empty_like(send_rows)
        dist.all_to_all_single(recv_rows, send_rows, group=self._group)
        token = sent.t().nonzero()[:, 1]
        return Plan(token, send_rows.tolist(), recv_rows.tolist())

    def dispatch(self, x: torch.Tensor, routed: RoutedTokens, plan: Plan) -> torch.Tensor:
        """Return the rows this rank receives, [N, H], ordered by (source, token)."""
        self.exchange_routing(routed, plan)
        return self._exchange(x, plan, "x")

    def dispatch_fp8(self, x: torch.Tensor, routed: RoutedTokens, plan: Plan) -> ScaledTensor:
        """Cast once, then exchange data and scales."""
        self.exchange_routing(routed, plan)
        cast = quantize_fp8(x)
        # gloo knows no FP8: the bytes travel as uint8.
        data = self._exchange(cast.data.view(torch.uint8), plan, "data")
        scales = self._exchange(cast.scales, plan, "scales")
        return ScaledTensor(data.view(torch.float8_e4m3fn), scales)

    def exchange_routing(
        self, routed: RoutedTokens, plan: Plan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and weights of the rows this rank receives, [N, K] each, in one message."""
        num_topk = routed.topk_idx.shape[1]
        both = torch.cat((routed.topk_idx.int(), routed.topk_weights.view(torch.int32)), dim=1)
        received = self._exchange(both, plan, "routing")
        return received[:, :num_topk], received[:, num_topk:].view(torch.float32)

    def combine(self, y: torch.Tensor, plan: Plan, num_tokens: int) -> torch.Tensor:
        """Return the sums over the ranks of each token's rows, [T, H]."""
        back = self._empty("back", y, len(plan.token))
        dist.all_to_all_single(back, y, plan.send_rows, plan.recv_rows, group=self._group)
        return y.new_zeros((num_tokens, y.shape[1])).index_add_(0, plan.token, back)

    def _exchange(self, x: torch.Tensor, plan: Plan, name: str) -> torch.Tensor:
        send = self._empty(f"send {name}", x, len(plan.token))
        torch.index_select(x, 0, plan.token, out=send)
        recv = self._empty(f"recv {name}", x, sum(plan.recv_rows))
        dist.all_to_all_single(recv, send, plan.recv_rows, plan.send_rows, group=self._group)
        return recv

    def _empty(self, name: str, like: torch.Tensor, num_rows: int) -> torch.Tensor:
        if self._kept is None:
            return like.new_empty((num_rows, like.shape[1]))
        kept = self._kept.get(name)
        if kept is None or len(kept) < num_rows:
            kept = self._kept[name] = like.new_empty((num_rows, like.shape[1]))
        return kept[:num_rows]
