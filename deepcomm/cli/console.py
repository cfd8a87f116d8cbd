# SPDX-License-Identifier: Apache-2.0
"""Terminal output: plain tables, and a progress bar where rich is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["note", "print_table", "progress"]

COLUMN_GAP = "  "


def note(message: str) -> None:
    """Print one line to the error stream: messages that are no result."""
    print(message, file=sys.stderr, flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column to the left, the others to the right.

    Args:
        header: Of each column; may have two lines.
        rows: Cells of each row, as many as ``header`` has.
    """
    first, second = zip(*(f"{head}\n".split("\n")[:2] for head in header), strict=True)
    heads = [first, second] if any(second) else [first]
    widths = [max(map(len, column)) for column in zip(*heads, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    for row in (*heads, rule, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print(COLUMN_GAP.join(cells).rstrip())


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar of ``total`` steps while the block runs; the block calls what it gets per step.

    Without rich, or where the error stream is no terminal, the title alone is printed.
    """
    if not (sys.stderr.isatty() and importlib.util.find_spec("rich")):
        note(title)
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
