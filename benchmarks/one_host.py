# SPDX-License-Identifier: Apache-2.0
"""Everything about one host of two, four or eight GPUs: is it right, and how fast is it?

    python benchmarks/one_host.py --commit abc1234 --out benchmarks/results/4x-h200

Stages, each a set of processes of its own, one process a GPU: the correctness matrix (all layouts,
wires, routings, capacities and shapes, also over virtual nodes, and low latency) bit for bit
against the reference; ``high_throughput`` over tokens, SMs and routings beside NCCL; the same over
two virtual nodes; ``low_latency``. A stage that fails is named in the result and leaves the others
their turn. NVLink multicast stays off.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import high_throughput  # noqa: E402
import low_latency  # noqa: E402
from collective.scenario import low_latency_exchange  # noqa: E402
from exchange import Figure, Setting, table  # noqa: E402
from gpu import backend_cases, backend_ranks  # noqa: E402
from machine import environment, link_limits, write_results  # noqa: E402

from deepcomm import RecvLayout  # noqa: E402
from deepcomm.testing import run_processes  # noqa: E402

HIDDEN, NUM_EXPERTS, NUM_TOPK = 7168, 256, 8
TOKENS = (1024, 4096, 8192)
NUMS_SMS = (8, 16, 24)
ROUTINGS = ("uniform", "zipf:1.0", "deepseek-v3")
LOW_LATENCY_TOKENS = (1, 8, 32, 64, 128, 256, 512)
NODES_TOKENS, NODES_SMS = 4096, 24
ALL = ""  # variants, by what is in their names
STAGES = ("correctness", "low latency", "two virtual nodes", "high throughput", "limits")


@dataclass
class Result:
    """What the stages have found; becomes the JSON."""

    environment: dict[str, str]
    num_cases: dict[str, int] = field(default_factory=dict)
    limits_gbps: dict[str, float] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    low_latency: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


# ---- What ranks do --------------------------------------------------------------------------


def check_matrix(group: Any) -> dict[str, int]:
    """Compare every case with the reference; return how many there were of each kind."""
    torch.cuda.set_device(dist.get_rank())
    num_ranks = dist.get_world_size()
    one_node = backend_cases.matrix(num_ranks)
    nodes = backend_cases.nodes_matrix(num_ranks, num_ranks // 2)
    split_phase = [
        case
        for case in backend_cases.wire_cases(backend_cases.base_case(num_ranks))
        if case.layout is not RecvLayout.EXPERT
    ]
    backend_ranks.exchange_all(group, one_node)
    backend_ranks.exchange_all(group, nodes)
    for case in split_phase:
        low_latency_exchange(group, case)
    counts = {"one node": one_node, "two virtual nodes": nodes, "low latency": split_phase}
    return {kind: len(cases) for kind, cases in counts.items()}


# ---- Stages ---------------------------------------------------------------------------------


def settings_of(ranks_per_node: int | None) -> list[Setting]:
    """Return what is measured on one node, or over nodes."""
    if ranks_per_node is not None:
        sizes = (NODES_TOKENS, HIDDEN, NUM_EXPERTS, NUM_TOPK)
        return [Setting(*sizes, ranks_per_node, (NODES_SMS,), ("uniform",))]
    return [
        Setting(num_tokens, HIDDEN, NUM_EXPERTS, NUM_TOPK, None, NUMS_SMS, ROUTINGS)
        for num_tokens in TOKENS
    ]


def stages(result: Result, num_ranks: int, repeats: int) -> dict[str, Callable[[float], None]]:
    """Return the stages by name; each gets the seconds it may take."""

    def ranks(limit_s: float, body: Callable[..., Any], *args: Any) -> Any:
        env = [{"NCCL_NVLS_ENABLE": "0"}] * num_ranks
        return run_processes(body, num_ranks, *args, env=env, timeout_s=limit_s)[0]

    def correctness(limit_s: float) -> None:
        result.num_cases = ranks(limit_s, check_matrix)

    def one_node(limit_s: float) -> None:
        result.figures += ranks(limit_s, high_throughput.run_rank, settings_of(None), ALL, repeats)

    def virtual_nodes(limit_s: float) -> None:
        settings = settings_of(num_ranks // 2)
        result.figures += ranks(limit_s, high_throughput.run_rank, settings, ALL, repeats)

    def split_phase(limit_s: float) -> None:
        options = low_latency.Options(
            tokens=LOW_LATENCY_TOKENS,
            hidden=HIDDEN,
            experts=NUM_EXPERTS,
            topk=NUM_TOPK,
            chain=20,
            samples=30,
            check_only=False,
            num_sms=None,
        )
        result.low_latency = ranks(limit_s, low_latency.on_rank, options)

    def limits(_: float) -> None:
        result.limits_gbps = link_limits(10)

    bodies = (correctness, split_phase, virtual_nodes, one_node, limits)
    return dict(zip(STAGES, bodies, strict=True))


def run_stages(result: Result, args: argparse.Namespace) -> None:
    """Run the stages one after the other within the time of all; what each finds is written."""
    end = time.monotonic() + args.limit_s
    for name, stage in stages(result, args.ranks, args.repeats).items():
        if name not in args.stages:
            continue
        start = time.monotonic()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            stage(max(end - start, 1.0))
        except Exception as error:  # noqa: BLE001  # told in the result; other stages have their turn
            result.failures[name] = "".join(traceback.format_exception_only(error))
        result.seconds[name] = round(time.monotonic() - start, 1)
        what = result.failures.get(name, "done")
        print(f"{name}: {what} ({result.seconds[name]} s)", file=sys.stderr, flush=True)
        if args.out:
            path = args.out.with_name(f"{args.out.name}-one-host")
            write_results(path, asdict(result), report(result, args.ranks))


# ---- The report -----------------------------------------------------------------------------


def report(result: Result, num_ranks: int) -> list[str]:
    lines = [f"# One host, {num_ranks} GPUs", ""]
    lines += [f"- {key}: {value}" for key, value in result.environment.items()]
    lines += [f"- limit, {name}: {rate:.1f} GB/s" for name, rate in result.limits_gbps.items()]
    lines += [f"- equal to the reference, {k}: {n} cases" for k, n in result.num_cases.items()]
    lines += [f"- seconds, {name}: {value}" for name, value in result.seconds.items()]
    lines += [f"- FAILED, {name}: {text.strip()}" for name, text in result.failures.items()]
    lines += ["", *table(result.figures)]
    if result.low_latency:
        lines += ["## Low latency", "", *low_latency.table(result.low_latency), ""]
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--ranks", type=int, default=torch.cuda.device_count(), help="processes, one a GPU")
    add("--stages", nargs="+", choices=STAGES, default=STAGES, help="do only these")
    add("--repeats", type=int, default=20, help="replays of a variant and pass")
    add("--limit-s", type=float, default=470.0, help="then the ranks are killed")
    add("--commit", default="unknown", help="goes into the result")
    add("--out", type=Path, help="write OUT-one-host.json and OUT-one-host.md")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.ranks not in range(2, torch.cuda.device_count() + 1, 2):
        most = torch.cuda.device_count()
        raise SystemExit(f"--ranks: expected an even number of 2..{most} GPUs, got {args.ranks}")
    result = Result({**environment(args.commit), "ranks": str(args.ranks)})
    run_stages(result, args)
    print("\n".join(report(result, args.ranks)))
    if result.failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
