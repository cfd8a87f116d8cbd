# SPDX-License-Identifier: Apache-2.0
"""The matrix over several nodes, which the CPU backend and the CUDA backend both pass."""

from __future__ import annotations

import itertools
from dataclasses import replace

from collective.case import Case

from deepcomm import RecvLayout

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
