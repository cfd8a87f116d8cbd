# SPDX-License-Identifier: Apache-2.0
"""``import deepcomm`` needs no GPU and does no work."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest

import deepcomm

if TYPE_CHECKING:
    from pathlib import Path

# Imports torch first, so that only what deepcomm adds is seen.
PROBE = """
import json, logging, os, sys, threading
import torch
environment, num_threads, modules = dict(os.environ), threading.active_count(), set(sys.modules)
acts = []
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
def watch(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & WRITES:
        acts.append(f"writes {args[0]}")
    elif event in ("subprocess.Popen", "os.fork", "os.system", "socket.__new__", "os.putenv"):
        acts.append(event)
sys.addaudithook(watch)
import deepcomm
print(json.dumps({
    "acts": acts,
    "environment": dict(os.environ) == environment,
    "threads": threading.active_count() - num_threads,
    "cuda": torch.cuda.is_initialized(),
    "handlers": len(logging.getLogger("deepcomm").handlers),
    "heavy": sorted({"cupy", "matplotlib", "mpi4py", "rich"} & (set(sys.modules) - modules)),
}))
"""
QUIET = {
    "acts": [], "environment": True, "threads": 0, "cuda": False, "handlers": 0, "heavy": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("elsewhere")
    # -B: writing byte code is Python's work, not ours.
    output = subprocess.run(
        [sys.executable, "-B", "-c", PROBE], cwd=folder, check=True, capture_output=True, text=True
    )
    return json.loads(output.stdout)


def test_import_does_no_work(facts: dict[str, Any]) -> None:
    assert facts == QUIET


def test_import_version_is_the_distributions() -> None:
    assert deepcomm.__version__ == version("deepcomm")
