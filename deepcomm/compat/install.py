# SPDX-License-Identifier: Apache-2.0
"""Let ``deep_ep`` mean the facades: in this process, or by ``PYTHONPATH`` in others.

The modules lie in a folder of their own inside this package, which is on nobody's path until it is
asked for: a real ``deep_ep`` is never hidden by installing deepcomm.
"""

from __future__ import annotations

import sys
from pathlib import Path

from deepcomm.errors import Error

__all__ = ["deep_ep_path", "install_as_deep_ep"]

MODULES = ("deep_ep", "deep_ep_cpp")


def deep_ep_path() -> str:
    """Return the folder that holds ``deep_ep`` and ``deep_ep_cpp``."""
    return str(Path(__file__).parent / "path")


def install_as_deep_ep() -> None:
    """Make ``import deep_ep`` find the facades in this process and in those that it spawns.

    Idempotent. Processes started in other ways than by ``multiprocessing`` take
    ``PYTHONPATH=$(deepcomm deep-ep-path)``.

    Raises:
        Error: Another ``deep_ep`` or ``deep_ep_cpp`` is imported already.
    """
    folder = deep_ep_path()
    for name in MODULES:
        origin = getattr(sys.modules.get(name), "__file__", None)
        if name in sys.modules and not str(origin).startswith(folder):
            raise Error(
                f"install_as_deep_ep: expected it before {name} is imported, got {name} of {origin}"
            )
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)
