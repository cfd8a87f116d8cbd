# SPDX-License-Identifier: Apache-2.0
"""The programs of docs/migrating-from-deepep.md run as they stand, and its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "migrating-from-deepep.md"
TEXT = GUIDE.read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
PROGRAMS = [body for language, body in BLOCK.findall(TEXT) if language == "python"]


@pytest.mark.parametrize("index", range(len(PROGRAMS)))
def test_guide_program_runs(index: int, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAMS[index])
    result = subprocess.run(
        [sys.executable, program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_guide_links_point_at_files() -> None:
    targets = [target for target in LINK.findall(TEXT) if "://" not in target]
    assert targets
    assert [target for target in targets if not (GUIDE.parent / target).exists()] == []


def test_guide_names_every_argument_that_is_refused() -> None:
    """What raises NotImplementedError in the facades is in the table of what is missing."""
    sources = (Path(__file__).parents[2] / "deepcomm" / "compat").glob("*.py")
    raised = re.findall(
        r'NotImplementedError\(\s*f?"([\w]+)', "".join(path.read_text() for path in sources)
    )
    missing = TEXT.partition("## Missing")[2]
    named = {"overlap", "dispatch", "psum_num_recv_tokens_per_scaleup_rank"}
    assert set(raised) >= {"use_logfmt", "use_nvfp4", "num_cpu_bytes", "get_local_buffer_tensor"}
    assert [word for word in raised if word not in missing and word not in named] == []
