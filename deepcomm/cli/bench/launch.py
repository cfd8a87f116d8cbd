# SPDX-License-Identifier: Apache-2.0
"""Starting the ranks of a benchmark, and ending all of them when one fails."""

from __future__ import annotations

import datetime
import json
import logging
import os
import signal
import tempfile
import time
import traceback
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
EXPECTED = (Error, WrongResultError)
"""Errors whose message says everything; of any other the traceback is shown."""


def launch(config: BenchConfig) -> int:
    """Run the benchmark and return the command's exit status."""
    if under_torchrun():
        return _run_under_torchrun(config)
    # Its warnings about the processes it ends would hide the one message that matters.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    # fork starts in a fraction of the time, but a CUDA context does not survive it.
    method = "fork" if config.backend == "cpu" else "spawn"
    with tempfile.TemporaryDirectory(prefix="deepcomm-bench-") as name:
        folder = Path(name)
        context = start_processes(  # type: ignore[no-untyped-call]
            _run_spawned, (config, folder), nprocs=config.ranks, join=False, start_method=method
        )
        try:
            while not context.join():
                pass
        except (ProcessRaisedException, ProcessExitedException):
            exit_codes = [process.exitcode for process in context.processes]
            note(f"deepcomm bench: {_first_cause(folder, exit_codes)}")
            return 1
    return 0


def _run_under_torchrun(config: BenchConfig) -> int:
    dist.init_process_group("gloo", timeout=GROUP_TIMEOUT)
    try:
        run_rank(config, int(os.environ.get("LOCAL_RANK", "0")))
    except EXPECTED as error:
        note(f"deepcomm bench: rank {dist.get_rank()}: {error}")
        return 1
    dist.destroy_process_group()
    return 0


def _run_spawned(rank: int, config: BenchConfig, folder: Path) -> None:
    try:
        # Ranks of one host meet on its loopback, whatever the host's name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=config.ranks,
            timeout=GROUP_TIMEOUT,
        )
        run_rank(config, rank)
        dist.destroy_process_group()
    except Exception as error:
        text = str(error) if isinstance(error, EXPECTED) else traceback.format_exc().strip()
        record = {"when": time.monotonic(), "text": f"rank {rank}: {text}"}
        # Renamed when whole: this process may be ended while it writes.
        part = folder / f"part-{rank}"
        part.write_text(json.dumps(record))
        part.rename(folder / f"failure-{rank}.json")
        raise


def _first_cause(folder: Path, exit_codes: list[int | None]) -> str:
    """Return what went wrong first: peers of a rank that failed fail for that reason."""
    for rank, code in enumerate(exit_codes):
        # SIGTERM is how the remaining ranks were ended.
        if code is not None and code < 0 and code != -signal.SIGTERM:
            return f"rank {rank} died of {signal.Signals(-code).name}"
    records = [json.loads(path.read_text()) for path in folder.glob("failure-*.json")]
    if records:
        return str(min(records, key=lambda record: record["when"])["text"])
    return f"ranks ended with status {exit_codes}"
