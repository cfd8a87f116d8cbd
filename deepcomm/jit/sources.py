# SPDX-License-Identifier: Apache-2.0
"""Where the kernel sources are, and which of them a kernel includes."""

from __future__ import annotations

import re
from pathlib import Path

from deepcomm.errors import InternalError

__all__ = ["collect", "source_root"]

PACKAGE = Path(__file__).resolve().parents[1]
ROOTS = (PACKAGE / "include", PACKAGE.parent / "csrc")
"""Of an installed package, and of a checkout that is imported in place."""

INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
HOST_ONLY = ("device/emu/", "emu/")
"""The emulator's half of the device layer: named by its sources, never seen by NVRTC."""


def source_root() -> Path:
    """Return the folder from which project headers are named.

    Raises:
        InternalError: The package was installed without its kernel sources.
    """
    for root in ROOTS:
        if (root / "kernels").is_dir():
            return root
    raise InternalError(f"kernel sources: expected one of {', '.join(map(str, ROOTS))}, got none")


def collect(root: Path, source: str) -> dict[str, str]:
    """Return name and text of a source and of all project headers that it includes, sorted.

    A missing file is left out: the compiler reports it with the line that includes it.
    """
    found: dict[str, str] = {}
    open_names = [source]
    while open_names:
        name = open_names.pop()
        path = root / name
        if name in found or name.startswith(HOST_ONLY) or not path.is_file():
            continue
        found[name] = path.read_text()
        open_names += INCLUDE.findall(found[name])
    return dict(sorted(found.items()))
