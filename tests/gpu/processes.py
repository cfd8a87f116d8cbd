# SPDX-License-Identifier: Apache-2.0
"""A rank a process, a device each: ``python -m gpu.processes REPEATS``.

The processes map each other's heaps by CUDA IPC and keep step over a pipe.
"""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from multiprocessing.connection import Connection

import numpy as np
from gpu import launch
from gpu.launch import Rank, World
from gpu.probes import PROBES, Setup, run_probe

MEET_LIMIT_S = 60.0


def receive(connection: Connection) -> bytes:
    if not connection.poll(MEET_LIMIT_S):
        raise TimeoutError(f"the other rank said nothing for {MEET_LIMIT_S} s")
    return connection.recv_bytes()


def make_world(rank: int, connection: Connection) -> World:
    """Share this rank's heap with the other process and map that one's."""
    cupy, runtime = launch.cupy, launch.runtime
    cupy.cuda.Device(rank).use()
    memory = cupy.cuda.Memory(launch.HEAP_BYTES)
    connection.send_bytes(runtime.ipcGetMemHandle(memory.ptr))
    peer_base = runtime.ipcOpenMemHandle(receive(connection))
    bases = (memory.ptr, peer_base) if rank == 0 else (peer_base, memory.ptr)
    return World(bases, (Rank.make(rank, rank, memory, memory.ptr),))


def play_rank(rank: int, connection: Connection, repeats: int) -> None:
    """Play every probe with the other process; send what went wrong, at the end, or nothing."""

    def meet() -> None:
        connection.send_bytes(b"here")
        word = receive(connection)
        if word != b"here":
            raise RuntimeError(f"the other rank: {word.decode()}")

    try:
        world = make_world(rank, connection)
        meet()
        for name, probe in PROBES.items():
            for seed in range(repeats):
                run_probe(Setup(world, np.random.default_rng(seed)), probe, meet)
            if rank == 0:
                print(f"{name}: {repeats} launches hold", flush=True)  # noqa: T201
        meet()  # the heap stays mapped until both are done
    except BaseException:
        connection.send_bytes(b"failed: " + traceback.format_exc().encode())
        raise


def main() -> None:
    repeats = int(sys.argv[1])
    context = multiprocessing.get_context("spawn")
    ends = context.Pipe()
    ranks = [
        context.Process(target=play_rank, args=(rank, ends[rank], repeats)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        if process.exitcode is None:
            process.kill()
    raise SystemExit(0 if codes == [0, 0] else f"exit codes {codes}")


if __name__ == "__main__":
    main()
