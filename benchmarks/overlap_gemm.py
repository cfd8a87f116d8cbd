# SPDX-License-Identifier: Apache-2.0
"""GEMMs beside dispatches or combines that run back to back: what each costs the other.

The communication runs first; the GEMMs follow when its first operation has ended, and it goes on
after them. An operation's time beside GEMMs is that of those which began from just before the GEMMs
until just after them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from overlap_timing import Mark, Sampler, Setting, Timing, Turn, leaving_sms, time_in_turns

from deepcomm import Buffer, Event
from deepcomm.fp8 import quantize_fp8
from deepcomm.testing.routing import RoutingShape, make_routing

NUM_PAIRS = 2
FIRST_NUM_OPS = 16
TOLERANCE = 0.05

Operation = Callable[[Event], Event]


@dataclass(frozen=True)
class Variant:
    """What runs; ``leaves_sms``: the GEMMs have been told to leave the communication's SMs."""

    name: str
    has_gemms: bool
    operation: str | None
    leaves_sms: bool = False


VARIANTS = (
    Variant("GEMMs alone", True, None),
    Variant("GEMMs alone, leaving SMs", True, None, leaves_sms=True),
    Variant("dispatches alone", False, "dispatch"),
    Variant("combines alone", False, "combine"),
    Variant("GEMMs beside dispatches", True, "dispatch"),
    Variant("GEMMs beside combines", True, "combine"),
    Variant("GEMMs beside dispatches, leaving SMs", True, "dispatch", leaves_sms=True),
    Variant("GEMMs beside combines, leaving SMs", True, "combine", leaves_sms=True),
)


@dataclass(frozen=True)
class Figure:
    """One variant; slowdowns are fractions more than alone, by the medians.

    Attributes:
        gemms: Of the whole chain.
        operation: Of one operation.
        limit: What a slowdown of the GEMMs may be: the share of the SMs given away, and 5 %.
    """

    name: str
    gemms: Timing | None
    operation: Timing | None
    gemm_slowdown: float | None = None
    operation_slowdown: float | None = None
    limit: float | None = None

    @property
    def is_met(self) -> bool | None:
        if self.gemm_slowdown is None or self.limit is None:
            return None
        return self.gemm_slowdown <= self.limit


class GemmChain:
    """BF16 GEMMs there and back, each on the result of the one before."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        m, n, k = setting.gemm
        self._a = torch.randn(m, k, device=device).bfloat16()
        self._there = (torch.randn(k, n, device=device) * k**-0.5).bfloat16()
        self._back = (torch.randn(n, k, device=device) * n**-0.5).bfloat16()
        self._b, self._c = self._a.new_empty(m, n), self._a.new_empty(m, k)

    def run(self) -> None:
        source = self._a
        for _ in range(NUM_PAIRS):
            torch.mm(source, self._there, out=self._b)
            torch.mm(self._b, self._back, out=self._c)
            source = self._c


def make_operations(buffer: Buffer, setting: Setting) -> dict[str, Operation]:
    """Return asynchronous operations for which no host waits, by name."""
    device = buffer.device
    shape = RoutingShape(buffer.num_ranks, setting.num_experts, setting.num_topk)
    routed = make_routing("uniform", shape, 0)(buffer.rank, setting.num_tokens)
    ids, weights = routed.topk_idx.to(device), routed.topk_weights.to(device)
    rows = torch.randn(setting.num_tokens, setting.hidden, device=device).bfloat16()
    x, capacity = quantize_fp8(rows), buffer.num_ranks * setting.num_tokens
    how: dict[str, Any] = {"num_recv_tokens": capacity, "async_op": True}
    handle = buffer.dispatch(x, ids, weights, num_recv_tokens=capacity).handle
    y = torch.randn(capacity, setting.hidden, device=device).bfloat16()
    out = torch.empty_like(rows)

    def dispatch(after: Event) -> Event:
        return event_of(buffer.dispatch(x, ids, weights, previous_event=after, **how))

    def combine(after: Event) -> Event:
        result = buffer.combine(y, handle, out=out, previous_event=after, async_op=True)
        return event_of(result)

    return {"dispatch": dispatch, "combine": combine}


def event_of(output: Any) -> Event:
    """Return an operation's event; views of its rows, which nobody reads, go at once."""
    event: Event | None = output.event
    assert event is not None
    return event


class Beside:
    """One variant as a sample: us of the GEMMs, us of an operation, operations that it takes."""

    def __init__(
        self, variant: Variant, chain: GemmChain, operation: Operation | None, buffer: Buffer
    ) -> None:
        self._chain = chain if variant.has_gemms else None
        self._operation = operation
        self._device = buffer.device
        num_sms = buffer.config.num_sms or 0
        self._num_sms_left = num_sms if variant.leaves_sms else 0
        self._num_ops = 0 if operation is None else FIRST_NUM_OPS
        self._turns: list[Mark] = []
        self._span: tuple[Mark, Mark] | None = None

    def launch(self, start: Mark) -> None:
        self._start, self._turns = start, []
        events: list[Event] = [start]
        for _ in range(self._num_ops):
            turn = Turn(events[-1], self._device)
            assert self._operation is not None
            events.append(self._operation(turn))
            self._turns.append(turn.begin)
        if self._chain is None:
            return
        events[min(1, self._num_ops)].current_stream_wait()
        begin = Mark(self._device).record()
        with leaving_sms(self._device, self._num_sms_left):
            self._chain.run()
        self._span = begin, Mark(self._device).record()

    def read(self) -> list[float]:
        turns = [turn.us_since(self._start) for turn in self._turns]
        if self._span is None:
            return [0.0, (turns[-1] - turns[0]) / (len(turns) - 1), self._num_ops]
        begin, end = (mark.us_since(self._start) for mark in self._span)
        if not turns:
            return [end - begin, 0.0, 0]
        if self._device.type != "cuda":  # nothing runs beside anything
            return [end - begin, (turns[-1] - turns[0]) / (len(turns) - 1), self._num_ops]
        if turns[-1] < end:
            wanted = 1.2 * self._num_ops * (end - turns[0]) / (turns[-1] - turns[0])
            return [end - begin, 0.0, math.ceil(wanted) + 1]
        first = max(i for i, turn in enumerate(turns) if turn <= begin)
        last = min(i for i, turn in enumerate(turns) if turn >= end)
        return [end - begin, (turns[last] - turns[first]) / (last - first), self._num_ops]

    def accept(self, slowest: list[float]) -> bool:
        wanted = int(slowest[-1])
        is_enough, self._num_ops = wanted == self._num_ops, wanted
        return is_enough


def figures_of(samples: list[list[list[list[float]]]], limit: float) -> list[Figure]:
    """Compare the variants with what runs alone."""
    figures: list[Figure] = []
    alone: dict[str, float] = {}
    for variant, passes in zip(VARIANTS, samples, strict=True):
        timings = [
            Timing.of_passes([[figures[column] for figures in taken] for taken in passes])
            for column in range(2)
        ]
        gemms = timings[0] if variant.has_gemms else None
        operation = timings[1] if variant.operation else None
        if gemms and operation and variant.operation:
            slower = gemms.p50 / alone["gemms"] - 1, operation.p50 / alone[variant.operation] - 1
            figures.append(Figure(variant.name, gemms, operation, *slower, limit))
            continue
        if operation and variant.operation:
            alone[variant.operation] = operation.p50
        if gemms:
            alone.setdefault("gemms", gemms.p50)
        figures.append(Figure(variant.name, gemms, operation))
    return figures


def measure_gemms(buffer: Buffer, setting: Setting) -> list[Figure]:
    """Measure all variants; collective, and the same on all ranks."""
    chain = GemmChain(setting, buffer.device)
    operations = make_operations(buffer, setting)
    sampler = Sampler(buffer, setting.repeats)

    def sampling(variant: Variant) -> Callable[[], list[list[float]]]:
        operation = operations.get(variant.operation or "")
        beside = Beside(variant, chain, operation, buffer)
        return lambda: sampler.take(beside)

    samples = time_in_turns([sampling(variant) for variant in VARIANTS])
    sampler.finish()
    return figures_of(samples, sms_given_away(buffer) + TOLERANCE)


def sms_given_away(buffer: Buffer) -> float:
    """Return the share of the GPU's SMs that an operation takes."""
    if buffer.device.type != "cuda":
        return 0.0
    all_sms = torch.cuda.get_device_properties(buffer.device).multi_processor_count
    return (buffer.config.num_sms or 0) / all_sms
