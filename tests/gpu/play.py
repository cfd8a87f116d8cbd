# SPDX-License-Identifier: Apache-2.0
"""Runs probes under a tool: ``python -m gpu.play RANKS REPEATS``, all ranks on one device.

With one rank, which then is its own peer, no launch depends on another. With no rank at all a probe
writes behind its memory: a tool that says nothing then would not have seen a fault either.
"""

from __future__ import annotations

import sys

import numpy as np
from gpu import params
from gpu.launch import World
from gpu.probes import FIXED_RANKS, PROBES, Setup, run_probe

SELF_PLAYABLE = ("signal", "bulk_put", "bulk_copy", "ring", "barrier_fold", "packet")
TIMEOUT_S = 60.0


def overrun() -> None:
    """Let probe_claim write 4 words into its heap and 28 behind it."""
    world = World.on_one_device(2, heap_bytes=1 << 20)
    probe = Setup(world, np.random.default_rng(0)).probe(1, num_rounds=32)
    heap = world.bases[1]
    call = params.ClaimParams(probe, heap + world.heap_bytes - 16, heap, heap + 1024)
    world.clear()
    world.launch("probe_claim", 1, 32, {1: call})
    world.wait()


def main() -> None:
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
