# SPDX-License-Identifier: Apache-2.0
"""Runs probes once under a tool: ``python -m gpu.play RANKS REPEATS``, all ranks on one device.

With one rank, which then is its own peer, a launch depends on no other: tools may serialise them.
"""

from __future__ import annotations

import sys

import numpy as np
from gpu.launch import World
from gpu.probes import FIXED_RANKS, PROBES, Setup, run_probe

SELF_PLAYABLE = ("signal", "bulk_put", "bulk_copy", "ring", "barrier_fold", "packet")
TIMEOUT_S = 60.0


def main() -> None:
    num_ranks, repeats = int(sys.argv[1]), int(sys.argv[2])
    world = World.on_one_device(num_ranks)
    names = [name for name in PROBES if FIXED_RANKS.get(name, num_ranks) == num_ranks]
    for name in SELF_PLAYABLE if num_ranks == 1 else names:
        for seed in range(repeats):
            run_probe(Setup(world, np.random.default_rng(seed), TIMEOUT_S), PROBES[name])
        print(f"{name}: {repeats} launches hold", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
