# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of one rank go: counts that the V1 interface computes before a dispatch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepcomm.compat.config import RANKS_OF_A_NODE
from deepcomm.errors import InvalidArgument

__all__ = ["DispatchLayout", "dispatch_layout"]


@dataclass(frozen=True, slots=True, eq=False)
class DispatchLayout:
    """Counts of one rank's tokens.

    Attributes:
        num_tokens_per_rank: int32 [R].
        num_tokens_per_rdma_rank: int32 [R / 8], tokens per node, or None for a group of one node.
        num_tokens_per_expert: int32 [E].
        is_token_in_rank: bool [T, R].
    """

    num_tokens_per_rank: torch.Tensor
    num_tokens_per_rdma_rank: torch.Tensor | None
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor


def dispatch_layout(topk_idx: torch.Tensor, num_experts: int, num_ranks: int) -> DispatchLayout:
    """Count the tokens for every rank, node and expert; local to this rank, without a sync.

    Raises:
        InvalidArgument: ``num_experts`` is no multiple of the ranks, or ids are not [T, K].
    """
    if num_experts < 1 or num_experts % num_ranks:
        raise InvalidArgument(
            f"num_experts: expected a multiple of the group's {num_ranks} ranks, got {num_experts}"
        )
    if topk_idx.ndim != 2:
        raise InvalidArgument(f"topk_idx: expected [T, K], got {list(topk_idx.shape)}")
    # -1 becomes E, and so falls into one more column, which is cut off.
    expert = topk_idx.long().remainder(num_experts + 1)
    rank = expert.div(num_experts // num_ranks, rounding_mode="floor")
    device = topk_idx.device
    in_rank = torch.zeros(topk_idx.shape[0], num_ranks + 1, dtype=torch.bool, device=device)
    in_rank = in_rank.scatter_(1, rank, value=True)[:, :num_ranks].contiguous()
    per_expert = torch.zeros(num_experts + 1, dtype=torch.int32, device=device)
    one = torch.ones((), dtype=torch.int32, device=device)
    per_expert.scatter_add_(0, expert.reshape(-1), one.expand(expert.numel()))
    return DispatchLayout(
        num_tokens_per_rank=in_rank.sum(0, dtype=torch.int32),
        num_tokens_per_rdma_rank=_per_node(in_rank, num_ranks),
        num_tokens_per_expert=per_expert[:num_experts],
        is_token_in_rank=in_rank,
    )


def _per_node(in_rank: torch.Tensor, num_ranks: int) -> torch.Tensor | None:
    if num_ranks <= RANKS_OF_A_NODE or num_ranks % RANKS_OF_A_NODE:
        return None
    in_node = in_rank.view(-1, num_ranks // RANKS_OF_A_NODE, RANKS_OF_A_NODE).any(-1)
    return in_node.sum(0, dtype=torch.int32)
