# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine of one workload on the GPU of each rank: what is checked, then timed.

Each variant is a CUDA graph of 4 operations; a sample is a replay's time by events, divided by 4,
of the slowest rank; the first replays are left out. Variants take turns, all of them twice: the
second pass shows the noise. Rows are random BF16, larger together than the L2 cache from about
4096 tokens on.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from collective.case import Case
from collective.scenario import exchange
from collective.session import Oracle
from gpu.backend_ranks import meet

from deepcomm import Buffer, RecvLayout, ScaledTensor
from deepcomm.fp8 import quantize_fp8
from deepcomm.group import Group, as_group
from deepcomm.testing.routing import RoutingShape, make_routing

LINK_GBPS = 366.0  # what bulk stores reach in one direction
NUM_PASSES = 2
OPS_IN_GRAPH = 4
WARM_UP = 5
ALIGNMENT = 128
TIMEOUT_S = 10.0
TOKEN, EXPERT = RecvLayout.TOKEN, RecvLayout.EXPERT


@dataclass(frozen=True)
class Setting:
    """Sizes and cluster of a workload, the same for all ranks.

    Attributes:
        num_tokens: Of a rank.
        hidden: Elements of a row.
        num_experts: Of all ranks.
        num_topk: Experts of a token.
        ranks_per_node: Nodes that the machine plays; None: it is one.
        nums_sms: SMs of an operation, a buffer each.
        routings: As ``deepcomm bench`` names them.
    """

    num_tokens: int
    hidden: int
    num_experts: int
    num_topk: int
    ranks_per_node: int | None
    nums_sms: tuple[int, ...]
    routings: tuple[str, ...]

    def __str__(self) -> str:
        nodes = "" if self.ranks_per_node is None else f", {self.ranks_per_node} ranks a node"
        return (
            f"{self.num_tokens} tokens, hidden {self.hidden}, {self.num_experts} experts, "
            f"top-{self.num_topk}{nodes}"
        )


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

CHECKS: tuple[dict[str, Any], ...] = (
    {},
    {"wire": "scaled"},
    {"wire": "fp8"},
    {"layout": EXPERT, "alignment": ALIGNMENT},
    {"layout": EXPERT, "alignment": ALIGNMENT, "wire": "scaled"},
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

    def figure(self, setting: Setting) -> Figure:
        """Return the percentiles of what was measured."""
        first, again = (float(np.percentile(times, 50)) for times in self.passes)
        wire = self.sent_bytes / first / 1e3
        return Figure(
            name=self.name,
            setting=str(setting),
            num_sms=self.num_sms,
            routing=self.routing,
            p50=first,
            p50_again=again,
            p95=float(np.percentile(np.concatenate(self.passes), 95)),
            wire_gbps=wire,
            recv_gbps=self.recv_bytes / first / 1e3,
            fraction=wire / LINK_GBPS,
        )


@dataclass(frozen=True)
class Figure:
    """One line of the result; times in us."""

    name: str
    setting: str
    num_sms: int | None
    routing: str
    p50: float
    p50_again: float
    p95: float
    wire_gbps: float
    recv_gbps: float
    fraction: float


class Workload:
    """Rows and routing of this rank, and the bytes they are on the way."""

    def __init__(self, setting: Setting, routing: str, group: Group) -> None:
        rank, num_ranks = group.rank, group.size
        shape = RoutingShape(num_ranks, setting.num_experts, setting.num_topk)
        routed = make_routing(routing, shape, 0)(rank, setting.num_tokens)
        generator = torch.Generator(device="cuda").manual_seed(rank)
        size = (setting.num_tokens, setting.hidden)
        self.setting, self.group = setting, group
        self.x = torch.randn(size, device="cuda", generator=generator).bfloat16()
        self.scaled: ScaledTensor = quantize_fp8(self.x)
        self.ids, self.weights = routed.topk_idx.cuda(), routed.topk_weights.cuda()
        owner = routed.topk_idx // (setting.num_experts // num_ranks)
        owner[routed.topk_idx < 0] = -1
        to = [int((owner == dst).any(1).sum()) for dst in range(num_ranks)]
        table = torch.tensor(group.all_gather(to))
        self.sent_rows = int((table.sum(1) - table.diagonal()).max())
        self.recv_rows = int(table.sum(0).max())
        # What a combine sends is what its dispatch received from others.
        self.back_rows = int((table.sum(0) - table.diagonal()).max())

    def row_bytes(self, wire: str) -> int:
        hidden = self.setting.hidden
        return 2 * hidden if wire == "bf16" else hidden + 4 * -(-hidden // 128)


def record(call: Callable[[], None], group: Group) -> torch.cuda.CUDAGraph:
    """Return a graph of 4 calls, captured one rank after the other: they may share a process."""
    graph = torch.cuda.CUDAGraph()
    for turn in range(group.size):
        meet(group)
        if turn == group.rank:
            mode, stream = "thread_local", torch.cuda.Stream()  # NCCL has threads
            with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
                for _ in range(OPS_IN_GRAPH):
                    call()
    meet(group)
    return graph


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
    graph = record(call, load.group)

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
            ranks_per_node=setting.ranks_per_node,
            num_low_latency_slots=0,
            timeout_s=TIMEOUT_S,
        )
        for num_sms in setting.nums_sms
    ]


def timed_variants(
    buffers: list[Buffer], load: Workload, routing: str, variants: tuple[Variant, ...]
) -> list[Timed]:
    """Capture the variants for every number of SMs."""
    result = []
    for buffer in buffers:
        for variant in variants:
            run = capture(buffer, load, variant)
            is_combine = variant.operation == "combine"
            row = load.row_bytes("bf16" if is_combine else variant.wire)
            moved = ((load.back_rows if is_combine else load.sent_rows) * row, load.recv_rows * row)
            num_sms = buffer.config.num_sms
            result.append(Timed(variant.name, num_sms, routing, run, OPS_IN_GRAPH, *moved))
    return result


def time_pass(item: Timed, repeats: int, group: Group) -> list[float]:
    """Return us of each sample, of the slowest rank."""
    meet(group)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(WARM_UP + repeats + 1)]
    events[0].record()
    for event in events[1:]:
        item.run()
        event.record()
    torch.cuda.current_stream().synchronize()
    spans = itertools.pairwise(events)
    times = [start.elapsed_time(end) * 1e3 / item.ops for start, end in spans]
    return np.max(group.all_gather(times), axis=0)[WARM_UP:].tolist()


def check_small(group: Any, setting: Setting, oracles: Sequence[Oracle] | None = None) -> None:
    """Compare every kind of operation with the reference; raises AssertionError.

    Ranks of one process share an oracle for each of ``CHECKS``.
    """
    base = Case(
        num_ranks=as_group(group).size,
        num_tokens=64,
        hidden=setting.hidden,
        num_topk=min(4, setting.num_topk),
        experts_per_rank=4,
        ranks_per_node=setting.ranks_per_node,
        device="cuda",
    )
    for change, oracle in zip(CHECKS, oracles or [None] * len(CHECKS), strict=True):
        case = dataclasses.replace(base, **change)
        exchange(group, case, oracle, num_low_latency_slots=0, timeout_s=TIMEOUT_S)


def measure(
    group: Any,
    setting: Setting,
    variants: tuple[Variant, ...],
    opponents: Callable[[Workload, str], list[Timed]],
    repeats: int,
) -> list[Figure]:
    """Measure the variants and, in the same turns, their opponents with every routing."""
    figures, meeting = [], as_group(group)
    for routing in setting.routings:
        load, buffers = Workload(setting, routing, meeting), open_buffers(group, setting)
        items = [*timed_variants(buffers, load, routing, variants), *opponents(load, routing)]
        for _ in range(NUM_PASSES):
            for item in items:
                item.passes.append(time_pass(item, repeats, meeting))
        figures += [item.figure(setting) for item in items]
        del items
        for buffer in buffers:  # raises what went wrong in a graph
            buffer.dispatch(load.x, load.ids)
            meet(meeting)
            buffer.close()
        if meeting.rank == 0:
            print(f"{setting}, {routing}: measured", file=sys.stderr, flush=True)
    return figures


def table(figures: list[Figure]) -> list[str]:
    """Return lines of markdown: a table for every setting."""
    lines = []
    head = (
        "| what | routing | SMs | p50 us | p50 again | p95 | wire GB/s | recv GB/s "
        f"| of {LINK_GBPS:.0f} |"
    )
    for setting, some in itertools.groupby(figures, lambda figure: figure.setting):
        rows = [
            f"| {f.name} | {f.routing} | {f.num_sms or ''} | {f.p50:.1f} | {f.p50_again:.1f} "
            f"| {f.p95:.1f} | {f.wire_gbps:.0f} | {f.recv_gbps:.0f} | {f.fraction:.2f} |"
            for f in some
        ]
        rule = "|---|---|---:|---:|---:|---:|---:|---:|---:|"
        lines += [f"## {setting}", "", head, rule, *rows, ""]
    return lines
