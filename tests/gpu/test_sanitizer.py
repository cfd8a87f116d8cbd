# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer has nothing to say about the probes, nor about operations."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu(1)

TESTS = Path(__file__).resolve().parents[1]
FOUND_SOMETHING = 86
NUM_PROBES = {1: 6, 2: 7}  # a claim needs two ranks
NUM_OPERATIONS = 5  # layouts, those of low latency apart
# Without space behind it, an allocation that is overrun may end where another one begins. Which
# kinds of memory there are is found out by asking the driver, which refuses some.
OPTIONS = {"memcheck": ("--padding", "4096", "--report-api-errors", "no")}


def sanitize(tool: str, *what: str) -> subprocess.CompletedProcess[str]:
    """Play something under a tool; skips where the tool cannot run."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer of the CUDA toolkit")
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND_SOMETHING)]
    command += ["--target-processes", "all"]
    done = subprocess.run(
        [*command, *OPTIONS.get(tool, ()), sys.executable, "-m", "gpu.play", *what],
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this device in this environment")
    return done


@pytest.mark.parametrize("num_ranks", NUM_PROBES)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_sanitizer_finds_nothing(tool: str, num_ranks: int) -> None:
    done = sanitize(tool, str(num_ranks), "3")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    assert output.count("launches hold") == NUM_PROBES[num_ranks]


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.gpu(2))])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer_finds_nothing_in_operations(tool: str, num_ranks: int) -> None:
    done = sanitize(tool, "operations", str(num_ranks))
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[:6000] + output[-2000:]
    assert output.count("results hold") == NUM_OPERATIONS


def test_sanitizer_finds_a_planted_overrun() -> None:
    done = sanitize("memcheck", "0", "3")
    output = done.stdout + done.stderr
    assert done.returncode == FOUND_SOMETHING, output[-4000:]
    assert "Invalid __global__ write of size 4 bytes" in output
    assert "by thread (4,0,0)" in output, "the first thread that writes behind the heap"
    assert "claim.cuh" in output, "the kernel's lines are known"
