# SPDX-License-Identifier: Apache-2.0
"""Every layout, wire and shape against the reference, bit for bit, in both modes."""

from __future__ import annotations

import itertools

import pytest
import torch
from collective.case import WIRES, Case, case_params
from collective.scenario import exchange, low_latency_exchange
from collective.session import Oracle

from deepcomm import RecvLayout
from deepcomm.testing import LocalCluster
from deepcomm.testing.oracle import ROUTING_KINDS

TOKEN, EXPERT, PADDED = RecvLayout
CLUSTERS = [(1, None), (2, None), (3, None), (6, None), (8, None)]
NODES = [(4, 1), (6, 3), (6, 2)]  # (ranks, ranks a node); (4, 2) runs every wire


def aligned(layout: RecvLayout) -> int:
    return 8 if layout is EXPERT else 1


WIRE_CASES = [
    Case(ranks_per_node=per_node, layout=layout, wire=wire, alignment=aligned(layout))
    for layout, wire, per_node in itertools.product(RecvLayout, WIRES, (None, 2))
]
CLUSTER_CASES = [
    Case(
        num_ranks=ranks,
        ranks_per_node=per_node,
        layout=layout,
        wire=wire,
        num_topk=3,
        experts_per_rank=3,
        alignment=aligned(layout),
    )
    for layout, wire in itertools.product(RecvLayout, ("bf16", "fp8"))
    for ranks, per_node in CLUSTERS + NODES
]
ROUTING_CASES = [
    Case(ranks_per_node=per_node, routing=routing, layout=layout, num_topk=3)
    for layout, routing in itertools.product(RecvLayout, ROUTING_KINDS)
    for per_node in (None, 2)
]
HIDDEN_CASES = [
    Case(num_ranks=2, num_tokens=5, hidden=hidden, wire=wire, layout=layout, ranks_per_node=node)
    for hidden, wire in [
        *((hidden, "bf16") for hidden in (8, 24, 1000, 7168, 16384)),
        *((hidden, "fp32") for hidden in (8, 136, 16384)),
        *((hidden, "fp8") for hidden in (16, 112, 144, 7168, 16384)),
        *((hidden, "fp8_ue8m0") for hidden in (16, 640, 16384)),
        *((hidden, "scaled_ue8m0") for hidden in (16, 528)),
    ]
    for layout, node in ((TOKEN, 1), (EXPERT, None), (PADDED, None))
]
TOPK_CASES = [
    Case(num_ranks=3, num_topk=topk, experts_per_rank=experts, layout=layout, num_tokens=7)
    for topk, experts in ((1, 1), (1, 5), (3, 1), (8, 3), (17, 7), (32, 11), (32, 32))
    for layout in RecvLayout
]
OPTION_CASES = [
    *(Case(id_dtype=torch.int32, layout=layout) for layout in RecvLayout),
    *(Case(id_dtype=torch.int32, ranks_per_node=2, layout=layout) for layout in RecvLayout),
    *(Case(strided=True, layout=layout, wire="fp32") for layout in RecvLayout),
    *(Case(strided=True, layout=layout, wire="scaled", ranks_per_node=2) for layout in RecvLayout),
    *(Case(strided=True, layout=layout, wire="fp8") for layout in RecvLayout),
    *(Case(even=True, layout=layout, routing="uniform") for layout in RecvLayout),
    *(Case(num_tokens=1, layout=layout, routing="uniform") for layout in RecvLayout),
    *(Case(alignment=alignment, layout=EXPERT, wire="fp8") for alignment in (3, 5, 128)),
    *(Case(num_threads=threads, num_tokens=200, layout=layout) for layout in RecvLayout
      for threads in (2, 5)),
]  # fmt: skip
# Rows of 4 MiB and more are stored past the caches; between nodes they travel in several chunks.
LARGE_CASES = [
    Case(num_ranks=2, num_tokens=320, hidden=7168, even=True, num_threads=2, layout=layout)
    for layout in (TOKEN, EXPERT)
] + [
    Case(num_ranks=2, ranks_per_node=1, num_tokens=320, hidden=7168, even=True, layout=layout)
    for layout in (TOKEN, EXPERT)
] + [  # cast past the caches where rows are whole lines, with and without a short last tile
    Case(num_ranks=2, num_tokens=320, hidden=hidden, even=True, wire="fp8", routing="uniform",
         layout=layout)
    for hidden, layout in ((14400, TOKEN), (14400, EXPERT), (14416, TOKEN))
]  # fmt: skip
# Rows so wide, and tokens so many, that a combine goes through its ring several times.
WIDE = {"num_ranks": 3, "num_tokens": 90, "hidden": 16384}
RING_CASES = [
    Case(layout=TOKEN, wire="fp32", **WIDE),
    Case(layout=TOKEN, wire="fp32", capacity=60, num_topk=3, **WIDE),
    Case(layout=EXPERT, wire="fp32", capacity=70, num_topk=3, alignment=4, **WIDE),
    Case(layout=EXPERT, routing="one_expert", **WIDE),
]
ALL_CASES = (
    WIRE_CASES
    + CLUSTER_CASES
    + ROUTING_CASES
    + HIDDEN_CASES
    + TOPK_CASES
    + OPTION_CASES
    + LARGE_CASES
    + RING_CASES
)
SLOW_CASES = LARGE_CASES + RING_CASES
LOW_LATENCY_CASES = [
    case for case in ALL_CASES if case.layout is not EXPERT and case not in RING_CASES
]


@pytest.mark.parametrize(**case_params(ALL_CASES, slow=SLOW_CASES))
def test_exchange_equals_reference(case: Case) -> None:
    oracle = Oracle()
    LocalCluster(case.num_ranks).run(lambda group: exchange(group, case, oracle))


@pytest.mark.parametrize(**case_params(LOW_LATENCY_CASES, slow=SLOW_CASES))
def test_low_latency_exchange_equals_reference(case: Case) -> None:
    oracle = Oracle()
    LocalCluster(case.num_ranks).run(lambda group: low_latency_exchange(group, case, oracle))
