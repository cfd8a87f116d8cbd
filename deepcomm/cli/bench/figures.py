# SPDX-License-Identifier: Apache-2.0
"""From times to figures: bandwidths, speed-ups, multiples of a plain copy; bytes itemised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepcomm.cli.bench.operations import Kind, row_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deepcomm.cli.bench.measure import Timing
    from deepcomm.cli.bench.operations import Operation
    from deepcomm.cli.bench.workload import Workload
    from deepcomm.types import BufferStats

__all__ = ["FORMULA", "Contenders", "Figure", "Result", "Traffic", "make_figures"]

FORMULA = {
    "rows": "one for each (token, rank that owns at least one of its experts), whatever the layout",
    "row_bytes BF16": "H * 2",
    "row_bytes FP8": "H + ceil(H / 128) * 4: elements and FP32 scales",
    "wire_gbps": "rows that crossed to another rank * row_bytes / R / p50",
    "deepep_gbps": "all rows, rank-local ones included, * row_bytes / R / p50",
    "not counted": "K ids of 4 bytes and K weights of 4 bytes a row, counts, flags",
    "memcpy": "each rank copies the bytes it receives, all at once, one thread, warm buffers; "
    "mean of back-to-back copies of 128 MiB in all, of 1000 where that is less",
    "time": "maximum over ranks of each call",
}
"""How each figure is computed."""

NS_PER_US = 1000.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Rows that one dispatch moves over all ranks, or one combine moves back.

    Attributes:
        rows: All of them.
        rows_remote: Those that cross to another rank.
        num_ranks: R.
    """

    rows: int
    rows_remote: int
    num_ranks: int

    @classmethod
    def of(cls, workload: Workload) -> Traffic:
        """Count the rows of a workload."""
        between = workload.rows_between
        rows = int(between.sum())
        return cls(rows, rows - int(between.diagonal().sum()), workload.config.ranks)


@dataclass(frozen=True, slots=True)
class Contenders:
    """All operations of one number of tokens."""

    ours: Sequence[Operation]
    baseline: Sequence[Operation]
    copies: Sequence[Operation]


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report; a step of an operation has nothing but its timing.

    Attributes:
        operation: Name of the operation, or of a step of it.
        timing: Of it.
        wire_gbps: Mean over ranks, 1e9 bytes a second; see ``FORMULA``.
        deepep_gbps: Likewise.
        baseline: Timing of the baseline's operation of the same kind, if one runs.
        memcpy: Timing of the plain copy.
    """

    operation: str
    timing: Timing
    wire_gbps: float | None = None
    deepep_gbps: float | None = None
    baseline: Timing | None = None
    memcpy: Timing | None = None

    @property
    def speedup(self) -> float | None:
        """Median of the baseline divided by ours."""
        return self.baseline.p50_us / self.timing.p50_us if self.baseline else None

    @property
    def memcpy_multiple(self) -> float | None:
        """Our median divided by that of the plain copy."""
        return self.timing.p50_us / self.memcpy.p50_us if self.memcpy else None


@dataclass(frozen=True, slots=True)
class Result:
    """All about one number of tokens a rank.

    Attributes:
        tokens: T.
        traffic: Rows moved.
        figures: Lines of the report.
        timings: Of every operation, the baseline's and the copies' included, by name.
        counters: What one BF16 dispatch added to rank 0's ``Buffer.stats()``.
        explanation: Rank 0's ``Buffer.explain()``.
    """

    tokens: int
    traffic: Traffic
    figures: tuple[Figure, ...]
    timings: Mapping[str, Timing]
    counters: BufferStats
    explanation: str


def make_figures(
    contenders: Contenders, timings: Mapping[str, Timing], traffic: Traffic, hidden: int
) -> tuple[Figure, ...]:
    """Compare each of our operations with the others of its kind."""
    baseline = {operation.kind: timings[operation.name] for operation in contenders.baseline}
    copies = {operation.kind: timings[operation.name] for operation in contenders.copies}
    copies[Kind.CACHED_DISPATCH] = copies[Kind.DISPATCH]
    figures = []
    for operation in contenders.ours:
        timing = timings[operation.name]
        bytes_per_row = row_bytes(operation.kind, hidden) / traffic.num_ranks
        per_us = bytes_per_row / NS_PER_US / timing.p50_us
        figures.append(
            Figure(
                operation=operation.name,
                timing=timing,
                wire_gbps=traffic.rows_remote * per_us,
                deepep_gbps=traffic.rows * per_us,
                baseline=baseline.get(operation.kind),
                memcpy=copies[operation.kind],
            )
        )
        steps = [name for name in timings if name.startswith(f"{operation.name} / ")]
        figures += [Figure(name, timings[name]) for name in steps]
    return tuple(figures)
