# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer has nothing to say about the probes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.nvrtc, pytest.mark.gpu(1), pytest.mark.slow]

TESTS = Path(__file__).resolve().parents[1]
FOUND_SOMETHING = 86
NUM_PROBES = 6


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer of the CUDA toolkit")
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND_SOMETHING)]
    done = subprocess.run(
        [*command, sys.executable, "-m", "gpu.play", "1", "3"],
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    output = done.stdout + done.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device in this environment")
    assert done.returncode == 0, output[-4000:]
    assert output.count("launches hold") == NUM_PROBES
