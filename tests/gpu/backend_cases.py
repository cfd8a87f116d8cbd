# SPDX-License-Identifier: Apache-2.0
"""Cases of the backend's matrix on GPUs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from collective.case import Case
from collective.nodes import LOW_LATENCY_CASES, LOW_LATENCY_SLOW_CASES
from gpu.backend_ranks import WIRES

from deepcomm import RecvLayout
from deepcomm.testing.oracle import ROUTING_KINDS

TOKEN, EXPERT, PADDED = RecvLayout
CAPACITIES = (0, 1, 40, 90, 700)


def base_case(num_ranks: int) -> Case:
    """Return what the cases vary; tokens fill several blocks of the counting kernel."""
    return Case(
        num_ranks=num_ranks,
        num_tokens=80,
        hidden=512,
        num_topk=4,
        experts_per_rank=4,
        device="cuda",
    )


def wire_cases(base: Case) -> list[Case]:
    return [
        replace(base, layout=layout, wire=wire, alignment=16 if layout is EXPERT else 1)
        for layout, wire in itertools.product(RecvLayout, WIRES)
    ]


def routing_cases(base: Case) -> list[Case]:
    return [
        replace(base, layout=layout, routing=routing)
        for layout, routing in itertools.product(RecvLayout, ROUTING_KINDS)
    ]


def capacity_cases(base: Case) -> list[Case]:
    return [
        replace(base, layout=layout, capacity=capacity, wire=wire, alignment=alignment)
        for layout, alignment in ((TOKEN, 1), (EXPERT, 4))
        for capacity, wire in zip(CAPACITIES, itertools.cycle(("bf16", "fp8")), strict=False)
    ]


def option_cases(base: Case) -> list[Case]:
    return [
        *(replace(base, layout=layout, id_dtype=torch.int32) for layout in RecvLayout),
        *(replace(base, layout=layout, strided=True, wire=wire)
          for layout in RecvLayout for wire in ("bf16", "fp8", "scaled")),
        *(replace(base, layout=EXPERT, wire="fp8", alignment=alignment)
          for alignment in (3, 128)),
        # Only padding does not fit, which is no loss.
        replace(base, layout=EXPERT, capacity=130, alignment=256, experts_per_rank=1, num_topk=2),
        *(replace(base, layout=layout, num_topk=1, experts_per_rank=1) for layout in RecvLayout),
        *(replace(base, layout=layout, num_tokens=1, even=True) for layout in RecvLayout),
    ]  # fmt: skip


def shape_cases(base: Case) -> list[Case]:
    return [
        *(replace(base, layout=layout, hidden=7168, num_tokens=130, even=True, wire=wire)
          for layout, wire in ((TOKEN, "bf16"), (EXPERT, "fp8"), (PADDED, "fp8_ue8m0"))),
        *(replace(base, layout=layout, hidden=24, num_tokens=33) for layout in RecvLayout),
        *(replace(base, layout=layout, hidden=1040, num_tokens=33, wire=wire)
          for layout, wire in ((TOKEN, "fp8"), (EXPERT, "scaled_ue8m0"), (PADDED, "scaled"))),
        *(replace(base, layout=layout, num_topk=32, experts_per_rank=32, num_tokens=20)
          for layout in RecvLayout),
    ]  # fmt: skip


def matrix(num_ranks: int) -> list[Case]:
    """Return all cases."""
    base = base_case(num_ranks)
    lists = (wire_cases, routing_cases, capacity_cases, option_cases, shape_cases)
    return [case for make in lists for case in make(base)]


def short_matrix(num_ranks: int) -> list[Case]:
    """Return every layout with every wire, and one capacity each."""
    base = base_case(num_ranks)
    return [*wire_cases(base), *(replace(base, layout=lay, capacity=60) for lay in (TOKEN, EXPERT))]


def nodes_matrix(num_ranks: int, ranks_per_node: int) -> list[Case]:
    """Return the short matrix over several nodes, and all routings."""
    cases = [*short_matrix(num_ranks), *routing_cases(base_case(num_ranks))]
    return [replace(case, ranks_per_node=ranks_per_node) for case in cases]


def low_latency_nodes() -> list[Case]:
    """Return the shared matrix of low latency over nodes, and sizes of models."""
    shared = [replace(case, device="cuda") for case in LOW_LATENCY_CASES + LOW_LATENCY_SLOW_CASES]
    large = replace(
        base_case(8), ranks_per_node=4, hidden=7168, num_tokens=128, num_topk=8, even=True
    )
    return [
        *shared,
        *(replace(large, layout=layout, wire=wire)
          for layout, wire in itertools.product((TOKEN, PADDED), ("bf16", "fp8"))),
        replace(large, layout=PADDED, ranks_per_node=2, wire="scaled_ue8m0", routing="uniform"),
    ]  # fmt: skip


def low_latency_rails(num_ranks: int, ranks_per_node: int) -> list[Case]:
    """Return what low latency over a network is tried on."""
    base = replace(base_case(num_ranks), ranks_per_node=ranks_per_node, rail="nccl", num_topk=4)
    large = replace(base, hidden=7168, num_tokens=128, even=True, num_topk=min(8, base.num_experts))
    return [
        *(replace(base, layout=layout, wire=wire)
          for layout, wire in itertools.product(
              (TOKEN, PADDED), ("bf16", "fp8", "fp8_ue8m0", "scaled", "scaled_ue8m0"))),
        replace(base, layout=PADDED, routing="one_expert"),
        replace(base, layout=TOKEN, routing="none"),
        *(replace(large, layout=layout, wire=wire)
          for layout, wire in itertools.product((TOKEN, PADDED), ("bf16", "fp8"))),
    ]  # fmt: skip


LOW_LATENCY_GRAPHS = [
    replace(base_case(ranks), ranks_per_node=per_node, layout=layout, num_tokens=16)
    for ranks, per_node, layout in ((4, 2, PADDED), (8, 4, TOKEN), (6, 2, PADDED))
]
GRAPH_CASES = [
    replace(base_case(2), capacity=150),
    replace(base_case(2), capacity=20, wire="fp8"),
    replace(base_case(2), layout=EXPERT, capacity=700, alignment=16, wire="scaled"),
    replace(base_case(2), layout=PADDED, wire="fp8_ue8m0"),
]
SMS_CASES = [
    replace(base_case(2), num_tokens=200),
    replace(base_case(2), num_tokens=200, layout=EXPERT, wire="fp8", alignment=8),
]
