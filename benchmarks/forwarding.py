# SPDX-License-Identifier: Apache-2.0
"""What does forwarding cost by itself? The same ranks as one node and as several, on one GPU.

    python benchmarks/forwarding.py --out benchmarks/results/1x-h200-forwarding

Ranks are threads that share the GPU, its memory is every link, and nodes reach each other by loads
and stores: what is left between the columns is the rail's stage, its landing area and the stage
inside the node. Small operations of every kind are first compared with the reference. Bytes are
those that the counters of the busiest rank tell of one operation.
"""

from __future__ import annotations

import argparse
import functools
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from collective.session import Oracle  # noqa: E402
from exchange import (  # noqa: E402
    CHECKS,
    VARIANTS,
    Figure,
    Setting,
    Workload,
    check_small,
    measure,
    open_buffers,
    table,
)
from machine import environment, write_results  # noqa: E402

from deepcomm.testing import LocalCluster  # noqa: E402

CONTROL_PLANE_S = 300.0  # ranks build their graphs one after the other


@dataclass(frozen=True)
class Shape:
    """How the ranks are nodes, and what a rank then sends.

    Attributes:
        ranks_per_node: None: they are one node.
        bytes_node: Of one FP8 dispatch, to other ranks of the node.
        bytes_network: Of one FP8 dispatch, to other nodes.
        figures: What was measured.
    """

    ranks_per_node: int | None
    bytes_node: int
    bytes_network: int
    figures: list[Figure]


def play(group: Any, setting: Setting, oracles: list[Oracle], args: argparse.Namespace) -> Shape:
    """Check, count, measure; on every rank."""
    check_small(group, setting, oracles)
    load, (buffer,) = Workload(setting, setting.routings[0], group), open_buffers(group, setting)
    buffer.dispatch(load.scaled, load.ids, load.weights)
    stats = buffer.stats()
    bytes_node = max(group.all_gather(stats.bytes_node))
    bytes_network = max(group.all_gather(stats.bytes_network))
    buffer.close()
    del load
    variants = tuple(variant for variant in VARIANTS if args.only in variant.name)
    figures = measure(group, setting, variants, lambda *_: [], args.repeats)
    return Shape(setting.ranks_per_node, bytes_node, bytes_network, figures)


def comparison(shapes: list[Shape], num_ranks: int) -> list[str]:
    """Return lines of markdown: p50 of each variant, and its ratio to the first column."""
    names = [
        f"{num_ranks // (shape.ranks_per_node or num_ranks)}x{shape.ranks_per_node or num_ranks}"
        for shape in shapes
    ]
    lines = ["## Nodes x ranks", "", "| p50 us (ratio) | " + " | ".join(names) + " |"]
    lines.append("|---|" + "---:|" * len(names))
    for figures in zip(*(shape.figures for shape in shapes), strict=True):
        base = figures[0].p50
        cells = [f"{figure.p50:.0f} ({figure.p50 / base:.2f})" for figure in figures]
        lines.append(f"| {figures[0].name} | " + " | ".join(cells) + " |")
    for what in ("bytes_node", "bytes_network"):
        cells = [f"{getattr(shape, what) / 1e6:.1f}" for shape in shapes]
        lines.append(f"| {what} of an FP8 dispatch, MB | " + " | ".join(cells) + " |")
    return [*lines, ""]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--ranks", type=int, default=8, help="threads that share the GPU")
    add("--ranks-per-node", type=int, nargs="+", default=[4, 2], help="beside all in one node")
    add("--tokens", type=int, default=4096, help="of a rank")
    add("--hidden", type=int, default=7168)
    add("--experts", type=int, default=256, help="of all ranks")
    add("--topk", type=int, default=8)
    add("--sms", type=int, default=12, help="SMs of an operation of a rank")
    add("--only", default="", help="what has this in its name")
    add("--repeats", type=int, default=20, help="replays of a variant and pass")
    add("--commit", default="unknown", help="goes into the result")
    add("--out", type=Path, help="write OUT.json and OUT.md")
    return parser.parse_args()


def main() -> None:
    args = parse()
    shapes = []
    for ranks_per_node in (None, *args.ranks_per_node):
        sizes = (args.tokens, args.hidden, args.experts, args.topk)
        setting = Setting(*sizes, ranks_per_node, (args.sms,), ("uniform",))
        cluster = LocalCluster(args.ranks, device="cuda:0", timeout_s=CONTROL_PLANE_S)
        oracles = [Oracle() for _ in CHECKS]
        body = functools.partial(play, setting=setting, oracles=oracles, args=args)
        shapes.append(cluster.run(body)[0])
    facts = {**environment(args.commit), "ranks": f"{args.ranks}, threads on one GPU"}
    lines = ["# Forwarding", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += comparison(shapes, args.ranks)
    lines += table([figure for shape in shapes for figure in shape.figures])
    print("\n".join(lines))
    if args.out:
        content = {"environment": facts, "shapes": [asdict(shape) for shape in shapes]}
        write_results(args.out, content, lines)


if __name__ == "__main__":
    main()
