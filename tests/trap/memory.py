# SPDX-License-Identifier: Apache-2.0
"""Shared memory that is too small: what the ranks of those tests do, on one node of its own."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from trap.rounds import Outcome, attempt, gather, outcome_of

from deepcomm import Buffer, RecvLayout, buffer_bytes, reference
from deepcomm.group import as_group
from deepcomm.reference import ReferenceConfig
from deepcomm.testing import oracle

NUM_RANKS, NUM_EXPERTS, NUM_TOPK = 2, 8, 4
SHAPE: dict[str, int] = {
    "num_experts": NUM_EXPERTS,
    "num_topk": NUM_TOPK,
    "hidden": 1024,
    "max_tokens_per_rank": 128,
}
BYTES = buffer_bytes(num_ranks=NUM_RANKS, **SHAPE)
ROWS_BYTES = NUM_RANKS * SHAPE["max_tokens_per_rank"] * SHAPE["hidden"] * 2
MARGIN = 64 << 10  # pages of the file system itself


@dataclass(frozen=True)
class Ends:
    """How calls ended on one rank."""

    first: Outcome
    second: Outcome


def open_buffer(group: Any, **options: Any) -> Buffer:
    return Buffer(group, **{"device": "cpu", "timeout_s": 8.0, **SHAPE, **options})


class Tokens:
    """Tokens of both ranks, each with as many experts as fit on one rank."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        num_tokens, hidden = SHAPE["max_tokens_per_rank"], SHAPE["hidden"]
        self.config = ReferenceConfig(NUM_EXPERTS, NUM_RANKS, NUM_RANKS, num_tokens)
        ranks = range(NUM_RANKS)
        self.xs = [oracle.encoded_payload(rank, num_tokens, hidden, dtype=dtype) for rank in ranks]
        # All tokens of both ranks to all experts of rank 0: twice the rows of the default layout.
        self.ids = [torch.arange(NUM_TOPK).expand(num_tokens, -1).contiguous() for _ in ranks]

    def arguments(self, rank: int, **options: Any) -> dict[str, Any]:
        return {"x": self.xs[rank], "topk_idx": self.ids[rank], **options}

    def check_dispatch(self, buffer: Buffer, layout: RecvLayout) -> None:
        """Dispatch and compare with the reference."""
        expected = reference.dispatch(self.xs, self.ids, config=self.config, recv_layout=layout)
        actual = buffer.dispatch(**self.arguments(buffer.rank, recv_layout=layout))
        oracle.assert_dispatch_equal(actual, expected[buffer.rank], rank=buffer.rank)


def after_lower_ranks(rank: int) -> None:
    """Ask for memory last: who asks at the same time can take what neither has enough of then."""
    time.sleep(0.2 * rank)


def construct(group: Any) -> Outcome:
    """Construct what does not fit, then something smaller that does."""
    outcome = outcome_of(as_group(group).rank, lambda: open_buffer(group))
    with open_buffer(group, max_tokens_per_rank=16) as buffer:
        assert buffer.num_bytes > 0
    return outcome


def dispatch_wide_rows(group: Any) -> Outcome:
    """Dispatch float32 rows, which need more memory; then rows that fit."""
    with open_buffer(group) as buffer:
        arguments = Tokens(torch.float32).arguments(buffer.rank)
        after_lower_ranks(buffer.rank)
        outcome = attempt(buffer, "dispatch", arguments)
        gather(group, None)
        Tokens().check_dispatch(buffer, RecvLayout.TOKEN)
    return outcome


def dispatch_to_experts(group: Any) -> int:
    """Dispatch more rows than the landing areas hold, several times; return the bytes held."""
    tokens = Tokens()
    with open_buffer(group) as buffer:
        for _ in range(5):
            tokens.check_dispatch(buffer, RecvLayout.EXPERT)
            tokens.check_dispatch(buffer, RecvLayout.TOKEN)
        return buffer.num_bytes


def start_low_latency(group: Any) -> Ends:
    """Make the first low-latency call, twice; then a high-throughput one."""
    with open_buffer(group) as buffer:
        arguments = Tokens().arguments(buffer.rank)
        ends = []
        for _ in range(2):
            after_lower_ranks(buffer.rank)
            ends.append(attempt(buffer, "low_latency_dispatch", arguments))
            gather(group, None)
        Tokens().check_dispatch(buffer, RecvLayout.TOKEN)
    return Ends(*ends)


def grow(group: Any) -> Outcome:
    """Bring more tokens than a growable buffer can find memory for."""
    rank = as_group(group).rank
    buffer = open_buffer(group, max_tokens_per_rank=16, growable=True)
    outcome = attempt(buffer, "dispatch", Tokens().arguments(rank))
    buffer.close()
    return outcome
