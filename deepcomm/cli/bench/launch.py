# SPDX-License-Identifier: Apache-2.0
"""Starting the ranks of a benchmark, and ending all of them when one fails."""

from __future__ import annotations

import datetime
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.multiprocessing.spawn import (
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from deepcomm.cli.bench.args import under_torchrun
from deepcomm.cli.bench.worker import WrongResultError, run_rank
from deepcomm.cli.console import note
from deepcomm.errors import Error

if TYPE_CHECKING:
    from deepcomm.cli.bench.args import BenchConfig

__all__ = ["launch"]

GROUP_TIMEOUT = datetime.timedelta(minutes=5)


def launch(config: BenchConfig) -> int:
    """Run the benchmark and return the command's exit status."""
    if under_torchrun():
        return _run_under_torchrun(config)
    # Its warnings about the processes it ends would hide the one message that matters.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    # fork starts in a fraction of the time, but a CUDA context does not survive it.
    method = "fork" if config.backend == "cpu" else "spawn"
    with tempfile.TemporaryDirectory(prefix="deepcomm-bench-") as folder:
        try:
            start_processes(  # type: ignore[no-untyped-call]
                _run_spawned, (config, folder), nprocs=config.ranks, start_method=method
            )
        except ProcessRaisedException as error:
            _report(error.error_index, str(error))
            return 1
        except ProcessExitedException as error:
            note(f"deepcomm bench: rank {error.error_index} died: {error}")
            return 1
    return 0


def _run_under_torchrun(config: BenchConfig) -> int:
    dist.init_process_group("gloo", timeout=GROUP_TIMEOUT)
    try:
        run_rank(config, int(os.environ.get("LOCAL_RANK", "0")))
    except (Error, WrongResultError) as error:
        note(f"deepcomm bench: rank {dist.get_rank()}: {error}")
        return 1
    dist.destroy_process_group()
    return 0


def _run_spawned(rank: int, config: BenchConfig, folder: str) -> None:
    # Ranks of one host meet on its loopback, whatever the host's name resolves to.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{Path(folder) / 'store'}",
        rank=rank,
        world_size=config.ranks,
        timeout=GROUP_TIMEOUT,
    )
    run_rank(config, rank)
    dist.destroy_process_group()


def _report(rank: int, text: str) -> None:
    """Print what a rank raised: the message of an expected error, the traceback of any other."""
    expected = (
        f"{Error.__module__}.",
        f"{WrongResultError.__module__}.{WrongResultError.__name__}",
    )
    lines = text.strip().splitlines()
    for place, line in enumerate(lines):
        if line.startswith(expected):
            message = "\n".join([line.partition(": ")[2], *lines[place + 1 :]])
            note(f"deepcomm bench: rank {rank}: {message}")
            return
    note(f"deepcomm bench: rank {rank} failed:\n{text.strip()}")
