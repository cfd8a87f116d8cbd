# SPDX-License-Identifier: Apache-2.0
"""One training step of two micro-batches, in sequence and with communication beside compute.

A micro-batch goes through a residual block of two GEMMs (in the place of attention) and a residual
expert layer: dispatch in BF16, two linear layers over the received rows, weighted by what the
router gives to this rank's experts, combine. The loss is half the sum of squares of the results, so
that backward starts from them. The backward of a combine is the dispatch of its handle, and the
reverse. Gradients of the weights are summed over the micro-batches in their order, both ways alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from overlap_timing import Mark, Sampler, Setting, Timing, Turn, leaving_sms, time_in_turns
from timeline import Span, Timeline
from torch.nn.functional import silu

from deepcomm import Buffer, CombineOutput, DispatchOutput, Event, functional
from deepcomm.testing.routing import RoutingShape, make_routing

NUM_MICRO_BATCHES = 2
NUM_GENERATIONS = 2 * NUM_MICRO_BATCHES + 1
"""Every dispatch of a step keeps its views, in forward for the gradients of the weights."""

CHECKED_TOKENS = 64
MOST_DIFFERENCE = 0.02
BACKWARD = ("dispatch grad", "experts grad", "combine grad", "dense grad")
CHAIN = ("dense", "dispatch", "experts", "combine", *BACKWARD)

IN_SEQUENCE = tuple((name, index) for index in range(NUM_MICRO_BATCHES) for name in CHAIN)
OVERLAPPED = (
    ("dense", 0),
    ("dispatch", 0),
    ("dense", 1),
    ("dispatch", 1),
    ("experts", 0),
    ("combine", 0),
    ("dispatch grad", 0),
    ("experts", 1),
    ("combine", 1),
    ("dispatch grad", 1),
    ("experts grad", 0),
    ("combine grad", 0),
    ("experts grad", 1),
    ("combine grad", 1),
    ("dense grad", 0),
    ("dense grad", 1),
)


@dataclass(frozen=True)
class Way:
    """How a step is run; ``leaves_sms``: the GEMMs are told to leave the communication's SMs."""

    name: str
    overlaps: bool
    leaves_sms: bool = False


WAYS = (
    Way("in sequence", overlaps=False),
    Way("overlapped", overlaps=True),
    Way("overlapped, GEMMs leave SMs", overlaps=True, leaves_sms=True),
)


@dataclass(frozen=True)
class Figure:
    """Steps of one way.

    Attributes:
        speedup: Over the sequence, by the medians.
        hidden: Time saved, as a fraction of the time of the communication in the sequence.
    """

    name: str
    step: Timing
    speedup: float
    hidden: float


@dataclass(eq=False)
class MicroBatch:
    """What one micro-batch brings, and what its pieces leave for those after them."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    ready: Event | None = None
    dense: Any = None
    h: Any = None
    received: Any = None
    gates: Any = None
    linear: Any = None
    activated: Any = None
    gated: Any = None
    y: Any = None
    out: Any = None
    grad_y: Any = None
    grad_rows: Any = None
    grad_gates: Any = None
    grad_h: Any = None
    grad_x: Any = None

    def results(self) -> list[torch.Tensor]:
        return [self.out.x, self.grad_x, self.grad_h.topk_weights]


class Layer:
    """Weights of one rank, and the pieces of a step."""

    def __init__(self, buffer: Buffer, setting: Setting) -> None:
        self.buffer, self.setting = buffer, setting
        generator = torch.Generator(device=buffer.device).manual_seed(buffer.rank)

        def draw(num_out: int, num_in: int) -> torch.Tensor:
            size, device = (num_out, num_in), buffer.device
            weights = torch.randn(size, device=device, generator=generator) * num_in**-0.5
            return weights.bfloat16()

        hidden = setting.hidden
        self.dense_in, self.dense_out = draw(setting.dense, hidden), draw(hidden, setting.dense)
        self.expert_in = draw(setting.intermediate, hidden)
        self.expert_out = draw(hidden, setting.intermediate)
        self.parameters = [self.dense_in, self.dense_out, self.expert_in, self.expert_out]
        self.grads = [torch.zeros_like(weights) for weights in self.parameters]
        self.pieces: dict[str, Callable[..., DispatchOutput | CombineOutput | None]] = {
            "dense": self._dense,
            "dispatch": self._dispatch,
            "experts": self._experts,
            "combine": self._combine,
            "dispatch grad": self._dispatch_grad,
            "experts grad": self._experts_grad,
            "combine grad": self._combine_grad,
            "dense grad": self._dense_grad,
        }

    def micro_batches(self, num_tokens: int) -> list[MicroBatch]:
        """Draw the inputs; the same at every call."""
        buffer, setting = self.buffer, self.setting
        shape = RoutingShape(buffer.num_ranks, setting.num_experts, setting.num_topk)
        generator = torch.Generator(device=buffer.device).manual_seed(1000 + buffer.rank)
        result = []
        for index in range(NUM_MICRO_BATCHES):
            routed = make_routing("uniform", shape, index)(buffer.rank, num_tokens)
            size = (num_tokens, setting.hidden)
            x = torch.randn(size, device=buffer.device, generator=generator).bfloat16()
            ids, weights = routed.topk_idx, routed.topk_weights
            result.append(MicroBatch(x, ids.to(buffer.device), weights.to(buffer.device)))
        return result

    # ---- compute

    def _dense(self, m: MicroBatch) -> None:
        m.dense = m.x @ self.dense_in.t()
        m.h = torch.addmm(m.x, m.dense, self.dense_out.t())

    def _experts(self, m: MicroBatch) -> None:
        m.gates = m.received.topk_weights.sum(1, keepdim=True).bfloat16()
        m.linear = m.received.x @ self.expert_in.t()
        m.activated = silu(m.linear)
        m.gated = m.activated * m.gates
        m.y = m.gated @ self.expert_out.t()

    def _experts_grad(self, m: MicroBatch) -> None:
        _, _, grad_in, grad_out = self.grads
        grad_gated = m.grad_y.x @ self.expert_out
        grad_out.addmm_(m.grad_y.x.t(), m.gated)
        grad_gates = (grad_gated * m.activated).sum(1, keepdim=True).float()
        m.grad_gates = grad_gates.expand(-1, self.setting.num_topk).contiguous()
        grad_linear = torch.ops.aten.silu_backward(grad_gated * m.gates, m.linear)
        grad_in.addmm_(grad_linear.t(), m.received.x)
        m.grad_rows = grad_linear @ self.expert_in

    def _dense_grad(self, m: MicroBatch) -> None:
        grad_in, grad_out, _, _ = self.grads
        grad_out.addmm_(m.grad_h.x.t(), m.dense)
        grad_dense = m.grad_h.x @ self.dense_out
        grad_in.addmm_(grad_dense.t(), m.x)
        m.grad_x = torch.addmm(m.grad_h.x, grad_dense, self.dense_in)

    # ---- communication: the residual is the bias of a combine, forward and backward

    def _dispatch(self, m: MicroBatch, **how: Any) -> DispatchOutput:
        capacity = self.buffer.num_ranks * len(m.x)
        m.received = self.buffer.dispatch(
            m.h, m.ids, m.weights, num_recv_tokens=capacity, zero_padding=True, **how
        )
        return m.received

    def _combine(self, m: MicroBatch, **how: Any) -> CombineOutput:
        m.out = self.buffer.combine(m.y, m.received.handle, bias=m.h, **how)
        return m.out

    def _dispatch_grad(self, m: MicroBatch, **how: Any) -> DispatchOutput:
        handle = m.received.handle
        m.grad_y = self.buffer.dispatch(m.out.x, handle=handle, zero_padding=True, **how)
        return m.grad_y

    def _combine_grad(self, m: MicroBatch, **how: Any) -> CombineOutput:
        handle, carried = m.received.handle, m.grad_gates
        m.grad_h = self.buffer.combine(
            m.grad_rows, handle, topk_weights=carried, bias=m.out.x, **how
        )
        return m.grad_h


class Stepper:
    """Runs steps one way; figures are us of a step."""

    def __init__(self, layer: Layer, way: Way, num_tokens: int) -> None:
        self._layer, self._way = layer, way
        self._device = layer.buffer.device
        num_sms = layer.buffer.config.num_sms or 0
        self._num_sms_left = num_sms if way.leaves_sms else 0
        self._inputs = layer.micro_batches(num_tokens)
        self._marks: list[tuple[str, int, Mark, Mark]] = []
        self._observer = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self.accepted: list[tuple[float, tuple[Span, ...]]] = []

    def run(self) -> list[MicroBatch]:
        """Launch a step.

        A micro-batch's pieces follow each other. Those of both that compute are in one order on the
        current stream, those that communicate in one order on the buffer's, or on the same one.
        NOTE: views go with the micro-batches, after all pieces are launched: whatever the buffer
        does next follows the current stream, on which they are read.
        """
        batches = [dataclasses.replace(inputs) for inputs in self._inputs]
        self._marks = []
        for grad in self._layer.grads:
            grad.zero_()
        with leaving_sms(self._device, self._num_sms_left):
            for name, index in OVERLAPPED if self._way.overlaps else IN_SEQUENCE:
                is_beside = self._way.overlaps and lane_of(name) == "communication"
                run = self._run_beside if is_beside else self._run_here
                self._marks.append((name, index, *run(name, batches[index])))
        return batches

    def _run_here(self, name: str, m: MicroBatch) -> tuple[Mark, Mark]:
        if m.ready is not None:
            m.ready.current_stream_wait()
        begin = Mark(self._device).record()
        self._layer.pieces[name](m)
        m.ready = end = Mark(self._device).record()
        return begin, end

    def _run_beside(self, name: str, m: MicroBatch) -> tuple[Mark, Mark]:
        assert m.ready is not None
        turn = Turn(m.ready, self._device)
        output = self._layer.pieces[name](m, async_op=True, previous_event=turn)
        assert output is not None
        assert output.event is not None
        m.ready = output.event
        with torch.cuda.stream(self._observer):
            output.event.current_stream_wait()
            return turn.begin, Mark(self._device).record()

    # ---- as a sample

    def launch(self, start: Mark) -> None:
        self._start = start
        self.run()
        self._end = Mark(self._device).record()

    def read(self) -> list[float]:
        return [self._end.us_since(self._start)]

    def accept(self, slowest: list[float]) -> bool:
        spans = tuple(
            Span(
                name,
                lane_of(name),
                index,
                name in BACKWARD,
                begin.us_since(self._start),
                end.us_since(self._start),
            )
            for name, index, begin, end in self._marks
        )
        self.accepted.append((slowest[0], spans))
        return True

    def median_timeline(self) -> Timeline:
        """Return the step whose time is the median of all that count."""
        steps = sorted(self.accepted, key=lambda step: step[0])
        return Timeline(self._way.name, steps[len(steps) // 2][1])


def lane_of(name: str) -> str:
    is_compute = name.startswith(("dense", "experts"))
    return "compute" if is_compute else "communication"


# ---- Correctness ----------------------------------------------------------------------------


def results_of(layer: Layer, way: Way, num_tokens: int) -> list[torch.Tensor]:
    """Return all that a step leaves: outputs, gradients of inputs, routers' and layer's weights."""
    batches = Stepper(layer, way, num_tokens).run()
    results = [tensor for m in batches for tensor in m.results()]
    return [*results, *(grad.clone() for grad in layer.grads)]


def autograd_results(layer: Layer, num_tokens: int) -> list[torch.Tensor]:
    """Return the same from autograd, through deepcomm.functional."""
    buffer = layer.buffer
    weights = [tensor.clone().requires_grad_() for tensor in layer.parameters]
    dense_in, dense_out, expert_in, expert_out = weights
    results = []
    for m in layer.micro_batches(num_tokens):
        x, router = m.x.requires_grad_(), m.weights.requires_grad_()
        h = torch.addmm(x, x @ dense_in.t(), dense_out.t())
        capacity = buffer.num_ranks * num_tokens
        received = functional.dispatch(buffer, h, m.ids, router, num_recv_tokens=capacity)
        assert received.topk_weights is not None
        gates = received.topk_weights.sum(1, keepdim=True).bfloat16()
        y = (silu(received.x @ expert_in.t()) * gates) @ expert_out.t()
        out = functional.combine(buffer, y, received.handle, bias=h).x
        out.backward(out.detach())
        results += [out.detach(), x.grad, router.grad]
    return [tensor for tensor in (*results, *(w.grad for w in weights)) if tensor is not None]


def check_steps(layer: Layer, num_tokens: int) -> None:
    """Compare with autograd where that is small, and both ways with each other to the bit."""
    few = min(CHECKED_TOKENS, num_tokens)
    expected = autograd_results(layer, few)
    for index, (got, wanted) in enumerate(
        zip(results_of(layer, WAYS[0], few), expected, strict=True)
    ):
        difference = (got.float() - wanted.float()).norm() / wanted.float().norm()
        if not difference < MOST_DIFFERENCE:
            raise AssertionError(f"result {index}: expected autograd's, it is {difference:.3f} off")
    for way in WAYS:
        if way.overlaps:
            sequence = dataclasses.replace(way, overlaps=False)
            check_equal(layer, sequence, way, num_tokens)


def check_equal(layer: Layer, sequence: Way, way: Way, num_tokens: int) -> None:
    expected = results_of(layer, sequence, num_tokens)
    for index, (got, wanted) in enumerate(
        zip(results_of(layer, way, num_tokens), expected, strict=True)
    ):
        if not torch.isfinite(wanted).all() or not torch.equal(got, wanted):
            raise AssertionError(f"{way.name}: expected result {index} of the sequence to the bit")


# ---- Times ----------------------------------------------------------------------------------


def measure_training(buffer: Buffer, setting: Setting) -> tuple[list[Figure], list[Timeline]]:
    """Check, then time every way; collective. Timelines are those of this rank."""
    layer = Layer(buffer, setting)
    check_steps(layer, setting.num_tokens)
    steppers = [Stepper(layer, way, setting.num_tokens) for way in WAYS]
    sampler = Sampler(buffer, setting.repeats)

    def sampling(stepper: Stepper) -> Callable[[], list[list[float]]]:
        return lambda: sampler.take(stepper)

    samples = time_in_turns([sampling(stepper) for stepper in steppers])
    sampler.finish()
    timelines = [stepper.median_timeline() for stepper in steppers]
    times = [[[step[0] for step in taken] for taken in passes] for passes in samples]
    timings = [Timing.of_passes(passes) for passes in times]
    communication = communication_us(timelines[0])
    figures = [
        Figure(
            name=way.name,
            step=timing,
            speedup=timings[0].p50 / timing.p50,
            hidden=(timings[0].p50 - timing.p50) / communication,
        )
        for way, timing in zip(WAYS, timings, strict=True)
    ]
    return figures, timelines


def communication_us(timeline: Timeline) -> float:
    spans = [span for span in timeline.spans if span.lane == "communication"]
    return float(np.sum([span.end_us - span.begin_us for span in spans]))
