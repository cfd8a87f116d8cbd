# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of overlap share: marks on streams, samples of all ranks, SMs left to others.

A sample is launched as a whole while the GPU is kept busy, so that hosts do not show in it; it is
repeated where they were late. Its figures are the maximum over the ranks, which begin together.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from deepcomm import Buffer, Event

WARM_UP = 4
MEETING_TOKENS = 4
MOST_RETRIES = 24
FIRST_BACKLOG_CYCLES = 4_000_000
LONGEST_BACKLOG_CYCLES = 1_000_000_000


@dataclass(frozen=True)
class Setting:
    """What is measured, the same for all ranks."""

    device: str
    num_tokens: int
    hidden: int
    num_experts: int
    num_topk: int
    num_sms: int
    gemm: tuple[int, int, int]
    dense: int
    intermediate: int
    repeats: int


@dataclass(frozen=True)
class Timing:
    """Microseconds of the slowest rank."""

    p50: float
    p50_again: float
    p95: float

    @classmethod
    def of_passes(cls, passes: list[list[float]]) -> Timing:
        first, again = (float(np.percentile(times, 50)) for times in passes)
        return cls(first, again, float(np.percentile(np.concatenate(passes), 95)))


# ---- Streams --------------------------------------------------------------------------------


class Mark:
    """A point of a stream (on CPUs: of time), to wait for and to measure from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._time = 0.0

    def record(self) -> Mark:
        if self._event is None:
            self._time = time.perf_counter()
        else:
            self._event.record(torch.cuda.current_stream(self._device))
        return self

    def synchronize(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def current_stream_wait(self) -> None:
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)

    def query(self) -> bool:
        return self._event is None or self._event.query()

    def us_since(self, earlier: Mark) -> float:
        """Both must be complete."""
        if self._event is None or earlier._event is None:
            return (self._time - earlier._time) * 1e6
        return earlier._event.elapsed_time(self._event) * 1e3


class Turn:
    """What an asynchronous operation waits for; marks on its stream when that has come."""

    def __init__(self, after: Event, device: torch.device) -> None:
        self._after = after
        self.begin = Mark(device)

    def synchronize(self) -> None:
        self._after.synchronize()
        self.begin.record()

    def current_stream_wait(self) -> None:
        self._after.current_stream_wait()
        self.begin.record()

    def query(self) -> bool:
        return self._after.query()


@contextlib.contextmanager
def leaving_sms(device: torch.device, num_sms: int) -> Iterator[None]:
    """Let GEMMs leave SMs to others; 0 asks for nothing.

    A GEMM of one block for each SM otherwise waits with its last blocks until the SMs of a
    communication kernel are free, or keeps such a kernel waiting. Only cuBLASLt can be told.
    """
    if num_sms == 0 or device.type != "cuda":
        yield
        return
    library = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch._C._set_sm_carveout_experimental(num_sms)
    try:
        yield
    finally:
        torch._C._set_sm_carveout_experimental(None)
        torch.backends.cuda.preferred_blas_library(library)


# ---- Samples --------------------------------------------------------------------------------


class Sample(Protocol):
    """Something to measure again and again."""

    def launch(self, start: Mark) -> None:
        """Launch everything, ``start`` being the last mark of the current stream."""

    def read(self) -> list[float]:
        """Return the figures of this rank, now that all is complete."""

    def accept(self, slowest: list[float]) -> bool:
        """Judge the figures of all ranks, on all alike; False: launch again."""


class Sampler:
    """Takes samples, all ranks together.

    A sample follows a dispatch of few tokens, which ends at about the same time on all ranks, as
    the exits of a barrier do not.
    """

    def __init__(self, buffer: Buffer, repeats: int) -> None:
        self._buffer = buffer
        self._repeats = repeats
        self._backlog_cycles = FIRST_BACKLOG_CYCLES
        config = buffer.config
        size = (MEETING_TOKENS, config.hidden)
        self._x = torch.zeros(size, dtype=torch.bfloat16, device=buffer.device)
        num_local = config.num_experts // buffer.num_ranks
        owned = torch.arange(0, config.num_experts, num_local, device=buffer.device)
        self._ids = owned[: config.num_topk].repeat(MEETING_TOKENS, 1)

    def take(self, sample: Sample) -> list[list[float]]:
        """Return the figures of each sample after the first few; collective."""
        taken: list[list[float]] = []
        for _ in range(WARM_UP + self._repeats + MOST_RETRIES):
            start = self._begin()
            sample.launch(start)
            is_late = self._on_gpu and start.query()
            self._synchronize()
            late, *figures = slowest([float(is_late), *sample.read()])
            if late:
                self._backlog_cycles = min(2 * self._backlog_cycles, LONGEST_BACKLOG_CYCLES)
            elif sample.accept(figures):
                taken.append(figures)
            if len(taken) == WARM_UP + self._repeats:
                return taken[WARM_UP:]
        raise RuntimeError(f"samples: expected at most {MOST_RETRIES} to be late or too short")

    def finish(self) -> None:
        """Raise what the last operations have found to be wrong; collective."""
        self._synchronize()
        self._meet()
        self._synchronize()
        dist.barrier()

    @property
    def _on_gpu(self) -> bool:
        return self._buffer.device.type == "cuda"

    def _begin(self) -> Mark:
        self._synchronize()
        dist.barrier()
        if self._on_gpu:
            torch.cuda._sleep(self._backlog_cycles)
        self._meet()
        return Mark(self._buffer.device).record()

    def _meet(self) -> None:
        capacity = self._buffer.num_ranks * MEETING_TOKENS
        self._buffer.dispatch(self._x, self._ids, num_recv_tokens=capacity)

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._buffer.device)


def slowest(figures: list[float]) -> list[float]:
    """Return the maximum of each figure over the ranks."""
    values = torch.tensor(figures, dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return [float(value) for value in values]


def time_in_turns(take: list[Callable[[], list[list[float]]]]) -> list[list[list[list[float]]]]:
    """Take the samples of each variant twice, in turns; return them by variant and pass."""
    passes = [[call() for call in take] for _ in range(2)]
    return [list(both) for both in zip(*passes, strict=True)]
