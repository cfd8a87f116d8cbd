# SPDX-License-Identifier: Apache-2.0
"""What does one call cost when there is next to nothing to move?

Each operation is called back to back by all ranks, which so keep each other in step: no barrier, no
skew from one. A time is one call on one rank; the figures are percentiles of the slowest rank of
each call. ``deepcomm bench`` puts a barrier before every call instead, and so also counts how late
the ranks leave it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from deepcomm import Buffer
from deepcomm.cli.environment import commit, hardware, versions
from deepcomm.testing.spawn import run_processes

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch.distributed as dist


@dataclass(frozen=True)
class Case:
    ranks: int
    tokens: tuple[int, ...]
    hidden: int
    experts: int
    topk: int
    iters: int
    warmup: int = 20


@dataclass(frozen=True)
class Result:
    operation: str
    tokens: int
    p50_us: float
    p95_us: float
    p99_us: float


def run_rank(group: dist.ProcessGroup, case: Case) -> dict[tuple[str, int], list[int]]:
    """Return nanoseconds of every call, by operation and tokens."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(group.rank())
    with Buffer(
        group,
        device="cpu",
        num_experts=case.experts,
        num_topk=case.topk,
        hidden=case.hidden,
        max_tokens_per_rank=max(case.tokens),
    ) as buffer:
        times = {}
        for tokens in case.tokens:
            for name, call in operations(buffer, case, tokens, generator).items():
                times[name, tokens] = clock(call, case)
        return times


def operations(
    buffer: Buffer, case: Case, tokens: int, generator: torch.Generator
) -> dict[str, Callable[[], object]]:
    """Return the calls to time on ``tokens`` random tokens."""
    x = torch.randn(tokens, case.hidden, generator=generator).bfloat16()
    scores = torch.rand(tokens, case.experts, generator=generator)
    topk_weights, topk_idx = scores.topk(case.topk)
    received = buffer.dispatch(x, topk_idx, topk_weights)
    padded = buffer.low_latency_dispatch(x, topk_idx, topk_weights)
    out = torch.empty_like(padded.x)
    return {
        "dispatch": lambda: buffer.dispatch(x, topk_idx, topk_weights),
        "combine": lambda: buffer.combine(received.x, received.handle),
        "low_latency_dispatch": lambda: buffer.low_latency_dispatch(
            x, topk_idx, topk_weights, out=out
        ),
        "low_latency_combine": lambda: buffer.low_latency_combine(padded.x, padded.handle),
    }


def clock(call: Callable[[], object], case: Case) -> list[int]:
    times = []
    for _ in range(case.warmup + case.iters):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return times[case.warmup :]


def percentiles(case: Case) -> list[Result]:
    """Run all ranks and reduce over them."""
    by_rank = run_processes(run_rank, case.ranks, case, timeout_s=300)
    results = []
    for operation, tokens in by_rank[0] or {}:
        calls = torch.tensor([entry[operation, tokens] for entry in by_rank if entry])
        slowest = calls.amax(0).double() / 1000
        quantiles = slowest.quantile(torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64))
        results.append(Result(operation, tokens, *(round(float(q), 1) for q in quantiles)))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--iters", type=int, default=500)
    parser.add_argument("--json", type=Path)
    options = vars(parser.parse_args())
    target = options.pop("json")
    case = Case(**{**options, "tokens": tuple(options["tokens"])})
    results = percentiles(case)
    print(f"{'operation':22} {'T':>4} {'p50 us':>8} {'p95 us':>8} {'p99 us':>8}")
    for result in results:
        print(
            f"{result.operation:22} {result.tokens:4} {result.p50_us:8} {result.p95_us:8} "
            f"{result.p99_us:8}"
        )
    if target is not None:
        document = {
            "hardware": hardware(),
            "versions": versions(),
            "commit": commit(),
            "case": asdict(case),
            "results": [asdict(result) for result in results],
        }
        target.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
