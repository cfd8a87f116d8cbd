# SPDX-License-Identifier: Apache-2.0
"""The environment variables of deepcomm's Python, one function each; README.md lists them."""

from __future__ import annotations

import os
from pathlib import Path

from deepcomm.errors import InvalidArgument

__all__ = ["cache_dir"]


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
