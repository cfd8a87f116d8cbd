# SPDX-License-Identifier: Apache-2.0
"""The matrices over several nodes, which the CPU backend and the CUDA backend both pass."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

from collective.case import Case

from deepcomm import RecvLayout

if TYPE_CHECKING:
    import torch

TOKEN, EXPERT, _ = RecvLayout
TWO_BY_TWO = Case(num_ranks=4, ranks_per_node=2, num_tokens=10, num_topk=3)

WIRE_CASES = [
    replace(TWO_BY_TWO, layout=layout, wire=wire, alignment=8 if layout is EXPERT else 1)
    for layout, wire in itertools.product(
        RecvLayout, ("bf16", "fp8", "fp8_ue8m0", "scaled", "scaled_ue8m0")
    )
]
# Nodes x ranks a node.
SHAPES = {"2x4": (8, 4), "4x2": (8, 2), "3x2": (6, 2), "2x1": (2, 1)}
SHAPE_CASES = [
    replace(TWO_BY_TWO, num_ranks=ranks, ranks_per_node=per_node, num_tokens=6, layout=layout)
    for (ranks, per_node), layout in itertools.product(SHAPES.values(), RecvLayout)
]
OPTION_CASES = [
    *(
        replace(TWO_BY_TWO, routing=routing, layout=layout)
        for routing in ("one_expert", "none")
        for layout in RecvLayout
    ),
    *(
        replace(TWO_BY_TWO, capacity=capacity, layout=layout)
        for layout in (TOKEN, EXPERT)
        for capacity in (4, 90)
    ),
    replace(TWO_BY_TWO, strided=True, wire="scaled"),
    # More chunks than are announced at once, of two origins.
    *(replace(TWO_BY_TWO, num_tokens=34, even=True, layout=layout) for layout in RecvLayout),
]
NODES_CASES = WIRE_CASES + SHAPE_CASES + OPTION_CASES

# Low latency: two kinds of rows and one hidden size where kernels have to be compiled first.
LOW_LATENCY_TWO_BY_TWO = replace(TWO_BY_TWO, num_tokens=5, hidden=64)
PADDED = RecvLayout.EXPERT_PADDED
LOW_LATENCY_CASES = [
    *(replace(LOW_LATENCY_TWO_BY_TWO, layout=layout) for layout in (TOKEN, PADDED)),
    *(
        replace(LOW_LATENCY_TWO_BY_TWO, layout=layout, wire="fp8", num_topk=4)
        for layout in (TOKEN, PADDED)
    ),
    *(
        replace(
            LOW_LATENCY_TWO_BY_TWO,
            num_ranks=SHAPES[shape][0],
            ranks_per_node=SHAPES[shape][1],
            num_tokens=3,
            layout=layout,
            routing="uniform",
        )
        for shape, layout in (("2x4", PADDED), ("4x2", TOKEN), ("3x2", PADDED), ("2x1", PADDED))
    ),
    replace(LOW_LATENCY_TWO_BY_TWO, layout=PADDED, routing="one_expert", num_tokens=33),
    replace(LOW_LATENCY_TWO_BY_TWO, layout=PADDED, routing="none"),
]
LOW_LATENCY_SLOW_CASES = [
    *(
        replace(LOW_LATENCY_TWO_BY_TWO, layout=layout, wire=wire, strided=wire == "scaled")
        for layout, wire in itertools.product(
            (TOKEN, PADDED), ("fp8_ue8m0", "scaled", "scaled_ue8m0")
        )
    ),
    *(
        replace(
            LOW_LATENCY_TWO_BY_TWO,
            num_ranks=ranks,
            ranks_per_node=per_node,
            layout=layout,
            wire=wire,
            num_topk=6,
        )
        for (ranks, per_node), layout, wire in itertools.product(
            SHAPES.values(), (TOKEN, PADDED), ("bf16", "fp8")
        )
        if ranks > 2
    ),
    # Rows of several packets a thread, in rounds.
    *(
        replace(LOW_LATENCY_TWO_BY_TWO, layout=layout, hidden=1168, wire=wire)
        for layout, wire in ((TOKEN, "bf16"), (PADDED, "fp8"))
    ),
]


def bytes_to_other_nodes(case: Case, ids: torch.Tensor, rank: int) -> int:
    """Return the bytes of a rank's tokens times the other nodes that they visit, once each."""
    assert case.ranks_per_node is not None
    experts_per_node = case.experts_per_rank * case.ranks_per_node
    own = rank // case.ranks_per_node
    visits = ({i // experts_per_node for i in row if i >= 0} - {own} for row in ids.tolist())
    tiles = -(-case.hidden // 128)
    row_bytes = case.hidden + 4 * tiles if case.wire == "fp8" else 2 * case.hidden
    return sum(map(len, visits)) * row_bytes
