# SPDX-License-Identifier: Apache-2.0
"""What does it save that a token crosses the network once per destination node? On CPUs, as root.

    sudo python benchmarks/once_per_node.py --out benchmarks/results/cpu-once-per-node

Plays nodes as network namespaces whose interfaces send no faster than --rate, so that the network
is what takes the time. The same tokens are dispatched and combined by a buffer that knows the nodes
and by one that takes every rank for a node of its own, which sends a token once per rank. Beside
the times are the bytes that the busiest interface sent, what they take at that rate, and how many
rows the routing makes cross. A time is the maximum over ranks, after a barrier; every result is
checked against a plain sum.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from machine import write_results  # noqa: E402
from multinode import netns  # noqa: E402

from deepcomm import Buffer  # noqa: E402
from deepcomm.cli.environment import commit, hardware, versions  # noqa: E402
from deepcomm.testing.routing import RoutingShape, make_routing  # noqa: E402

TIMEOUT_S = 60.0
BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass(frozen=True)
class Setting:
    """What is measured, alike on all ranks."""

    num_nodes: int
    ranks_per_node: int
    num_tokens: int
    hidden: int
    num_experts: int
    num_topk: int
    routing: str
    samples: int

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node


@dataclass(frozen=True)
class Figure:
    """An operation of one way of sending.

    Attributes:
        operation: dispatch or combine.
        once_per: node, or rank.
        rows: That the busiest node sends to others, by the routing.
        sent_bytes: Of the busiest interface, headers included.
        bound_ms: What these take at the interface's rate.
        p50_ms: Of the operation.
        p95_ms: Likewise.
    """

    operation: str
    once_per: str
    rows: int
    sent_bytes: int
    bound_ms: float
    p50_ms: float
    p95_ms: float


# ---- What ranks do --------------------------------------------------------------------------


def rows_between(setting: Setting, ids: list[torch.Tensor], once_per: str) -> torch.Tensor:
    """Return rows that go from node to node, [N, N]."""
    rows = torch.zeros(setting.num_nodes, setting.num_nodes, dtype=torch.int64)
    num_local = setting.num_experts // setting.num_ranks
    width = setting.ranks_per_node if once_per == "node" else 1
    for rank, topk_idx in enumerate(ids):
        places = topk_idx // num_local // width
        count = torch.stack([(places == p).any(1).sum() for p in range(setting.num_ranks // width)])
        rows[rank // setting.ranks_per_node] += count.view(setting.num_nodes, -1).sum(1)
    return rows.fill_diagonal_(0)


def watch(call: Callable[[], Any]) -> tuple[float, int, Any]:
    """Return seconds and bytes that this node's interface sends meanwhile."""
    dist.barrier()
    before, start = netns.sent_bytes(), time.monotonic()
    result = call()
    seconds = time.monotonic() - start
    dist.barrier()
    return seconds, netns.sent_bytes() - before, result


def on_rank(group: Any, setting: Setting, once_per: str) -> dict[str, list[tuple[float, int]]]:
    """Return seconds and bytes of every sample, by operation."""
    torch.set_num_threads(1)
    rank = dist.get_rank(group)
    shape = RoutingShape(setting.num_ranks, setting.num_experts, setting.num_topk)
    routed = make_routing(setting.routing, shape, 0)(rank, setting.num_tokens)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(setting.num_tokens, setting.hidden, generator=generator).bfloat16()
    owner = routed.topk_idx // (setting.num_experts // setting.num_ranks)
    num_owners = sum((owner == r).any(1).int() for r in range(setting.num_ranks))
    samples: dict[str, list[tuple[float, int]]] = {"dispatch": [], "combine": []}
    with Buffer(
        group,
        num_experts=setting.num_experts,
        num_topk=setting.num_topk,
        hidden=setting.hidden,
        max_tokens_per_rank=setting.num_tokens,
        device="cpu",
        timeout_s=TIMEOUT_S,
        ranks_per_node=setting.ranks_per_node if once_per == "node" else 1,
    ) as buffer:
        for index in range(setting.samples + 1):
            *dispatch, output = watch(partial(buffer.dispatch, x, routed.topk_idx))
            y = output.x.clone()
            *combine, sums = watch(partial(buffer.combine, y, output.handle))
            expected = x.float() * num_owners[:, None]
            torch.testing.assert_close(sums.x.float(), expected, rtol=0.02, atol=0.0)
            if index > 0:  # connections are made by the first
                samples["dispatch"].append((dispatch[0], dispatch[1]))
                samples["combine"].append((combine[0], combine[1]))
    return samples


# ---- Figures --------------------------------------------------------------------------------


def measure(setting: Setting, rate: str) -> list[Figure]:
    """Measure both ways, on nodes of their own."""
    shape = RoutingShape(setting.num_ranks, setting.num_experts, setting.num_topk)
    source = make_routing(setting.routing, shape, 0)
    ids = [source(rank, setting.num_tokens).topk_idx for rank in range(setting.num_ranks)]
    figures = []
    for once_per in ("node", "rank"):
        print(f"once per {once_per} ...", file=sys.stderr, flush=True)
        with netns.nodes_of(setting.num_nodes, shm_bytes=4 << 30) as nodes:
            for node in nodes:
                node.limit_rate(rate)
            found = netns.run_on_nodes(
                nodes, setting.ranks_per_node, on_rank, setting, once_per, timeout_s=300.0
            )
        rows = rows_between(setting, ids, once_per)
        for operation in ("dispatch", "combine"):
            samples = np.array([entry[operation] for entry in found])  # [R, samples, 2]
            crossing = rows.sum(1 if operation == "dispatch" else 0)
            figures.append(figure_of(samples, operation, once_per, int(crossing.max()), rate))
    return figures


def figure_of(samples: np.ndarray, operation: str, once_per: str, rows: int, rate: str) -> Figure:
    times = samples[:, :, 0].max(0) * 1e3
    sent = float(np.median(samples[:, :, 1].max(0)))
    return Figure(
        operation=operation,
        once_per=once_per,
        rows=rows,
        sent_bytes=int(sent),
        bound_ms=sent / bytes_per_s(rate) * 1e3,
        p50_ms=float(np.percentile(times, 50)),
        p95_ms=float(np.percentile(times, 95)),
    )


def bytes_per_s(rate: str) -> float:
    """Return what ``tc`` means by a rate."""
    for unit, factor in BITS.items():
        if rate.endswith(unit):
            return float(rate.removesuffix(unit)) * factor / 8
    raise SystemExit(f"--rate: expected a number with {', '.join(BITS)}, got {rate!r}")


def table(figures: list[Figure]) -> list[str]:
    """Return lines of markdown, with the ratios of rows, bytes and times."""
    lines = [
        "| operation | once per | rows | MB sent | bound ms | p50 ms | p95 ms | of the bound |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for f in figures:
        lines.append(
            f"| {f.operation} | {f.once_per} | {f.rows} | {f.sent_bytes / 1e6:.2f} "
            f"| {f.bound_ms:.1f} | {f.p50_ms:.1f} | {f.p95_ms:.1f} | {f.p50_ms / f.bound_ms:.3f} |"
        )
    lines += ["", "| operation | rows, rank / node | bytes | time | time beside rows |"]
    lines.append("|---|---:|---:|---:|---:|")
    for operation, pair in itertools.groupby(sorted(figures, key=key), lambda f: f.operation):
        node, rank = pair
        rows, sent = rank.rows / node.rows, rank.sent_bytes / node.sent_bytes
        took = rank.p50_ms / node.p50_ms
        lines.append(
            f"| {operation} | {rows:.3f} | {sent:.3f} | {took:.3f} | {took / rows - 1:+.1%} |"
        )
    return lines


def key(figure: Figure) -> tuple[str, str]:
    return figure.operation, figure.once_per


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--nodes", type=int, default=2)
    add("--ranks-per-node", type=int, default=4)
    add("--tokens", type=int, default=512, help="of a rank")
    add("--hidden", type=int, default=2048)
    add("--experts", type=int, default=64, help="of all ranks")
    add("--topk", type=int, default=8)
    add("--routing", default="uniform", help="as of deepcomm bench")
    add("--rate", default="200mbit", help="of every node's interface")
    add("--samples", type=int, default=9)
    add("--out", type=Path, help="write OUT.json and OUT.md")
    return parser.parse_args()


def main() -> None:
    args = parse()
    bytes_per_s(args.rate)
    setting = Setting(
        args.nodes,
        args.ranks_per_node,
        args.tokens,
        args.hidden,
        args.experts,
        args.topk,
        args.routing,
        args.samples,
    )
    figures = measure(setting, args.rate)
    facts = {
        "hardware": ", ".join(f"{name} {value}" for name, value in hardware().items()),
        "software": ", ".join(f"{name} {value}" for name, value in versions().items()),
        "commit": (commit() or "unknown")[:7],
        "command": " ".join(["python", *sys.argv]),
        "shape": f"{args.nodes} nodes x {args.ranks_per_node} ranks x {args.tokens} tokens, hidden "
        f"{args.hidden}, BF16, top-{args.topk} of {args.experts}, {args.routing}",
        "interfaces": args.rate,
    }
    lines = ["# Once per node", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += table(figures)
    print("\n".join(lines))
    if args.out:
        result = {"environment": facts, "figures": [asdict(figure) for figure in figures]}
        write_results(args.out, result, [*lines, ""])


if __name__ == "__main__":
    main()
