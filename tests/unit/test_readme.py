# SPDX-License-Identifier: Apache-2.0
"""The programs of the README and of PROTOCOLS.md run as they stand; .ci/run runs its commands."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
MAX_FIRST_PROGRAM_LINES = 10

PROTOCOLS = (ROOT / "csrc" / "cpu" / "PROTOCOLS.md").read_text()

PROGRAMS = [body for language, body in BLOCK.findall(README + PROTOCOLS) if language == "python"]


@pytest.mark.parametrize("index", range(len(PROGRAMS)))
def test_readme_program_runs(index: int, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAMS[index])
    result = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_readme_first_program_is_short() -> None:
    lines = [line for line in PROGRAMS[0].splitlines() if line.strip()]
    assert len(lines) <= MAX_FIRST_PROGRAM_LINES


def test_readme_programs_check_something() -> None:
    assert [program for program in PROGRAMS if not re.search(r"assert|print", program)] == []


def test_readme_has_two_one_line_commands_that_ci_finds() -> None:
    find = runpy.run_path(str(ROOT / ".ci" / "readme_command.py"))["command"]
    bench, test = find(README, "bench"), find(README, "test")
    assert "\n" not in bench + test
    assert "deepcomm bench" in bench
    assert "pytest" in test
    for command in (bench, test):
        assert "-c constraints/cpu.txt" in command
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_readme_links_point_at_files() -> None:
    targets = [target for target in LINK.findall(README) if "://" not in target]
    assert [target for target in targets if not (ROOT / target).exists()] == []
