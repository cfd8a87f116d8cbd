# SPDX-License-Identifier: Apache-2.0
"""Checks what an sdist and a wheel hold: `python .ci/check_distributions.py DIST_FOLDER`."""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
WHEEL_NEEDS = (
    r"deepcomm/__init__\.py",
    r"deepcomm/_C/__init__\.pyi",
    r"deepcomm/_C\..*\.so",
    r"deepcomm/compat/path/deep_ep/__init__\.py",
    r"deepcomm/compat/path/deep_ep/utils/event\.py",
    r"deepcomm/compat/path/deep_ep_cpp\.py",
    r"deepcomm/py\.typed",
    r"deepcomm/include/kernels/.*\.cuh",
    r"deepcomm/include/device/cuda/.*\.cuh",
    r"deepcomm-.*\.dist-info/licenses/LICENSE",
)
WHEEL_HOLDS_ONLY = r"deepcomm/|deepcomm-[^/]*\.dist-info/"
SDIST_FOLDERS = [
    ".ci",
    "benchmarks",
    "constraints",
    "csrc",
    "deepcomm",
    "docs",
    "examples",
    "tests",
]
SDIST_SUFFIXES = {".py", ".pyi", ".hpp", ".cpp", ".cuh", ".cu", ".typed", ".txt", ".md"}


def wheel_problems(names: list[str]) -> list[str]:
    """Return what is missing from the wheel and what does not belong there."""
    missing = [need for need in WHEEL_NEEDS if not any(re.fullmatch(need, n) for n in names)]
    foreign = [name for name in names if not re.match(WHEEL_HOLDS_ONLY, name)]
    return [f"wheel lacks {need}" for need in missing] + [f"wheel holds {n}" for n in foreign]


def sdist_problems(names: list[str]) -> list[str]:
    """Return the sources of the checkout that the sdist lacks, and built files that it holds."""
    inside = {name.partition("/")[2] for name in names}
    sources = [
        path.relative_to(ROOT).as_posix()
        for folder in SDIST_FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SDIST_SUFFIXES
    ]
    lacks = [f"sdist lacks {name}" for name in sources if name not in inside]
    return lacks + [f"sdist holds {name}" for name in inside if name.endswith((".so", ".pyc"))]


def main(folder: Path) -> int:
    """Print every problem and return the exit status."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        problems = wheel_problems(archive.namelist())
    with tarfile.open(sdist) as archive:
        problems += sdist_problems(archive.getnames())
    print("\n".join(problems) or f"{wheel.name} and {sdist.name} are complete")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
