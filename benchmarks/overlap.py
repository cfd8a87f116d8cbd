# SPDX-License-Identifier: Apache-2.0
"""What do GEMMs and communication cost each other, and what does a training step gain by overlap?

    python benchmarks/overlap.py --out benchmarks/results/2x-h200-overlap

One process a GPU. Dispatch and combine are first compared with the reference, a step's results with
autograd's at a small size, and those of overlapped steps with those in sequence to the bit. Then

- chains of BF16 GEMMs run alone and beside dispatches (FP8 given, TOKEN, with a capacity) or
  combines that run back to back on the communication stream (overlap_gemm.py): their slowdown
  beside the share of the SMs given away, and what an operation takes beside them;
- training steps of two micro-batches run in sequence and overlapped (overlap_training.py), with a
  picture of one step each way on rank 0, the one of median time.

A sample is launched while the GPU is kept busy, and is the maximum over ranks. Variants take turns,
all of them twice: the second median shows the noise. Rows are random BF16, larger than the L2
cache. With --device cpu and small sizes the program can be tried without GPUs; its times then mean
nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from collective.case import Case  # noqa: E402
from collective.scenario import exchange  # noqa: E402
from machine import environment, write_results  # noqa: E402
from overlap_gemm import TOLERANCE, measure_gemms, sms_given_away  # noqa: E402
from overlap_gemm import Figure as GemmFigure  # noqa: E402
from overlap_timing import Setting, Timing  # noqa: E402
from overlap_training import NUM_GENERATIONS, measure_training  # noqa: E402
from overlap_training import Figure as StepFigure  # noqa: E402
from timeline import Timeline, write_timelines  # noqa: E402

from deepcomm import Buffer  # noqa: E402
from deepcomm.testing import run_processes  # noqa: E402

TIMEOUT_S = 10.0
RUN_LIMIT_S = 95.0
CHECKED_TOKENS = 64
ENVIRONMENT = {
    # Streams that share a hardware queue would wait for each other.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    # As large as torch's own on such GPUs, and with it cuBLAS promises the same bits.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


@dataclass(frozen=True)
class Result:
    """What one rank has measured: the figures are the same on all."""

    gemms: list[GemmFigure]
    steps: list[StepFigure]
    timelines: list[Timeline]
    sms_given_away: float
    num_sms: int | None


# ---- One rank -------------------------------------------------------------------------------


def check_operations(group: Any, setting: Setting) -> None:
    """Compare dispatch and combine with the reference; raises AssertionError."""
    base = Case(
        num_ranks=group.size(),
        num_tokens=CHECKED_TOKENS,
        hidden=setting.hidden,
        num_topk=min(4, setting.num_topk),
        experts_per_rank=4,
        device=setting.device,
    )
    capacity = base.num_ranks * CHECKED_TOKENS
    for wire in ("bf16", "scaled"):
        case = dataclasses.replace(base, wire=wire, capacity=capacity)
        exchange(group, case, None, num_low_latency_slots=0, timeout_s=TIMEOUT_S)


def run_rank(group: Any, setting: Setting) -> Result:
    """Check, then measure."""
    if setting.device == "cuda":
        torch.cuda.set_device(group.rank())
    check_operations(group, setting)
    with Buffer(
        group,
        num_experts=setting.num_experts,
        num_topk=setting.num_topk,
        hidden=setting.hidden,
        max_tokens_per_rank=setting.num_tokens,
        device=setting.device,
        num_sms=setting.num_sms,
        num_generations=NUM_GENERATIONS,
        num_low_latency_slots=0,
        timeout_s=TIMEOUT_S,
    ) as buffer:
        steps, timelines = measure_training(buffer, setting)
        gemms = measure_gemms(buffer, setting)
        return Result(gemms, steps, timelines, sms_given_away(buffer), buffer.config.num_sms)


# ---- The report -----------------------------------------------------------------------------


def cells(timing: Timing | None) -> str:
    if timing is None:
        return "| | | "
    return f"| {timing.p50:.1f} | {timing.p50_again:.1f} | {timing.p95:.1f} "


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.1f} %"


def gemm_table(result: Result) -> list[str]:
    limit = percent(result.sms_given_away + TOLERANCE)
    return [
        "## GEMMs beside communication",
        "",
        f"The communication has {percent(result.sms_given_away)} of the SMs; the GEMMs may take "
        f"{limit} longer beside it.",
        "",
        "| what | GEMMs p50 us | again | p95 | slower | limit | an operation p50 us | again | p95 "
        "| slower |",
        "|---|---:|---:|---:|---:|---|---:|---:|---:|---:|",
        *(
            f"| {f.name} {cells(f.gemms)}| {percent(f.gemm_slowdown)} "
            f"| {VERDICTS[f.is_met]} {cells(f.operation)}| {percent(f.operation_slowdown)} |"
            for f in result.gemms
        ),
        "",
    ]


VERDICTS = {None: "", True: "met", False: "missed"}


def step_table(result: Result) -> list[str]:
    return [
        "## A training step",
        "",
        "Hidden: the time saved, as a part of the time of communication in sequence.",
        "",
        "| way | step p50 us | again | p95 | speedup | hidden |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {f.name} {cells(f.step)}| {f.speedup:.3f} | {percent(f.hidden)} |"
            for f in result.steps
        ),
        "",
    ]


def facts_of(args: argparse.Namespace) -> dict[str, str]:
    m, n, k = args.gemm
    facts = {"device": f"CPU, Python {platform.python_version()}"}
    if args.device == "cuda":
        facts = environment(args.commit)
    return {
        **facts,
        "shape": f"{args.ranks} ranks x {args.tokens} tokens (a micro-batch likewise), hidden "
        f"{args.hidden}, {args.experts} experts, top-{args.topk}, {args.sms} SMs",
        "gemms": f"2 x ({m} x {k} by {k} x {n}, and back), BF16",
        "step": f"2 micro-batches; dense block {args.hidden} - {args.dense} - {args.hidden}, "
        f"experts of a rank {args.hidden} - {args.intermediate} - {args.hidden}, one visit a row",
    }


def write(prefix: Path, lines: list[str], facts: dict[str, str], result: Result) -> None:
    content = {"environment": facts, **asdict(result)}
    write_results(prefix, content, lines)
    title = "A training step of two micro-batches on one rank of an expert-parallel layer"
    write_timelines(prefix.with_suffix(".png"), title, result.timelines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--ranks", type=int, default=2, help="processes, one a GPU")
    add("--tokens", type=int, default=4096, help="of a rank and micro-batch")
    add("--hidden", type=int, default=7168)
    add("--experts", type=int, default=256, help="of all ranks")
    add("--topk", type=int, default=8)
    add("--sms", type=int, default=24, help="SMs of an operation")
    add("--gemm", type=int, nargs=3, default=[8192, 4096, 7168], metavar=("M", "N", "K"))
    add("--dense", type=int, default=4096, help="inner size of the dense block")
    add("--intermediate", type=int, default=2048, help="inner size of the experts")
    add("--repeats", type=int, default=25, help="samples of a variant and pass")
    add("--limit-s", type=float, default=RUN_LIMIT_S, help="then the ranks are killed")
    add("--commit", default="unknown", help="goes into the result")
    add("--out", type=Path, help="write OUT.json, OUT.md and OUT.png")
    return parser.parse_args()


def main() -> None:
    args = parse()
    most = torch.cuda.device_count() if args.device == "cuda" else args.ranks
    if not 2 <= args.ranks <= most:
        raise SystemExit(f"--ranks: expected 2..{most} GPUs, got {args.ranks}")
    setting = Setting(
        device=args.device,
        num_tokens=args.tokens,
        hidden=args.hidden,
        num_experts=args.experts,
        num_topk=args.topk,
        num_sms=args.sms,
        gemm=tuple(args.gemm),
        dense=args.dense,
        intermediate=args.intermediate,
        repeats=args.repeats,
    )
    env = [ENVIRONMENT] * args.ranks
    results = run_processes(run_rank, args.ranks, setting, env=env, timeout_s=args.limit_s)
    result = results[0]
    assert result is not None
    facts = facts_of(args)
    lines = ["# Overlap", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += gemm_table(result) + step_table(result)
    print("\n".join(lines))
    if args.out:
        write(args.out, lines, facts, result)


if __name__ == "__main__":
    main()
