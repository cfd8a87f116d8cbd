# SPDX-License-Identifier: Apache-2.0
"""What do the facades of ``deepcomm.compat`` add to a call?

Each call of a facade takes turns with the native call that does the same work, back to back on all
ranks. Figures are percentiles of the slowest rank of each call; what a facade adds is the
difference of the medians. One token, where the call itself is shortest, shows the most.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deepcomm import Buffer, RecvLayout, compat
from deepcomm.cli.environment import commit, hardware, versions
from deepcomm.testing.spawn import run_processes

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch.distributed as dist

    Pair = tuple[Callable[[], object], Callable[[], object]]


@dataclass(frozen=True)
class Case:
    ranks: int
    tokens: tuple[int, ...]
    hidden: int
    experts: int
    topk: int
    iters: int
    device: str
    warmup: int = 20


@dataclass(frozen=True)
class Result:
    operation: str
    tokens: int
    native_p50_us: float
    facade_p50_us: float
    facade_p95_us: float
    added_us: float


@dataclass(frozen=True)
class Tokens:
    """Random tokens of one rank."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def run_rank(group: dist.ProcessGroup, case: Case) -> dict[tuple[str, int], list[list[int]]]:
    """Return nanoseconds of native and facade calls, by operation and tokens."""
    torch.set_num_threads(1)
    if case.device == "cuda":
        torch.cuda.set_device(group.rank() % torch.cuda.device_count())
    generator = torch.Generator().manual_seed(group.rank())
    native = Buffer(
        group,
        device=case.device,
        num_experts=case.experts,
        num_topk=case.topk,
        hidden=case.hidden,
        max_tokens_per_rank=max(case.tokens),
    )
    times = {}
    for count in case.tokens:
        scores = torch.rand(count, case.experts, generator=generator)
        weights, ids = scores.topk(case.topk)
        x = torch.randn(count, case.hidden, generator=generator).bfloat16()
        tokens = Tokens(*(tensor.to(case.device) for tensor in (x, ids, weights)))
        pairs = v1_pairs(native, compat.Buffer(group), tokens, case)
        pairs |= low_latency_pairs(native, compat.Buffer(group), tokens, case)
        elastic = compat.ElasticBuffer(group, num_max_tokens_per_rank=max(case.tokens))
        pairs |= v2_pairs(native, elastic, tokens, case)
        for name, pair in pairs.items():
            times[name, count] = clock(pair, case)
    native.close()
    return times


def v1_pairs(native: Buffer, facade: Any, tokens: Tokens, case: Case) -> dict[str, Pair]:
    counts = facade.get_dispatch_layout(tokens.ids, case.experts)
    options = {"topk_idx": tokens.ids, "topk_weights": tokens.weights}
    options |= {"num_tokens_per_expert": counts[2]}

    def whole() -> object:
        layout = facade.get_dispatch_layout(tokens.ids, case.experts)
        return facade.dispatch(tokens.x, **(options | {"num_tokens_per_expert": layout[2]}))

    def dispatch() -> object:
        return native.dispatch(tokens.x, tokens.ids, tokens.weights)

    ours, theirs = dispatch(), facade.dispatch(tokens.x, **options)
    return {
        "V1 get_dispatch_layout + dispatch": (dispatch, whole),
        "V1 dispatch": (dispatch, lambda: facade.dispatch(tokens.x, **options)),
        "V1 cached dispatch": (
            lambda: native.dispatch(tokens.x, handle=ours.handle),
            lambda: facade.dispatch(tokens.x, handle=theirs[4]),
        ),
        "V1 combine": (
            lambda: native.combine(ours.x, ours.handle),
            lambda: facade.combine(theirs[0], theirs[4]),
        ),
    }


def low_latency_pairs(native: Buffer, facade: Any, tokens: Tokens, case: Case) -> dict[str, Pair]:
    limit = max(case.tokens)

    def theirs() -> Any:
        return facade.low_latency_dispatch(tokens.x, tokens.ids, limit, case.experts, use_fp8=False)

    ours, received = native.low_latency_dispatch(tokens.x, tokens.ids), theirs()
    return {
        "V1 low_latency_dispatch": (
            lambda: native.low_latency_dispatch(tokens.x, tokens.ids),
            theirs,
        ),
        "V1 low_latency_combine": (
            lambda: native.low_latency_combine(ours.x, ours.handle, topk_weights=tokens.weights),
            lambda: facade.low_latency_combine(
                received[0], tokens.ids, tokens.weights, received[2]
            ),
        ),
    }


def v2_pairs(native: Buffer, facade: Any, tokens: Tokens, case: Case) -> dict[str, Pair]:
    def ours(layout: RecvLayout) -> Any:
        return native.dispatch(tokens.x, tokens.ids, tokens.weights, recv_layout=layout)

    def theirs(do_expand: bool) -> Any:
        return facade.dispatch(
            tokens.x, tokens.ids, tokens.weights, num_experts=case.experts, do_expand=do_expand
        )

    def counted() -> object:
        return theirs(True)[3].psum_num_recv_tokens_per_expert

    sent, received = ours(RecvLayout.TOKEN), theirs(False)
    return {
        "V2 dispatch": (lambda: ours(RecvLayout.TOKEN), lambda: theirs(False)),
        "V2 dispatch, expanded, counts read": (lambda: ours(RecvLayout.EXPERT), counted),
        "V2 cached dispatch": (
            lambda: native.dispatch(tokens.x, handle=sent.handle),
            lambda: facade.dispatch(tokens.x, handle=received[3]),
        ),
        "V2 combine": (
            lambda: native.combine(sent.x, sent.handle),
            lambda: facade.combine(received[0], received[3]),
        ),
    }


def clock(pair: Pair, case: Case) -> list[list[int]]:
    times: list[list[int]] = [[], []]
    synchronize = torch.cuda.synchronize if case.device == "cuda" else lambda: None
    for _ in range(case.warmup + case.iters):
        for series, call in zip(times, pair, strict=True):
            start = time.perf_counter_ns()
            call()
            synchronize()
            series.append(time.perf_counter_ns() - start)
    return [series[case.warmup :] for series in times]


def percentiles(case: Case) -> list[Result]:
    """Run all ranks and reduce over them."""
    by_rank = run_processes(run_rank, case.ranks, case, timeout_s=300)
    results = []
    for operation, tokens in by_rank[0] or {}:
        calls = torch.tensor([entry[operation, tokens] for entry in by_rank if entry])
        native, facade = calls.amax(0).double() / 1000
        p50, p95 = facade.quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
        base = float(native.quantile(0.5))
        numbers = (base, p50, p95, p50 - base)
        results.append(Result(operation, tokens, *(round(number, 1) for number in numbers)))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--iters", type=int, default=500)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    options = vars(parser.parse_args())
    target = options.pop("json")
    case = Case(**{**options, "tokens": tuple(options["tokens"])})
    results = percentiles(case)
    print("| call | T | native p50 us | facade p50 us | p95 us | added us |")
    print("|---|---|---|---|---|---|")
    for result in results:
        print(f"| {' | '.join(str(value) for value in asdict(result).values())} |")
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
