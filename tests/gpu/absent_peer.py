# SPDX-License-Identifier: Apache-2.0
"""Launches a probe on rank 0 alone, then on all ranks: ``python -m gpu.absent_peer DEVICES``.

Prints a line of JSON a probe: the error record, how long the kernel ran, and whether the context
still computes; also for a rank whose record another failure has filled before. It ends unless each
probe then holds between all ranks.
"""

from __future__ import annotations

import json
import sys
import time

import cupy
import numpy as np
from gpu.launch import World
from gpu.probes import PROBES, Setup, run_probe

TIMEOUT_S = 0.25
LONG_TIMEOUT_S = 10.0
FILLED = 2  # RecordState::kComplete
SEED = 5


def run_alone(
    world: World, name: str, *, timeout_s: float = TIMEOUT_S, record_state: int = 0
) -> dict[str, object]:
    setup = Setup(world, np.random.default_rng(SEED), timeout_s)
    call = PROBES[name](setup)
    world.wait()
    world.local[0].record["state"] = record_state
    start = time.monotonic()
    world.launch(call.kernel, call.grid, call.block, {0: call.params[0]})
    world.wait(limit_s=timeout_s + 5)
    elapsed_s = time.monotonic() - start
    return {"elapsed_s": elapsed_s, "records": world.failures(), "grid": call.grid}


def context_computes() -> bool:
    return int(cupy.arange(1000, dtype=np.int64).sum()) == 499_500


def main() -> None:
    world = World.across_devices(2) if sys.argv[1] == "2" else World.on_one_device(2)
    # Whatever is slow the first time is not part of the deadline.
    run_probe(Setup(world, np.random.default_rng(SEED)), PROBES["signal"])
    for name in PROBES:
        if name == "claim":  # waits for nobody
            continue
        result = run_alone(world, name)
        after = run_alone(world, name, timeout_s=LONG_TIMEOUT_S, record_state=FILLED)
        result["after_failure"] = after
        result["computes"] = context_computes()
        run_probe(Setup(world, np.random.default_rng(SEED)), PROBES[name])
        print(json.dumps({"probe": name, **result}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
