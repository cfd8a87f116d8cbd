# SPDX-License-Identifier: Apache-2.0
"""The environment variables of deepcomm's Python, one function each; README.md lists them."""

from __future__ import annotations

import os
from pathlib import Path

from deepcomm.errors import InvalidArgument

__all__ = ["cache_dir", "nccl_include"]


def cache_dir() -> Path:
    """Return the folder in which deepcomm may keep files; it need not exist.

    Returns:
        ``DEEPCOMM_CACHE_DIR`` where that is set, else ``deepcomm`` in the user's cache folder.

    Raises:
        InvalidArgument: The variable is not set and the user has no home.
    """
    if chosen := os.environ.get("DEEPCOMM_CACHE_DIR"):
        return Path(chosen).absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).absolute() / "deepcomm"
    try:
        return Path.home() / ".cache" / "deepcomm"
    except RuntimeError:
        raise InvalidArgument(
            "DEEPCOMM_CACHE_DIR: expected a folder, as this user has no home, got nothing"
        ) from None


def nccl_include() -> Path | None:
    """Return the folder of NCCL's headers, ``DEEPCOMM_NCCL_INCLUDE``; None where it is not set.

    Raises:
        InvalidArgument: There is no such folder.
    """
    if not (chosen := os.environ.get("DEEPCOMM_NCCL_INCLUDE")):
        return None
    folder = Path(chosen).absolute()
    if not folder.is_dir():
        raise InvalidArgument(f"DEEPCOMM_NCCL_INCLUDE: expected a folder, got {chosen!r}")
    return folder
