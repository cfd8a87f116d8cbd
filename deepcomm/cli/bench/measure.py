# SPDX-License-Identifier: Apache-2.0
"""Timing: each operation once a round, in rotated order, after a barrier; maximum over ranks."""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from deepcomm.cli.console import progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deepcomm.cli.bench.operations import Operation

__all__ = ["Limits", "Timing", "measure"]

NS_PER_US = 1000
NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to measure: ``warmup`` rounds, then ``iters`` or what fits into ``max_seconds``."""

    warmup: int
    iters: int
    max_seconds: float


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of the slowest rank in each timed call."""

    samples_us: tuple[float, ...]

    @property
    def p50_us(self) -> float:
        """Median."""
        return self._percentile(50)

    @property
    def p95_us(self) -> float:
        """95th percentile."""
        return self._percentile(95)

    @property
    def p99_us(self) -> float:
        """99th percentile."""
        return self._percentile(99)

    def _percentile(self, percent: float) -> float:
        return float(np.percentile(self.samples_us, percent))


def measure(
    operations: Sequence[Operation], limits: Limits, device: torch.device, title: str | None
) -> dict[str, Timing]:
    """Time the operations; collective over the default process group.

    Args:
        operations: What to time; the same on all ranks, in the same order.
        limits: How long.
        device: Where the operations run; on a GPU its own events are the clock.
        title: Of the progress bar; None shows none.

    Returns:
        The timing of each operation by name, and of each of its steps by "name / step" where there
        are several.
    """
    total = limits.warmup + limits.iters
    rounds: list[list[int]] = []
    deadline = 0.0
    with progress(title, total) if title else contextlib.nullcontext(_nothing) as advance:
        for index in range(-limits.warmup, limits.iters):
            if index == 0:
                deadline = time.monotonic() + limits.max_seconds
            if index > 0 and _agree(time.monotonic() > deadline):
                break
            samples = _round(operations, index, device)
            if index >= 0:
                rounds.append(samples)
            advance()
    slowest = torch.tensor(rounds, dtype=torch.int64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    columns = (slowest.double() / NS_PER_US).t().tolist()
    names = [name for operation in operations for name in _names(operation)]
    return {name: Timing(tuple(column)) for name, column in zip(names, columns, strict=True)}


class _HostClock:
    """Marks on the host, for operations that are complete when they return."""

    def __init__(self) -> None:
        self._marks: list[int] = []

    def mark(self) -> None:
        """Remember now."""
        self._marks.append(time.perf_counter_ns())

    def spans(self) -> list[int]:
        """Return the nanoseconds between the marks."""
        return [after - before for before, after in itertools.pairwise(self._marks)]


class _CudaClock:
    """Marks in the current stream: a span ends when the device has done the work."""

    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """Remember when the device gets here."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)

    def spans(self) -> list[int]:
        """Return the nanoseconds between the marks, once the device has passed them."""
        self._marks[-1].synchronize()
        return [
            round(before.elapsed_time(after) * NS_PER_MS)
            for before, after in itertools.pairwise(self._marks)
        ]


def _round(operations: Sequence[Operation], index: int, device: torch.device) -> list[int]:
    """Time each operation once, starting with another one each round; return columns in order."""
    first = index % len(operations)
    order = [*range(first, len(operations)), *range(first)]
    columns: dict[int, list[int]] = {}
    for place in order:
        columns[place] = _time(operations[place], device)
    return [value for place in range(len(operations)) for value in columns[place]]


def _time(operation: Operation, device: torch.device) -> list[int]:
    """Return the nanoseconds of the whole operation and, if there are several, of each step."""
    result = None
    clock: _HostClock | _CudaClock = _HostClock()
    if device.type == "cuda":
        clock = _CudaClock()
        torch.cuda.synchronize(device)
    dist.barrier()
    clock.mark()
    for _, step in operation.steps:
        result = step(result)
        clock.mark()
    parts = clock.spans()
    # Freed after the last mark: giving a view back is not part of the call.
    del result
    whole = sum(parts) // operation.repeats
    return [whole, *(parts if len(parts) > 1 else [])]


def _names(operation: Operation) -> list[str]:
    steps = [f"{operation.name} / {name}" for name, _ in operation.steps]
    return [operation.name, *(steps if len(steps) > 1 else [])]


def _agree(stop: bool) -> bool:
    """Return rank 0's opinion on every rank."""
    opinion = torch.tensor([int(stop)])
    dist.broadcast(opinion, src=0)
    return bool(opinion.item())


def _nothing() -> None:
    pass
