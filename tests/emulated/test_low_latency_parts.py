# SPDX-License-Identifier: Apache-2.0
"""Rows that combines cut into parts, of unequal length, by blocks as large as on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from collective.case import Case
from collective.nodes import LOW_LATENCY_TWO_BY_TWO
from emulated.cluster import Settings
from emulated.low_latency import combine_what_cancels, play
from emulated.test_low_latency import all_operations

from deepcomm import RecvLayout
from deepcomm._C import kernels

pytestmark = pytest.mark.emulated_backend

TOKEN, _, PADDED = RecvLayout
HIDDEN = 4104  # 257 vectors of 16 bytes, and 256
LARGEST = 4096  # a part of 512, more than the threads that sum a block's first one add up at once
NODES = replace(LOW_LATENCY_TWO_BY_TWO, num_tokens=3, hidden=HIDDEN)
# More experts of a token on a rank than it sums at once.
MANY: dict[str, Any] = {
    "num_tokens": 3,
    "hidden": HIDDEN,
    "num_topk": 10,
    "experts_per_rank": 12,
    "layout": PADDED,
}
RAILS = {"lsa": {}, "nccl": {"rail": "nccl"}}
CASES = [
    ("lsa", Case(num_ranks=2, num_tokens=3, hidden=HIDDEN, num_topk=4, layout=TOKEN)),
    ("lsa", Case(num_ranks=1, **MANY, routing="uniform")),
    ("lsa", Case(num_ranks=2, num_tokens=3, hidden=LARGEST, num_topk=4, layout=TOKEN)),
    ("lsa", Case(num_ranks=2, **{**MANY, "hidden": LARGEST}, routing="uniform")),
    *((rail, replace(NODES, layout=layout)) for rail in RAILS for layout in (TOKEN, PADDED)),
    ("nccl", Case(num_ranks=2, ranks_per_node=1, **MANY, routing="one_node")),
]


def test_rows_are_cut_where_a_thread_would_have_more_than_two_vectors() -> None:
    parts = [kernels.low_latency_row_parts(hidden) for hidden in (8, 4096, HIDDEN, 7168, 32768)]
    assert parts == [1, 1, 2, 2, 8]


@pytest.mark.parametrize(("rail", "case"), CASES, ids=lambda value: getattr(value, "id", value))
@pytest.mark.parametrize("seed", range(3))
def test_results_in_parts_equal_the_reference(rail: str, case: Case, seed: int) -> None:
    play(case, all_operations, Settings(seed, num_sms=1 + 4 * seed), **RAILS[rail])


@pytest.mark.parametrize("rail", RAILS)
@pytest.mark.parametrize("layout", [TOKEN, PADDED])
def test_sums_in_parts_are_in_order(rail: str, layout: RecvLayout) -> None:
    case = replace(NODES, num_ranks=6, num_topk=6, layout=layout)
    play(case, combine_what_cancels, **RAILS[rail])
