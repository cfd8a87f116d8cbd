# SPDX-License-Identifier: Apache-2.0
"""How long do dispatch and combine take between the GPUs of a machine, beside its links and NCCL?

One process a GPU. Everything is first compared with the reference at a small size. Then each
variant is a CUDA graph of 4 operations; a sample is a replay's time by events, divided by 4, of the
slowest rank; the first replays are left out. Variants take turns, all of them twice: the second
column of a pair shows the noise. Rows are random BF16, larger together than the L2 cache.

wire GB/s: bytes that the busiest rank sends to other ranks (rows and FP8 scales; ids and weights,
12 K bytes a row, are left out), by the p50. recv GB/s: rows received by the busiest rank, its own
included, as DeepEP counts them. The fraction is that of the wire by LINK_GBPS.
NCCL: all_to_all_single of the same rows with the permutation around it, its routing known before.
Limits: both ways at once, by the copy engines and by bulk stores of the SMs.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from collective.case import Case  # noqa: E402
from collective.scenario import exchange  # noqa: E402
from machine import environment, link_limits  # noqa: E402

from deepcomm import Buffer, RecvLayout, ScaledTensor  # noqa: E402
from deepcomm.cli.bench.baseline import TorchExchange  # noqa: E402
from deepcomm.fp8 import quantize_fp8  # noqa: E402
from deepcomm.testing import run_processes  # noqa: E402
from deepcomm.testing.routing import RoutingShape, make_routing  # noqa: E402

LINK_GBPS = 366.0  # what bulk stores reach in one direction
NUM_PASSES = 2
OPS_IN_GRAPH = 4
WARM_UP = 5
ALIGNMENT = 128
TIMEOUT_S = 10.0
RUN_LIMIT_S = 90.0
TOKEN, EXPERT = RecvLayout.TOKEN, RecvLayout.EXPERT


@dataclass(frozen=True)
class Setting:
    """What is measured, the same for all ranks."""

    num_tokens: int
    hidden: int
    num_experts: int
    num_topk: int
    num_sms: tuple[int, ...]
    routings: tuple[str, ...]
    repeats: int


@dataclass(frozen=True)
class Variant:
    """An operation: its wire is that of the dispatch, or of the one before a combine."""

    name: str
    operation: str  # dispatch, cached, combine
    layout: RecvLayout
    wire: str  # bf16, given, cast
    in_place: bool = False


VARIANTS = (
    Variant("dispatch, FP8 given", "dispatch", TOKEN, "given"),
    Variant("dispatch, cast to FP8", "dispatch", TOKEN, "cast"),
    Variant("dispatch, BF16", "dispatch", TOKEN, "bf16"),
    Variant("cached dispatch, FP8 given", "cached", TOKEN, "given"),
    Variant("cached dispatch, BF16", "cached", TOKEN, "bf16"),
    Variant("dispatch, FP8 given, EXPERT aligned 128", "dispatch", EXPERT, "given"),
    Variant("dispatch, BF16, EXPERT aligned 128", "dispatch", EXPERT, "bf16"),
    Variant("combine, ordinary tensor", "combine", TOKEN, "bf16"),
    Variant("combine, in the received rows", "combine", TOKEN, "bf16", in_place=True),
    Variant("weighted combine from EXPERT", "combine", EXPERT, "bf16"),
)


@dataclass
class Timed:
    """Something to time, and the bytes that it moves."""

    name: str
    num_sms: int | None
    routing: str
    run: Callable[[], Any]
    ops: int
    sent_bytes: int
    recv_bytes: int
    passes: list[list[float]] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class Figure:
    """One line of the result; times in us."""

    name: str
    num_sms: int | None
    routing: str
    p50: float
    p50_again: float
    p95: float
    wire_gbps: float
    recv_gbps: float
    fraction: float


# ---- One rank -------------------------------------------------------------------------------


class Workload:
    """Rows and routing of this rank, and the bytes they are on the way."""

    def __init__(self, setting: Setting, routing: str) -> None:
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        shape = RoutingShape(num_ranks, setting.num_experts, setting.num_topk)
        routed = make_routing(routing, shape, 0)(rank, setting.num_tokens)
        generator = torch.Generator(device="cuda").manual_seed(rank)
        size = (setting.num_tokens, setting.hidden)
        self.setting = setting
        self.x = torch.randn(size, device="cuda", generator=generator).bfloat16()
        self.scaled: ScaledTensor = quantize_fp8(self.x)
        self.ids, self.weights = routed.topk_idx.cuda(), routed.topk_weights.cuda()
        owner = routed.topk_idx // (setting.num_experts // num_ranks)
        owner[routed.topk_idx < 0] = -1
        to = torch.stack([(owner == dst).any(1).sum() for dst in range(num_ranks)])
        table = torch.stack(all_gather(to))
        self.sent_rows = int((table.sum(1) - table.diagonal()).max())
        self.recv_rows = int(table.sum(0).max())
        # What a combine sends is what its dispatch received from others.
        self.back_rows = int((table.sum(0) - table.diagonal()).max())

    def row_bytes(self, wire: str) -> int:
        hidden = self.setting.hidden
        return 2 * hidden if wire == "bf16" else hidden + 4 * -(-hidden // 128)


def all_gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


def capture(buffer: Buffer, load: Workload, variant: Variant) -> Callable[[], Any]:
    """Return what replays 4 operations."""
    x = load.scaled if variant.wire == "given" else load.x
    by_expert = variant.layout is EXPERT
    quantize: dict[str, Any] = {"quantize": "fp8_e4m3" if variant.wire == "cast" else None}
    routing: dict[str, Any] = {"recv_layout": variant.layout}
    if by_expert:
        routing["expert_alignment"] = ALIGNMENT
    exact = buffer.dispatch(x, load.ids, load.weights, **routing, **quantize)
    capacity = exact.x.shape[0] if by_expert else load.x.shape[0] * buffer.num_ranks
    del exact
    routing["num_recv_tokens"] = capacity
    output = buffer.dispatch(x, load.ids, load.weights, **routing, **quantize)
    handle, rows = output.handle, output.x
    y = rows if variant.in_place else None
    if variant.operation == "combine" and y is None:
        y = torch.randn(rows.shape, device="cuda").bfloat16()
    del output, rows  # with them goes the lease: all variants take turns in one landing area

    def call() -> None:
        if variant.operation == "combine":
            buffer.combine(y, handle, apply_weights=by_expert)
        elif variant.operation == "cached":
            buffer.dispatch(x, None, load.weights, handle=handle, **quantize)
        else:
            buffer.dispatch(x, load.ids, load.weights, **routing, **quantize)

    call()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads
        for _ in range(OPS_IN_GRAPH):
            call()
    dist.barrier()

    def replay(keep: object = (y, handle)) -> None:
        del keep
        graph.replay()

    return replay


def open_buffers(group: Any, setting: Setting) -> list[Buffer]:
    """Return a buffer for each number of SMs."""
    return [
        Buffer(
            group,
            num_experts=setting.num_experts,
            num_topk=setting.num_topk,
            hidden=setting.hidden,
            max_tokens_per_rank=setting.num_tokens,
            device="cuda",
            num_sms=num_sms,
            num_low_latency_slots=0,
            timeout_s=TIMEOUT_S,
        )
        for num_sms in setting.num_sms
    ]


def timed_variants(buffers: list[Buffer], load: Workload, routing: str) -> list[Timed]:
    """Capture all variants for every number of SMs."""
    result = []
    for buffer in buffers:
        for variant in VARIANTS:
            run = capture(buffer, load, variant)
            is_combine = variant.operation == "combine"
            row = load.row_bytes("bf16" if is_combine else variant.wire)
            moved = ((load.back_rows if is_combine else load.sent_rows) * row, load.recv_rows * row)
            num_sms = buffer.config.num_sms
            result.append(Timed(variant.name, num_sms, routing, run, OPS_IN_GRAPH, *moved))
    return result


def timed_nccl(group: dist.ProcessGroup, load: Workload, routing: str) -> list[Timed]:
    """Return the same exchange as a torch user writes it."""
    setting, num_tokens = load.setting, load.setting.num_tokens
    user = TorchExchange(group, setting.num_experts, keep_tensors=True)
    plan = user.route(load.ids)
    y = torch.randn(sum(plan.recv_rows), setting.hidden, device="cuda").bfloat16()
    data, scales = load.scaled.data.view(torch.uint8), load.scaled.scales

    def exchange_rows(x: torch.Tensor) -> torch.Tensor:
        send = x.index_select(0, plan.token)
        recv = x.new_empty(sum(plan.recv_rows), x.shape[1])
        dist.all_to_all_single(recv, send, plan.recv_rows, plan.send_rows, group=group)
        return recv

    def exchange_scaled() -> None:
        exchange_rows(data)
        exchange_rows(scales)

    given, bf16 = load.row_bytes("given"), load.row_bytes("bf16")
    calls: list[tuple[str, Callable[[], Any], int, int]] = [
        ("NCCL dispatch, FP8 given", exchange_scaled, load.sent_rows, given),
        ("NCCL dispatch, BF16", lambda: exchange_rows(load.x), load.sent_rows, bf16),
        ("NCCL combine", lambda: user.combine(y, plan, num_tokens), load.back_rows, bf16),
    ]
    return [
        Timed(name, None, routing, call, 1, rows * row, load.recv_rows * row)
        for name, call, rows, row in calls
    ]


def time_pass(item: Timed, repeats: int) -> list[float]:
    """Return us of each sample, of the slowest rank."""
    torch.cuda.synchronize()
    dist.barrier()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(WARM_UP + repeats + 1)]
    events[0].record()
    for event in events[1:]:
        item.run()
        event.record()
    torch.cuda.synchronize()
    spans = itertools.pairwise(events)
    times = torch.tensor([start.elapsed_time(end) * 1e3 / item.ops for start, end in spans])
    slowest = torch.stack(all_gather(times)).max(0).values[WARM_UP:]
    return [float(time) for time in slowest]


def check_small(group: Any, setting: Setting) -> None:
    """Compare every kind of operation with the reference; raises AssertionError."""
    num_ranks = dist.get_world_size()
    base = Case(
        num_ranks=num_ranks,
        num_tokens=64,
        hidden=setting.hidden,
        num_topk=min(4, setting.num_topk),
        experts_per_rank=4,
        device="cuda",
    )
    for change in (
        {},
        {"wire": "scaled"},
        {"wire": "fp8"},
        {"layout": EXPERT, "alignment": ALIGNMENT},
        {"layout": EXPERT, "alignment": ALIGNMENT, "wire": "scaled"},
    ):
        case = dataclasses.replace(base, **change)
        exchange(group, case, None, num_low_latency_slots=0, timeout_s=TIMEOUT_S)


def run_rank(group: Any, setting: Setting) -> list[Figure]:
    """Check, then measure every routing."""
    torch.cuda.set_device(dist.get_rank())
    check_small(group, setting)
    nccl = dist.new_group(backend="nccl")
    assert isinstance(nccl, dist.ProcessGroup)
    figures = []
    for routing in setting.routings:
        load, buffers = Workload(setting, routing), open_buffers(group, setting)
        items = [*timed_variants(buffers, load, routing), *timed_nccl(nccl, load, routing)]
        for _ in range(NUM_PASSES):
            for item in items:
                item.passes.append(time_pass(item, setting.repeats))
        figures += [figure_of(item) for item in items]
        del items
        for buffer in buffers:  # raises what went wrong in a graph
            buffer.dispatch(load.x, load.ids)
            torch.cuda.synchronize()
            dist.barrier()
            buffer.close()
    return figures


def figure_of(item: Timed) -> Figure:
    first, again = (float(np.percentile(times, 50)) for times in item.passes)
    wire = item.sent_bytes / first / 1e3
    return Figure(
        name=item.name,
        num_sms=item.num_sms,
        routing=item.routing,
        p50=first,
        p50_again=again,
        p95=float(np.percentile(np.concatenate(item.passes), 95)),
        wire_gbps=wire,
        recv_gbps=item.recv_bytes / first / 1e3,
        fraction=wire / LINK_GBPS,
    )


# ---- The report -----------------------------------------------------------------------------


def table(figures: list[Figure]) -> list[str]:
    head = (
        "| what | routing | SMs | p50 us | p50 again | p95 | wire GB/s | recv GB/s "
        f"| of {LINK_GBPS:.0f} |"
    )
    rows = [
        f"| {f.name} | {f.routing} | {f.num_sms or ''} | {f.p50:.1f} | {f.p50_again:.1f} "
        f"| {f.p95:.1f} | {f.wire_gbps:.0f} | {f.recv_gbps:.0f} | {f.fraction:.2f} |"
        for f in figures
    ]
    return [head, "|---|---|---:|---:|---:|---:|---:|---:|---:|", *rows, ""]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ranks", type=int, default=torch.cuda.device_count(), help="processes, one a GPU")
    add("--tokens", type=int, default=4096, help="of a rank")
    add("--hidden", type=int, default=7168)
    add("--experts", type=int, default=256, help="of all ranks")
    add("--topk", type=int, default=8)
    add("--sms", type=int, nargs="+", default=[24], help="SMs of an operation")
    add("--routing", nargs="+", default=["uniform"], help="as of deepcomm bench")
    add("--repeats", type=int, default=40, help="replays of a variant and pass")
    add("--limit-s", type=float, default=RUN_LIMIT_S, help="then the ranks are killed")
    add("--commit", default="unknown", help="goes into the result")
    add("--out", type=Path, help="write OUT.json and OUT.md")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if not 2 <= args.ranks <= torch.cuda.device_count():
        raise SystemExit(f"--ranks: expected 2..{torch.cuda.device_count()} GPUs, got {args.ranks}")
    sizes = (args.tokens, args.hidden, args.experts, args.topk)
    setting = Setting(*sizes, tuple(args.sms), tuple(args.routing), args.repeats)
    # NVLink multicast needs rights that many containers lack.
    env = [{"NCCL_NVLS_ENABLE": "0"}] * args.ranks
    results = run_processes(run_rank, args.ranks, setting, env=env, timeout_s=args.limit_s)
    figures = results[0] or []
    limits = link_limits(10)
    facts = environment(args.commit)
    shape = f"{args.ranks} ranks x {args.tokens} tokens, hidden {args.hidden}, "
    facts["shape"] = shape + f"{args.experts} experts, top-{args.topk}"
    lines = ["# High throughput", "", *(f"- {key}: {value}" for key, value in facts.items())]
    lines += [f"- limit, {name}: {rate:.1f} GB/s" for name, rate in limits.items()]
    lines += ["", *table(figures)]
    print("\n".join(lines))
    if args.out:
        result = {"environment": facts, "limits_gbps": limits}
        result["figures"] = [asdict(figure) for figure in figures]
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
