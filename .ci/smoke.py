# SPDX-License-Identifier: Apache-2.0
"""Uses an installed deepcomm, away from any checkout: four ranks, there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import deepcomm
from deepcomm.testing import LocalCluster

NUM_RANKS, NUM_TOKENS, NUM_TOPK, NUM_EXPERTS, HIDDEN = 4, 16, 2, 8, 256


def round_trip(group: Any) -> int:
    """Dispatch and combine without experts: each token returns once per rank it visited."""
    with deepcomm.Buffer(
        group,
        num_experts=NUM_EXPERTS,
        num_topk=NUM_TOPK,
        hidden=HIDDEN,
        max_tokens_per_rank=NUM_TOKENS,
        device="cpu",
    ) as buffer:
        x = torch.full((NUM_TOKENS, HIDDEN), buffer.rank + 1, dtype=torch.bfloat16)
        first = torch.arange(NUM_TOKENS) % (NUM_EXPERTS - 1)
        topk_idx = torch.stack([first, first + 1], dim=1)
        received = buffer.dispatch(x, topk_idx)
        combined = buffer.combine(received.x, received.handle)
        experts_per_rank = NUM_EXPERTS // NUM_RANKS
        num_visits = 1 + (topk_idx[:, 0] // experts_per_rank != topk_idx[:, 1] // experts_per_rank)
        expected = x * num_visits[:, None]
        if not torch.equal(combined.x, expected.to(x.dtype)):
            raise SystemExit(f"rank {buffer.rank}: expected {expected}, got {combined.x}")
        return received.x.shape[0]


if __name__ == "__main__":
    if Path(deepcomm.__file__).is_relative_to(Path(__file__).parents[1] / "source"):
        raise SystemExit("imported from the checkout, not from the wheel")
    print(f"rows received by rank: {LocalCluster(NUM_RANKS).run(round_trip)}")
