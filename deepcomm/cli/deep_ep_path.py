# SPDX-License-Identifier: Apache-2.0
"""``deepcomm deep-ep-path``: the folder that lets ``import deep_ep`` find deepcomm's facades."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deepcomm.compat.install import deep_ep_path

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add ``deep-ep-path`` to the sub-commands."""
    parser = commands.add_parser(
        "deep-ep-path",
        help="print the folder to put on PYTHONPATH for programs written against DeepEP",
        description="Prints the folder that holds deep_ep and deep_ep_cpp: "
        "PYTHONPATH=$(deepcomm deep-ep-path) python program.py",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    del options, argv
    print(deep_ep_path())
    return 0
