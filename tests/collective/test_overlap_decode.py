# SPDX-License-Identifier: Apache-2.0
"""The example of two micro-batches runs, gives the same bits either way, and draws its picture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG"


def test_example_overlaps_two_micro_batches(tmp_path: Path) -> None:
    picture = tmp_path / "timeline.png"
    command = [sys.executable, str(ROOT / "examples" / "overlap_decode.py"), "--plot", str(picture)]
    small = ["--hidden", "64", "--tokens", "4", "--layers", "2", "--repeats", "3"]
    done = subprocess.run(
        [*command, *small], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for name in ("one after the other", "overlapped", "computation alone", "communication alone"):
        assert f"{name}: " in done.stdout
    assert picture.read_bytes().startswith(PNG)
