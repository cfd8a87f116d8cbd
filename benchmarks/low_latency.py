# SPDX-License-Identifier: Apache-2.0
"""Low-latency dispatch and combine between GPUs: what a decoding step pays.

    python benchmarks/low_latency.py --out benchmarks/results/2x-h200-low-latency.json
    python benchmarks/low_latency.py --soak 100000        # random sizes and routings, all checked

One process a GPU. Every operation is first compared with the reference on all ranks. Times are of
CUDA graphs that hold a chain of operations, divided by their number; each sample is the maximum
over the ranks, which start together. Send and hook apart, host time without a graph, and a GEMM
between send and hook come from launches on a stream. All waits are bounded.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

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
BACKLOG_CYCLES = 400_000
GEMM_SIZE = 4096
MOST_FOR_REFERENCE = 128
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
    soak: int
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
            soak = Soak(self.group, self.options, self.num_tokens, self.options.hidden)
            soak.run(num_steps=6)
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
        """Time the calls of a dispatch and a combine, which only launch."""
        samples = []
        for _ in range(4 * self.options.samples):
            torch.cuda.synchronize()
            dist.barrier(group=self.group)
            start = time.perf_counter()
            got = self.dispatch(RecvLayout.EXPERT_PADDED, "fp8_e4m3")
            self.buffer.low_latency_combine(y, got.handle)
            samples.append((time.perf_counter() - start) * 1e6)
        torch.cuda.synchronize()
        self.add("host time of the pair of calls, no graph", "us", samples)

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


# ---- soak: random sizes and routings, checked on the GPU ------------------------------------


class Soak:
    """Dispatches and combines of random tokens, compared with torch on the same GPU."""

    def __init__(
        self, group: Any, options: Options, max_tokens: int = 128, hidden: int = 1024
    ) -> None:
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.options, self.max_tokens, self.hidden = options, max_tokens, hidden
        self.num_local = options.experts // self.num_ranks
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.generator = torch.Generator(self.device)
        self.sizes = np.random.default_rng(1)
        self.buffer = Buffer(
            group,
            num_experts=options.experts,
            num_topk=options.topk,
            hidden=hidden,
            max_tokens_per_rank=max_tokens,
            device=self.device,
            timeout_s=TIMEOUT_S,
        )

    def step(self, number: int) -> torch.Tensor:
        """Run one dispatch and its combine; return a bool on the device: all is right."""
        self.generator.manual_seed(number)  # alike on all ranks, which know each other's tokens
        sizes = self.sizes.integers(0, self.max_tokens + 1, self.num_ranks)
        total, topk = int(sizes.sum()), self.options.topk
        x = torch.randn(total, self.hidden, device=self.device, generator=self.generator).bfloat16()
        scores = torch.rand(
            total, self.options.experts, device=self.device, generator=self.generator
        )
        ids = scores.topk(topk).indices if total else scores.new_zeros(0, topk, dtype=torch.int64)
        drop = torch.rand(ids.shape, device=self.device, generator=self.generator) < 0.1
        ids = ids.masked_fill(drop, -1)
        weights = torch.rand(ids.shape, device=self.device, generator=self.generator)
        begin = int(sizes[: self.rank].sum())
        own = slice(begin, begin + int(sizes[self.rank]))
        hook = number % 3 == 0
        got = self.buffer.low_latency_dispatch(x[own], ids[own], weights[own], return_hook=hook)
        if hook:
            got.hook()
        back = self.buffer.low_latency_combine(got.x, got.handle, return_hook=hook)
        if hook:
            back.hook()
        is_right = self.check_rows(got, x, ids, weights)
        expected = self.expected_sum(x[own], ids[own], weights[own])
        return is_right & (back.x == expected).all()

    def check_rows(
        self, got: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        local = ids - self.rank * self.num_local
        is_here = (local >= 0) & (local < self.num_local)
        column = local.clamp(0, self.num_local - 1)
        chosen = torch.zeros(len(x), self.num_local, device=self.device)
        chosen.scatter_add_(1, column, is_here.float())
        weight = torch.zeros_like(chosen).scatter_add_(1, column, weights.masked_fill(~is_here, 0))
        position = chosen.cumsum(0).long() - 1
        expert, token = chosen.T.nonzero(as_tuple=True)
        place = position[token, expert]
        rows_equal = (got.x[expert, place] == x[token]).all()
        weights_equal = (got.topk_weights[expert, place] == weight[token, expert]).all()
        counts_equal = (got.num_tokens_per_expert == chosen.sum(0).int()).all()
        return rows_equal & weights_equal & counts_equal

    def expected_sum(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum in the specified order; every operation is a kernel, so that none is fused."""
        order = ids.argsort(1)
        ids, weights = ids.gather(1, order), weights.gather(1, order)
        total = torch.zeros(x.shape, device=self.device)
        for rank in range(self.num_ranks):
            partial = torch.zeros_like(total)
            for k in range(ids.shape[1]):
                is_here = (ids[:, k] >= 0) & (ids[:, k] // self.num_local == rank)
                term = weights[:, k, None] * x.float()
                partial = torch.where(is_here[:, None], partial + term, partial)
            total = total + partial.bfloat16().float()
        return total.bfloat16()

    def run(self) -> None:
        wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        for number in range(self.options.soak):
            wrong += ~self.step(number)
            if number % 1000 == 999 or number + 1 == self.options.soak:
                assert wrong.item() == 0, (
                    f"rank {self.rank}: wrong within the last 1000 of {number}"
                )
                if self.rank == 0:
                    print(f"{number + 1} operations right", file=sys.stderr, flush=True)


# ---- processes -------------------------------------------------------------------------------


def on_rank(group: Any, options: Options) -> list[dict[str, Any]]:
    """Measure on one GPU; all ranks return the same figures."""
    torch.cuda.set_device(dist.get_rank(group) % torch.cuda.device_count())
    if options.soak:
        Soak(group, options).run(options.soak)
        return []
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


def environment() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpus = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout
    return {
        "gpus": "; ".join(gpus.strip().splitlines()),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit.strip() or "unknown",
        "software": f"torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"Python {platform.python_version()}",
        "command": shlex.join(["python", *sys.argv]),
    }


def print_table(figures: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(figure["name"] for figure in figures))
    sizes = list(dict.fromkeys(figure["tokens"] for figure in figures))
    found = {(figure["name"], figure["tokens"]): figure for figure in figures}
    print("| p50 / p95, us | " + " | ".join(f"T = {size}" for size in sizes) + " |")
    print("|---|" + "---:|" * len(sizes))
    for name in names:
        cells = [found[name, size] for size in sizes]
        print(f"| {name} | " + " | ".join(f"{c['p50']:.1f} / {c['p95']:.1f}" for c in cells) + " |")


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
    parser.add_argument("--soak", type=int, default=0, help="random operations to check instead")
    parser.add_argument("--timeout-s", type=float, default=540.0, help="of the whole run")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    options = Options(
        tokens=tuple(map(int, args.tokens.split(","))),
        hidden=args.hidden,
        experts=args.experts,
        topk=args.topk,
        chain=args.chain,
        samples=args.samples,
        check_only=args.check_only,
        soak=args.soak,
        num_sms=args.num_sms,
    )
    figures = run_processes(on_rank, args.ranks, options, timeout_s=args.timeout_s)[0] or []
    if figures:
        print_table(figures)
    if args.out:
        result = {"environment": environment(), "figures": figures}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
