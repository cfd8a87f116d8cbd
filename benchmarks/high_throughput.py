# SPDX-License-Identifier: Apache-2.0
"""How long do dispatch and combine take between the GPUs of a machine, beside its links and NCCL?

One process a GPU. Everything is first compared with the reference at a small size, then measured as
``exchange`` says, with ``nccl`` beside it. Lists of sizes are measured in all combinations.

wire GB/s: bytes that the busiest rank sends to other ranks (rows and FP8 scales; ids and weights,
12 K bytes a row, are left out), by the p50. recv GB/s: rows received by the busiest rank, its own
included, as DeepEP counts them. The fraction is that of the wire by LINK_GBPS.
Limits: both ways at once, by the copy engines and by bulk stores of the SMs.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from exchange import VARIANTS, Figure, Setting, check_small, measure, table  # noqa: E402
from machine import environment, link_limits, write_results  # noqa: E402
from nccl import timed_nccl  # noqa: E402

from deepcomm.testing import run_processes  # noqa: E402

RUN_LIMIT_S = 90.0


def run_rank(group: Any, settings: list[Setting], only: str, repeats: int) -> list[Figure]:
    """Check, then measure every setting."""
    torch.cuda.set_device(dist.get_rank())
    kinds = {(each.hidden, each.num_topk, each.ranks_per_node): each for each in settings}
    for setting in kinds.values():
        check_small(group, setting)
    nccl = dist.new_group(backend="nccl")
    assert isinstance(nccl, dist.ProcessGroup)
    variants = tuple(variant for variant in VARIANTS if only in variant.name)
    opponents = functools.partial(timed_nccl, nccl)
    return [
        figure
        for setting in settings
        for figure in measure(group, setting, variants, opponents, repeats)
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ranks", type=int, default=torch.cuda.device_count(), help="processes, one a GPU")
    add("--ranks-per-node", type=int, help="play nodes of so many ranks")
    add("--tokens", type=int, nargs="+", default=[4096], help="of a rank")
    add("--hidden", type=int, nargs="+", default=[7168])
    add("--experts", type=int, default=256, help="of all ranks")
    add("--topk", type=int, nargs="+", default=[8])
    add("--sms", type=int, nargs="+", default=[24], help="SMs of an operation")
    add("--routing", nargs="+", default=["uniform"], help="as of deepcomm bench")
    add("--only", default="", help="what has this in its name")
    add("--repeats", type=int, default=40, help="replays of a variant and pass")
    add("--limit-s", type=float, default=RUN_LIMIT_S, help="then the ranks are killed")
    add("--commit", default="unknown", help="goes into the result")
    add("--out", type=Path, help="write OUT.json and OUT.md")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if not 2 <= args.ranks <= torch.cuda.device_count():
        raise SystemExit(f"--ranks: expected 2..{torch.cuda.device_count()} GPUs, got {args.ranks}")
    settings = [
        Setting(
            num_tokens,
            hidden,
            args.experts,
            num_topk,
            args.ranks_per_node,
            tuple(args.sms),
            tuple(args.routing),
        )
        for num_tokens, hidden, num_topk in itertools.product(args.tokens, args.hidden, args.topk)
    ]
    # NVLink multicast needs rights that many containers lack.
    env = [{"NCCL_NVLS_ENABLE": "0"}] * args.ranks
    work = (settings, args.only, args.repeats)
    results = run_processes(run_rank, args.ranks, *work, env=env, timeout_s=args.limit_s)
    figures = results[0] or []
    limits = link_limits(10)
    facts = {**environment(args.commit), "ranks": str(args.ranks)}
    lines = ["# High throughput", "", *(f"- {key}: {value}" for key, value in facts.items())]
    lines += [f"- limit, {name}: {rate:.1f} GB/s" for name, rate in limits.items()]
    lines += ["", *table(figures)]
    print("\n".join(lines))
    if args.out:
        result = {"environment": facts, "limits_gbps": limits}
        result["figures"] = [asdict(figure) for figure in figures]
        write_results(args.out, result, lines)


if __name__ == "__main__":
    main()
