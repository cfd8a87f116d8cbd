# SPDX-License-Identifier: Apache-2.0
"""Low-latency dispatch and combine between GPUs: what a decoding step pays.

    python benchmarks/low_latency.py --out benchmarks/results/2x-h200-low-latency

One process a GPU. Every operation is first compared with the reference on all ranks. Times are of
CUDA graphs that hold a chain of operations, divided by their number; each sample is the maximum
over the ranks, which start together. Send and hook apart, host time without a graph, and a GEMM
between send and hook come from launches on a stream. All waits are bounded.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from machine import environment, write_results
from soak import LowLatencySoak
from soak_truth import SoakShape

from deepcomm import Buffer, RecvLayout, reference
from deepcomm.slots import ReferenceConfig
from deepcomm.testing.oracle import (
    assert_combine_equal,
    assert_dispatch_equal,
    random_payload,
    routed_tokens,
)
from deepcomm.testing.spawn import run_processes

TIMEOUT_S = 20.0  # of a wait on the device
PAIRS_IN_A_ROW = 20
BACKLOG_CYCLES = 5_000_000
"""Of a kernel that keeps the GPU busy, 2.5 ms, while the host queues all that a sample times."""
GEMM_SIZE = 4096
MOST_FOR_REFERENCE = 32
"""Tokens up to which the reference on the CPU is fast enough; above, torch on the GPU checks."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    tokens: tuple[int, ...]
    hidden: int
    experts: int
    topk: int
    chain: int
    samples: int
    check_only: bool
    num_sms: int | None


@dataclass
class Figure:
    """One measured quantity of one size."""

    name: str
    tokens: int
    unit: str
    p50: float
    p95: float
    p99: float


@contextmanager
def bound_to_core(rank: int, num_ranks: int) -> Iterator[None]:
    """Keep this thread on one core, another one for each rank, as schedulers move it else."""
    before = os.sched_getaffinity(0)
    cores = sorted(before)
    os.sched_setaffinity(0, {cores[(rank + 1) * len(cores) // (num_ranks + 1)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass
class Work:
    """One rank's buffer with inputs of one size, and the reference's results."""

    group: Any
    options: Options
    num_tokens: int
    figures: list[Figure] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rank, self.num_ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        options = self.options
        self.config = ReferenceConfig(
            options.experts, self.num_ranks, self.num_ranks, self.num_tokens
        )
        ranks = range(self.num_ranks)
        self.xs = [random_payload(rank, self.num_tokens, options.hidden) for rank in ranks]
        routed = [
            routed_tokens("uniform", self.config, rank, self.num_tokens, options.topk)
            for rank in ranks
        ]
        self.ids = [one.topk_idx for one in routed]
        self.weights = [one.topk_weights for one in routed]
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.buffer = Buffer(
            self.group,
            num_experts=options.experts,
            num_topk=options.topk,
            hidden=options.hidden,
            max_tokens_per_rank=self.num_tokens,
            device=self.device,
            timeout_s=TIMEOUT_S,
            num_sms=options.num_sms,
        )
        self.x, self.id, self.weight = (
            tensors[self.rank].to(self.device) for tensors in (self.xs, self.ids, self.weights)
        )

    def dispatch(self, layout: RecvLayout, quantize: str | None = None, **more: Any) -> Any:
        return self.buffer.low_latency_dispatch(
            self.x, self.id, self.weight, recv_layout=layout, quantize=quantize, **more
        )

    # ---- correctness

    def check(self) -> None:
        """Compare every operation that is timed with the reference, bit for bit."""
        if self.num_tokens > MOST_FOR_REFERENCE:
            options = self.options
            shape = SoakShape(options.experts, options.topk, options.hidden, self.num_tokens)
            soak = LowLatencySoak(self.group, shape, self.device)
            soak.run(num_operations=12)
            soak.buffer.close()
            return
        for layout in (RecvLayout.EXPERT_PADDED, RecvLayout.TOKEN):
            for quantize in ("fp8_e4m3", None):
                expected = reference.low_latency_dispatch(
                    self.xs,
                    self.ids,
                    self.weights,
                    config=self.config,
                    recv_layout=layout,
                    quantize=quantize,
                )
                for hook in (False, True):
                    got = self.dispatch(layout, quantize, return_hook=hook)
                    if hook:
                        got.hook()
                    torch.cuda.synchronize()
                    assert_dispatch_equal(got, expected[self.rank], rank=self.rank)
            self.check_combine(expected, got)

    def check_combine(self, expected: list[Any], got: Any) -> None:
        ys = [
            random_payload(rank, each.handle.num_rows, self.options.hidden, seed=7).view(
                each.x.shape
            )
            for rank, each in enumerate(expected)
        ]
        wanted = reference.low_latency_combine(ys, [each.handle for each in expected])
        y = ys[self.rank].to(self.device)
        for hook in (False, True):
            back = self.buffer.low_latency_combine(y, got.handle, return_hook=hook)
            if hook:
                back.hook()
            torch.cuda.synchronize()
            assert_combine_equal(back, wanted[self.rank], rank=self.rank)

    # ---- times

    def add(self, name: str, unit: str, samples: list[float]) -> None:
        """Keep the percentiles of the maximum over ranks of each sample."""
        values = torch.tensor(samples, dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        p50, p95, p99 = np.percentile(values.numpy(), [50, 95, 99])
        self.figures.append(Figure(name, self.num_tokens, unit, p50, p95, p99))

    def start_together(self) -> None:
        torch.cuda.synchronize()
        dist.barrier(group=self.group)
        torch.cuda._sleep(BACKLOG_CYCLES)

    def time_graph(self, name: str, operation: Callable[[], Any]) -> None:
        """Time a graph of a chain of operations, per operation."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                operation()
        torch.cuda.synchronize()
        dist.barrier(group=self.group)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(self.options.chain):
                operation()
        samples = []
        for _ in range(self.options.samples):
            self.start_together()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()  # ends at the same time on all ranks, which the barrier's exits are not
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            samples.append(begin.elapsed_time(end) * 1e3 / self.options.chain)
        self.add(name, "us", samples)

    def time_phases(self, name: str, start: Callable[[], Any]) -> None:
        """Time the send and the hook of an operation apart, the bytes having arrived between."""
        spans: dict[str, list[float]] = {"send": [], "hook": []}
        for _ in range(self.options.samples):
            self.start_together()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
            events[0].record()
            output = start()
            events[1].record()
            torch.cuda._sleep(BACKLOG_CYCLES)
            events[2].record()
            output.hook()
            events[3].record()
            torch.cuda.synchronize()
            spans["send"].append(events[0].elapsed_time(events[1]) * 1e3)
            spans["hook"].append(events[2].elapsed_time(events[3]) * 1e3)
        for phase, samples in spans.items():
            self.add(f"{name}, {phase} alone", "us", samples)

    def time_host(self, y: torch.Tensor) -> None:
        """Time the calls of a dispatch and a combine, which only launch: one pair, and a row."""
        self.time_calls("alone", y, num_pairs=1)
        self.time_calls("in a row", y, num_pairs=PAIRS_IN_A_ROW)
        with bound_to_core(self.rank, self.num_ranks):
            self.time_calls("in a row, bound to a core", y, num_pairs=PAIRS_IN_A_ROW)

    def time_calls(self, name: str, y: torch.Tensor, num_pairs: int) -> None:
        dispatch, combine = self.buffer.low_latency_dispatch, self.buffer.low_latency_combine
        samples = []
        for _ in range(2 * self.options.samples):
            torch.cuda.synchronize()
            dist.barrier(group=self.group)
            start = time.perf_counter()
            for _ in range(num_pairs):
                got = dispatch(self.x, self.id, self.weight, quantize="fp8_e4m3")
                combine(y, got.handle)
            samples.append((time.perf_counter() - start) * 1e6 / num_pairs)
        torch.cuda.synchronize()
        self.add(f"host time of a pair of calls, no graph, {name}", "us", samples)

    def time_gemm(self) -> None:
        """Time a GEMM that fills the GPU, alone and between send and hook."""
        a, b = (
            torch.randn(GEMM_SIZE, GEMM_SIZE, device=self.device, dtype=torch.bfloat16)
            for _ in range(2)
        )
        for name, communicates in (("alone", False), ("between send and hook", True)):
            samples = []
            for _ in range(self.options.samples):
                self.start_together()
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                output = (
                    self.dispatch(RecvLayout.EXPERT_PADDED, "fp8_e4m3", return_hook=True)
                    if communicates
                    else None
                )
                events[0].record()
                torch.mm(a, b)
                events[1].record()
                if output is not None:
                    output.hook()
                torch.cuda.synchronize()
                samples.append(events[0].elapsed_time(events[1]) * 1e3)
            self.add(f"GEMM {name}", "us", samples)

    def measure(self) -> None:
        padded, token = RecvLayout.EXPERT_PADDED, RecvLayout.TOKEN
        rows = {layout: self.dispatch(layout) for layout in (padded, token)}
        torch.cuda.synchronize()
        y = {layout: torch.randn_like(got.x) for layout, got in rows.items()}
        handles = {layout: got.handle for layout, got in rows.items()}
        combine = self.buffer.low_latency_combine
        self.time_graph(
            "dispatch FP8 cast, EXPERT_PADDED", lambda: self.dispatch(padded, "fp8_e4m3")
        )
        self.time_graph("dispatch FP8 cast, TOKEN", lambda: self.dispatch(token, "fp8_e4m3"))
        self.time_graph("dispatch BF16, EXPERT_PADDED", lambda: self.dispatch(padded))
        self.time_graph(
            "combine EXPERT_PADDED, weighted", lambda: combine(y[padded], handles[padded])
        )
        self.time_graph(
            "combine EXPERT_PADDED, weights given now",
            lambda: combine(y[padded], handles[padded], topk_weights=self.weight),
        )
        self.time_graph("combine TOKEN", lambda: combine(y[token], handles[token]))

        def pair() -> Any:
            got = self.dispatch(padded, "fp8_e4m3")
            return got, combine(y[padded], got.handle)

        self.time_graph("dispatch FP8 and weighted combine, EXPERT_PADDED", pair)
        self.time_phases(
            "dispatch FP8 cast, EXPERT_PADDED",
            lambda: self.dispatch(padded, "fp8_e4m3", return_hook=True),
        )
        self.time_phases(
            "combine EXPERT_PADDED, weighted",
            lambda: combine(y[padded], handles[padded], return_hook=True),
        )
        self.time_host(y[padded])
        self.time_gemm()


# ---- processes -------------------------------------------------------------------------------


def on_rank(group: Any, options: Options) -> list[dict[str, Any]]:
    """Measure on one GPU; all ranks return the same figures."""
    torch.cuda.set_device(dist.get_rank(group) % torch.cuda.device_count())
    figures: list[Figure] = []
    for num_tokens in options.tokens:
        work = Work(group, options, num_tokens)
        work.check()
        if not options.check_only:
            work.measure()
        figures += work.figures
        if work.rank == 0:
            print(f"T = {num_tokens}: correct", file=sys.stderr, flush=True)
        work.buffer.close()
    return [asdict(figure) for figure in figures]


def table(figures: list[dict[str, Any]]) -> list[str]:
    """Return lines of markdown: a row a quantity, a column a size."""
    names = list(dict.fromkeys(figure["name"] for figure in figures))
    sizes = list(dict.fromkeys(figure["tokens"] for figure in figures))
    found = {(figure["name"], figure["tokens"]): figure for figure in figures}
    lines = ["| p50 / p95, us | " + " | ".join(f"T = {size}" for size in sizes) + " |"]
    lines.append("|---|" + "---:|" * len(sizes))
    for name in names:
        cells = [found[name, size] for size in sizes]
        values = " | ".join(f"{c['p50']:.1f} / {c['p95']:.1f}" for c in cells)
        lines.append(f"| {name} | {values} |")
    return lines


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", default="1,8,32,64,128,256,512", help="T, separated by commas")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--chain", type=int, default=20, help="operations of a graph")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--num-sms", type=int)
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--timeout-s", type=float, default=540.0, help="of the whole run")
    parser.add_argument("--commit", default="unknown", help="goes into the result")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    args = parser.parse_args()
    options = Options(
        tokens=tuple(map(int, args.tokens.split(","))),
        hidden=args.hidden,
        experts=args.experts,
        topk=args.topk,
        chain=args.chain,
        samples=args.samples,
        check_only=args.check_only,
        num_sms=args.num_sms,
    )
    figures = run_processes(on_rank, args.ranks, options, timeout_s=args.timeout_s)[0] or []
    facts = environment(args.commit)
    lines = ["# Low latency", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += table(figures) if figures else ["All results are right."]
    print("\n".join(lines))
    if args.out:
        write_results(args.out, {"environment": facts, "figures": figures}, lines)


if __name__ == "__main__":
    main()
