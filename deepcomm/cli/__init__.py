# SPDX-License-Identifier: Apache-2.0
"""The ``deepcomm`` command: its sub-commands and how they end."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from deepcomm.cli import bench, deep_ep_path, doctor
from deepcomm.cli import compile as compile_command
from deepcomm.cli.environment import package_version

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: Arguments after the program's name; None takes them from the process.

    Returns:
        0 on success, 1 when the command failed, 2 on a wrong argument, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="deepcomm", description="Expert-parallel dispatch and combine."
    )
    parser.add_argument("--version", action="version", version=f"deepcomm {package_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    bench.add_parser(commands)
    compile_command.add_parser(commands)
    deep_ep_path.add_parser(commands)
    doctor.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options, arguments))
    except KeyboardInterrupt:
        return 130
