# SPDX-License-Identifier: Apache-2.0
"""Decode two micro-batches through MoE layers: with hooks, next to the same one after the other.

    python examples/overlap_decode.py --plot timeline.png
    python examples/overlap_decode.py --device cuda --hidden 7168 --experts 64 --topk 8 --tokens 128

While one micro-batch's rows fly, the other one's attention or experts compute: the send phase
returns at once and nothing is resident until the hook. Both schedules give the same bits. Printed
are both times, those of the computation and of the communication alone, and how far the overlapped
time is above the larger of the two. The picture shows what either micro-batch does when, on rank 0.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from deepcomm import Buffer, RecvLayout
from deepcomm.testing import run_processes

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_MICRO_BATCHES = 2
COLOURS = {"attention": "tab:blue", "experts": "tab:green", "dispatch": "tab:orange"}
COMBINE_COLOUR = "tab:red"
NOTED_RUNS = 20


@dataclass(frozen=True)
class Settings:
    """Command line; ``parse`` holds the defaults and the meanings."""

    ranks: int
    layers: int
    tokens: int
    hidden: int
    experts: int
    topk: int
    repeats: int
    device: str
    plot: Path | None


@dataclass
class Timeline:
    """Begin and end of each step, as the device or, on CPUs, the host sees them."""

    on_gpu: bool
    marks: list[tuple[str, int, Any, Any]] = field(default_factory=list)

    def now(self) -> Any:
        """Return a mark: an event, or on CPUs the time."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def note(self, name: str, batch: int, begin: Any) -> None:
        """Keep a step that ends now."""
        self.marks.append((name, batch, begin, self.now()))

    def spans(self) -> list[tuple[str, int, float, float]]:
        """Return name, micro-batch, begin and duration of each step, in ms."""
        if self.on_gpu:
            torch.cuda.synchronize()
        origin = self.marks[0][2]

        def at(mark: Any) -> float:
            return float(origin.elapsed_time(mark) if self.on_gpu else (mark - origin) * 1e3)

        return [
            (name, batch, at(begin), at(end) - at(begin)) for name, batch, begin, end in self.marks
        ]


class Decoder:
    """A few layers of (stand-in for attention, experts); weights are drawn, nothing is learnt."""

    def __init__(self, group: Any, settings: Settings) -> None:
        self.settings = settings
        rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.on_gpu = settings.device == "cuda"
        self.device = torch.device("cuda", rank) if self.on_gpu else torch.device("cpu")
        if self.on_gpu:
            torch.cuda.set_device(self.device)
        self.buffer = Buffer(
            group,
            num_experts=settings.experts,
            num_topk=settings.topk,
            hidden=settings.hidden,
            max_tokens_per_rank=settings.tokens,
            device=self.device,
        )
        generator = torch.Generator().manual_seed(rank)
        shape = (settings.hidden, settings.hidden)

        def draw(*size: int) -> torch.Tensor:
            values = torch.randn(size, generator=generator) * settings.hidden**-0.5
            return values.bfloat16().to(self.device)

        num_local = settings.experts // num_ranks
        self.attention_weight = draw(*shape)
        self.expert_weight = draw(num_local, *shape)
        self.inputs = [draw(settings.tokens, settings.hidden) for _ in range(NUM_MICRO_BATCHES)]
        scores = torch.rand(
            NUM_MICRO_BATCHES, settings.tokens, settings.experts, generator=generator
        )
        top = scores.topk(settings.topk)
        self.topk_idx = list(top.indices.to(self.device))
        self.topk_weights = list(top.values.softmax(-1).to(self.device))
        self.timeline: Timeline | None = None

    # ---- the steps of a layer

    def step(self, name: str, batch: int, work: Callable[[], Any]) -> Any:
        """Do some work; note it if somebody draws a picture."""
        if self.timeline is None:
            return work()
        begin = self.timeline.now()
        result = work()
        self.timeline.note(name, batch, begin)
        return result

    def attention(self, batch: int, x: torch.Tensor) -> torch.Tensor:
        """Compute as long as attention would."""

        def work() -> torch.Tensor:
            mixed = x
            for _ in range(4):
                mixed = torch.tanh(mixed @ self.attention_weight)
            return x + mixed

        result: torch.Tensor = self.step("attention", batch, work)
        return result

    def experts(self, batch: int, rows: torch.Tensor) -> torch.Tensor:
        """Apply each expert to its block of rows."""
        result: torch.Tensor = self.step(
            "experts", batch, lambda: torch.bmm(rows, self.expert_weight)
        )
        return result

    def dispatch(self, batch: int, x: torch.Tensor, hook: bool) -> Any:
        """Send tokens to their experts."""
        return self.step(
            "dispatch",
            batch,
            lambda: self.buffer.low_latency_dispatch(
                x,
                self.topk_idx[batch],
                self.topk_weights[batch],
                recv_layout=RecvLayout.EXPERT_PADDED,
                return_hook=hook,
            ),
        )

    def combine(self, batch: int, y: torch.Tensor, handle: Any, hook: bool) -> Any:
        """Bring the experts' outputs back."""
        return self.step(
            "combine",
            batch,
            lambda: self.buffer.low_latency_combine(y, handle, return_hook=hook),
        )

    # ---- the schedules

    def one_after_the_other(self) -> list[torch.Tensor]:
        """Run each micro-batch by itself; it waits for its rows."""
        results = []
        for batch, inputs in enumerate(self.inputs):
            x = inputs
            for _ in range(self.settings.layers):
                x = self.attention(batch, x)
                received = self.dispatch(batch, x, hook=False)
                y = self.experts(batch, received.x)
                x = x + self.combine(batch, y, received.handle, hook=False).x
            results.append(x)
        return results

    def overlapped(self) -> list[torch.Tensor]:
        """Let each micro-batch compute while the other one's rows fly."""
        xs = list(self.inputs)
        returning: list[Any] = [None] * NUM_MICRO_BATCHES
        for _ in range(self.settings.layers):
            flying = []
            for batch in range(NUM_MICRO_BATCHES):
                xs[batch] = self.attention(batch, self.land(batch, xs[batch], returning))
                flying.append(self.dispatch(batch, xs[batch], hook=True))
            for batch, received in enumerate(flying):
                self.step("dispatch", batch, received.hook)
                y = self.experts(batch, received.x)
                returning[batch] = self.combine(batch, y, received.handle, hook=True)
        return [self.land(batch, x, returning) for batch, x in enumerate(xs)]

    def land(self, batch: int, x: torch.Tensor, returning: list[Any]) -> torch.Tensor:
        """Add what the experts send back, if anything is on its way."""
        if returning[batch] is None:
            return x
        self.step("combine", batch, returning[batch].hook)
        return x + returning[batch].x

    def only_computing(self) -> None:
        """Do all steps but those between ranks."""
        rows = self.received.x
        for _ in range(self.settings.layers):
            for batch, x in enumerate(self.inputs):
                self.attention(batch, x)
                self.experts(batch, rows)

    def only_communicating(self) -> None:
        """Do the steps between ranks alone."""
        y = self.received.x
        for _ in range(self.settings.layers):
            for batch, x in enumerate(self.inputs):
                got = self.dispatch(batch, x, hook=False)
                self.combine(batch, y, got.handle, hook=False)

    def prepare(self) -> None:
        """Receive rows once, for the schedules that are not whole."""
        self.received = self.dispatch(0, self.inputs[0], hook=False)
        self.received.x.nan_to_num_()


def median_ms(decoder: Decoder, group: Any, run: Callable[[], Any]) -> float:
    """Return the median time of a schedule, of the slowest rank; on a GPU it replays a graph."""
    if decoder.on_gpu:
        run = captured(run)
    times = []
    for _ in range(decoder.settings.repeats):
        if decoder.on_gpu:
            torch.cuda.synchronize()
        dist.barrier(group=group)
        start = time.perf_counter()
        run()
        if decoder.on_gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    slowest = torch.tensor(times)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    return float(slowest.median())


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return the replay of a graph of ``run``, which has run before."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def on_rank(group: Any, settings: Settings) -> tuple[dict[str, float], dict[str, Any]]:
    """Run both schedules on one rank; return the times and the spans of one run of each."""
    decoder = Decoder(group, settings)
    decoder.prepare()
    schedules = {
        "one after the other": decoder.one_after_the_other,
        "overlapped": decoder.overlapped,
        "computation alone": decoder.only_computing,
        "communication alone": decoder.only_communicating,
    }
    plain, overlapped = decoder.one_after_the_other(), decoder.overlapped()
    for expected, got in zip(plain, overlapped, strict=True):
        assert torch.equal(expected, got), "the schedules differ"
    times = {name: median_ms(decoder, group, run) for name, run in schedules.items()}
    spans = {}
    for name in ("one after the other", "overlapped"):
        decoder.timeline = Timeline(decoder.on_gpu)
        dist.barrier(group=group)
        schedules[name]()
        spans[name] = decoder.timeline.spans()
    decoder.buffer.close()
    return times, spans


def plot(path: Path, spans: dict[str, Any]) -> None:
    """Draw what each micro-batch does when."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    colours = {**COLOURS, "combine": COMBINE_COLOUR}
    figure, axes = plt.subplots(len(spans), 1, sharex=True, figsize=(12, 4))
    for axis, (name, steps) in zip(axes, spans.items(), strict=True):
        for step, batch, begin, duration in steps:
            axis.barh(batch, duration, left=begin, color=colours[step], edgecolor="white")
        axis.set_yticks(range(NUM_MICRO_BATCHES), [f"micro-batch {i}" for i in range(2)])
        axis.invert_yaxis()
        axis.set_title(name)
    axes[-1].set_xlabel("ms")
    axes[0].legend(handles=[Patch(color=colour, label=step) for step, colour in colours.items()])
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse() -> Settings:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16, help="of a micro-batch and rank")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--topk", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=NOTED_RUNS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--plot", type=Path, help="PNG of the timelines")
    return Settings(**vars(parser.parse_args()))


def main() -> None:
    """Run as a script."""
    settings = parse()
    result = run_processes(on_rank, settings.ranks, settings, timeout_s=300)[0]
    assert result is not None
    times, spans = result
    for name, value in times.items():
        print(f"{name:>20}: {value:8.3f} ms")
    bound = max(times["computation alone"], times["communication alone"])
    print(f"{'overlapped':>20}: {times['overlapped'] / bound - 1:+.1%} above the larger of the two")
    if settings.plot:
        plot(settings.plot, spans)


if __name__ == "__main__":
    main()
