# SPDX-License-Identifier: Apache-2.0
"""What ranks do in the tests on several nodes."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from multinode import netns
from trap.rounds import Inputs, Place, call, check_round_trips, open_buffer

from deepcomm import Buffer

HIDDEN, NUM_TOKENS = 2048, 192
ROW_BYTES = 2 * HIDDEN
EXPERTS_PER_RANK = 2


def describe(group: Any) -> tuple[int, int, str]:
    """Construct a buffer that finds its nodes itself, and run round trips."""
    with open_buffer(group, Place(dist.get_world_size(group))) as buffer:
        check_round_trips(buffer, Inputs(buffer))
        return buffer.num_ranks, buffer.ranks_per_node, buffer.explain()


@dataclass(frozen=True)
class Traffic:
    """What one operation moved, as this rank counts and as its node's interface does."""

    stats_bytes: int
    sent_bytes: int
    received_bytes: int
    seconds: float


def everywhere_else(buffer: Buffer) -> torch.Tensor:
    """Return ids that choose one expert on every rank of every other node."""
    node = buffer.rank // buffer.ranks_per_node
    ranks = [rank for rank in range(buffer.num_ranks) if rank // buffer.ranks_per_node != node]
    return (torch.tensor(ranks) * EXPERTS_PER_RANK).expand(NUM_TOKENS, -1).clone()


def measure_traffic(group: Any) -> dict[str, Traffic]:
    """Run each operation once, between looks at the counters of the node's interface."""
    num_ranks = dist.get_world_size(group)
    buffer = Buffer(
        group,
        num_experts=EXPERTS_PER_RANK * num_ranks,
        num_topk=num_ranks,
        hidden=HIDDEN,
        max_tokens_per_rank=NUM_TOKENS,
        device="cpu",
        timeout_s=30.0,
    )
    ids = everywhere_else(buffer)
    arguments = {
        "x": torch.ones(NUM_TOKENS, HIDDEN, dtype=torch.bfloat16),
        "topk_idx": ids,
        "topk_weights": torch.ones(ids.shape),
    }
    traffic = {}
    for mode in ("", "low_latency_"):
        there, back = f"{mode}dispatch", f"{mode}combine"
        traffic[there], output = watch(buffer, there, arguments)
        rows = {"y": output.x.clone().nan_to_num(0.0), "handle": output.handle}
        traffic[back], sums = watch(buffer, back, rows)
        assert (sums.x == len(ids[0])).all()
    buffer.close()
    return traffic


def watch(buffer: Buffer, operation: str, arguments: dict[str, Any]) -> tuple[Traffic, Any]:
    dist.barrier()
    before = (buffer.stats().bytes_network, netns.sent_bytes(), netns.received_bytes())
    start = time.monotonic()
    output = call(buffer, operation, arguments)
    seconds = time.monotonic() - start
    dist.barrier()
    after = (buffer.stats().bytes_network, netns.sent_bytes(), netns.received_bytes())
    counts = [late - early for early, late in zip(before, after, strict=True)]
    return Traffic(*counts, seconds), output


def cut_own_link() -> None:
    time.sleep(0.3)  # the others have left the last collective of the test's own group
    subprocess.run(["ip", "link", "set", netns.INTERFACE, "down"], check=True)
