# SPDX-License-Identifier: Apache-2.0
"""``benchmarks/soak.py`` without GPUs: right results pass, wrong ones do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ("--device", "cpu", "--tokens", "12", "--hidden", "256", "--experts", "16", "--topk", "4")
AMOUNTS = ("--low-latency", "20", "--high-throughput", "60")
WEIGHTED = "terms = weights[..., None] * terms"


def soak(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "soak.py"), *SMALL, *AMOUNTS]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=100, cwd=BENCHMARKS.parent
    )


def test_soak_finds_nothing_wrong() -> None:
    done = soak(BENCHMARKS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "LowLatencySoak: 20 operations right" in done.stderr
    assert "HighThroughputSoak: 6" in done.stderr


def test_soak_finds_a_wrong_sum(tmp_path: Path) -> None:
    (tmp_path / "soak.py").write_text((BENCHMARKS / "soak.py").read_text())
    truth = (BENCHMARKS / "soak_truth.py").read_text()
    assert WEIGHTED in truth
    (tmp_path / "soak_truth.py").write_text(truth.replace(WEIGHTED, "pass"))
    done = soak(tmp_path)
    assert done.returncode != 0
    assert "wrong in the last of" in done.stderr
