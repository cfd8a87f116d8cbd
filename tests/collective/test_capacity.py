# SPDX-License-Identifier: Apache-2.0
"""Receive tensors of a fixed number of rows: what does not fit is flagged, never lost silently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from collective.case import Case, case_params
from collective.scenario import exchange
from collective.session import Oracle, Session

from deepcomm import RecvLayout
from deepcomm.testing import LocalCluster

CAPACITIES = (0, 1, 7, 12, 200)
CASES = [
    Case(
        capacity=capacity,
        layout=layout,
        wire=wire,
        ranks_per_node=per_node,
        alignment=4 if layout is RecvLayout.EXPERT else 1,
        num_topk=3,
    )
    for layout in (RecvLayout.TOKEN, RecvLayout.EXPERT)
    for wire in ("bf16", "fp8")
    for per_node in (None, 2)
    for capacity in CAPACITIES
]


@pytest.mark.parametrize(**case_params(CASES))
def test_capacity_equals_reference(case: Case) -> None:
    oracle = Oracle()
    LocalCluster(case.num_ranks).run(lambda group: exchange(group, case, oracle))


@pytest.mark.parametrize("layout", [RecvLayout.TOKEN, RecvLayout.EXPERT])
def test_overflow_is_told_to_receivers_and_sources_alone(layout: RecvLayout) -> None:
    case = Case(num_ranks=3, num_tokens=4, even=True, layout=layout, capacity=4)

    def body(group: Any) -> tuple[bool, bool, int]:
        # Rank 0 sends two tokens to itself, rank 1 four to rank 2 and rank 2 one: it overflows.
        counts, expert = ((2, 0), (4, 4), (1, 4))[group.rank]
        with case.open(group) as buffer:
            x = torch.ones(counts, case.hidden, dtype=torch.bfloat16)
            ids = torch.full((counts, 1), expert)
            got = buffer.dispatch(x, ids, recv_layout=layout, num_recv_tokens=4)
            back = buffer.combine(torch.ones_like(got.x), got.handle)
            return bool(got.overflow), bool(back.x.isnan().any()), int(got.num_recv_tokens)

    assert LocalCluster(3).run(body) == [(False, False, 2), (False, False, 0), (True, True, 4)]


def test_cached_dispatch_keeps_the_capacity() -> None:
    case = Case(capacity=5, num_topk=3)
    oracle = Oracle()

    def body(group: Any) -> None:
        with Session(group, case, oracle) as session:
            first = session.dispatch(0)
            for round_idx in (1, 2, 3):
                again = session.dispatch(round_idx, cached=first)
                assert again.actual.x.shape[0] == 5
                session.combine(again, carried=True)

    LocalCluster(case.num_ranks).run(body)
