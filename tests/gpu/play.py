# SPDX-License-Identifier: Apache-2.0
"""Runs kernels under a tool, all ranks on one device.

``python -m gpu.play RANKS REPEATS`` plays probes. With one rank, which then is its own peer, no
launch depends on another. With no rank at all a probe writes behind its memory: a tool that says
nothing then would not have seen a fault either. ``python -m gpu.play operations RANKS`` plays
dispatches and combines: of one rank, or of processes with a GPU each. Threads would not do: under
a tool, a copy from pageable memory waits for kernels of the process that wait for its rank.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch.distributed as dist
from collective.case import Case
from collective.scenario import exchange, low_latency_exchange
from gpu import params
from gpu.backend_ranks import in_process
from gpu.launch import World
from gpu.probes import FIXED_RANKS, PROBES, Setup, run_probe

from deepcomm import RecvLayout
from deepcomm.testing import run_processes

SELF_PLAYABLE = ("signal", "bulk_put", "bulk_copy", "ring", "barrier_fold", "packet")
TIMEOUT_S = 60.0
LIMIT_S = 270.0


def overrun() -> None:
    """Let probe_claim write 4 words into its heap and 28 behind it."""
    world = World.on_one_device(2, heap_bytes=1 << 20)
    probe = Setup(world, np.random.default_rng(0)).probe(1, num_rounds=32)
    heap = world.bases[1]
    call = params.ClaimParams(probe, heap + world.heap_bytes - 16, heap, heap + 1024)
    world.clear()
    world.launch("probe_claim", 1, 32, {1: call})
    world.wait()


def operations(group: Any) -> None:
    """Compare small operations of every layout with the reference."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    base = Case(num_ranks=num_ranks, num_tokens=6, hidden=128, wire="fp8", device="cuda")

    def tell(what: str) -> None:
        if rank == 0:
            print(f"{what}: results hold", flush=True)  # noqa: T201

    for layout in RecvLayout:
        case = replace(base, layout=layout)
        exchange(group, case, num_sms=2, timeout_s=TIMEOUT_S)
        tell(layout.value)
        if layout is not RecvLayout.EXPERT:
            low_latency_exchange(group, case)
            tell(f"low latency, {layout.value}")


def main() -> None:
    if sys.argv[1] == "operations":
        run_processes(in_process, int(sys.argv[2]), operations, timeout_s=LIMIT_S)
        return
    num_ranks, repeats = int(sys.argv[1]), int(sys.argv[2])
    if num_ranks == 0:
        overrun()
        return
    world = World.on_one_device(num_ranks)
    names = [name for name in PROBES if FIXED_RANKS.get(name, num_ranks) == num_ranks]
    for name in SELF_PLAYABLE if num_ranks == 1 else names:
        for seed in range(repeats):
            run_probe(Setup(world, np.random.default_rng(seed), TIMEOUT_S), PROBES[name])
        print(f"{name}: {repeats} launches hold", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
