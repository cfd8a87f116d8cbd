# SPDX-License-Identifier: Apache-2.0
"""Every probe kernel between two processes, a device each, that map each other's memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from gpu.probes import PROBES

pytestmark = pytest.mark.gpu(2)

TESTS = Path(__file__).resolve().parents[1]


def test_probes_hold_between_two_processes() -> None:
    command = [sys.executable, "-m", "gpu.processes", "100"]
    done = subprocess.run(
        command, cwd=TESTS, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.count("launches hold") == len(PROBES)
