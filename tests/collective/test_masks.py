# SPDX-License-Identifier: Apache-2.0
"""Ranks that low latency does without: masked by hand, or because they are late."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from collective.case import Case, case_params
from collective.scenario import go_apart, lose_after_dispatch, other_side, take_back_in_flight
from collective.session import Oracle, Session

from deepcomm import InvalidArgument, RecvLayout
from deepcomm.testing import LocalCluster

TOKEN, _, PADDED = RecvLayout
SHORT_S = 1.0


def run(case: Case, body: Any, **options: Any) -> list[Any]:
    oracle = Oracle()

    def on_rank(group: Any) -> Any:
        with Session(group, case, oracle, **options) as session:
            return body(session)

    return LocalCluster(case.num_ranks).run(on_rank)


MASKED = [
    Case(layout=layout, ranks_per_node=per_node, wire=wire, num_topk=4, routing="uniform")
    for layout in (TOKEN, PADDED)
    for per_node in (None, 2)
    for wire in ("bf16", "fp8")
]


@pytest.mark.parametrize(**case_params(MASKED))
def test_masked_rank_counts_as_absent(case: Case) -> None:
    absent = 2

    def body(session: Session) -> None:
        if session.rank == absent:
            return
        session.buffer.set_rank_mask(absent, True)
        assert session.buffer.rank_mask().tolist() == [rank == absent for rank in range(4)]
        for round_idx in range(6):
            one = session.low_latency_dispatch(round_idx, masked={absent}, zero_padding=True)
            session.low_latency_combine(one, masked={absent}, carried=True, apply_weights=False)

    run(case, body)


@pytest.mark.parametrize(**case_params(MASKED))
def test_mask_set_between_dispatch_and_combine(case: Case) -> None:
    absent = 3

    def body(session: Session) -> None:
        one = session.low_latency_dispatch(0)
        if session.rank != absent:
            session.buffer.set_rank_mask(absent, True)
            session.low_latency_combine(one, masked={absent})

    run(case, body)


@pytest.mark.parametrize(**case_params([Case(layout=PADDED, num_topk=4, routing="uniform")]))
def test_rank_can_be_taken_back(case: Case) -> None:
    cut = 1

    run(case, lambda session: go_apart(session, other_side(session, cut)))


@pytest.mark.parametrize("use_hook", [False, True])
@pytest.mark.parametrize(
    **case_params(
        [Case(layout=layout, routing="uniform", num_topk=4) for layout in (TOKEN, PADDED)]
    )
)
def test_rank_that_never_comes_is_masked(case: Case, use_hook: bool) -> None:
    absent = 3
    options = {"on_timeout": "mask", "return_hook": use_hook}

    def body(session: Session) -> None:
        session.low_latency_combine(session.low_latency_dispatch(0, on_timeout="mask"))
        if session.rank == absent:
            session.group.barrier()
            return
        waits = torch.zeros(case.num_ranks, dtype=torch.int64)
        one = session.low_latency_dispatch(
            1, masked={absent}, wait_us_stats=waits, zero_padding=True, **options
        )
        if use_hook:
            one.finish()
        assert waits[absent] > SHORT_S * 0.8e6
        assert session.buffer.rank_mask().tolist() == [False, False, False, True]
        start = time.monotonic()
        for _ in range(5):
            back = session.low_latency_combine(one, masked={absent}, **options)
            if use_hook:
                back.finish()
        assert time.monotonic() - start < SHORT_S
        session.group.barrier()

    run(case, body, timeout_s=SHORT_S)


@pytest.mark.parametrize("use_hook", [False, True])
@pytest.mark.parametrize(
    **case_params(
        [
            Case(num_ranks=4, ranks_per_node=2, layout=PADDED, routing="uniform", num_topk=4),
            Case(num_ranks=6, ranks_per_node=2, layout=TOKEN, routing="uniform", num_topk=4),
            Case(num_ranks=3, ranks_per_node=1, layout=PADDED, routing="uniform", num_topk=2),
        ]
    )
)
def test_rank_of_another_node_that_never_comes_is_masked_by_all(case: Case, use_hook: bool) -> None:
    absent = case.num_ranks - 1
    options = {"on_timeout": "mask", "return_hook": use_hook}

    def body(session: Session) -> list[bool]:
        session.low_latency_combine(session.low_latency_dispatch(0, on_timeout="mask"))
        if session.rank != absent:
            for round_idx in (1, 2):
                one = session.low_latency_dispatch(round_idx, masked={absent}, **options)
                if use_hook:
                    one.finish()
                for _ in range(2):
                    back = session.low_latency_combine(one, masked={absent}, **options)
                    if use_hook:
                        back.finish()
        mask = session.buffer.rank_mask().tolist()
        session.group.barrier()
        return mask

    masks = run(case, body, timeout_s=SHORT_S)
    assert masks[:absent] == [[rank == absent for rank in range(case.num_ranks)]] * absent


@pytest.mark.parametrize("override", [False, True])
@pytest.mark.parametrize(
    **case_params(
        [
            Case(ranks_per_node=2, layout=PADDED, routing="uniform", num_topk=4),
            Case(layout=PADDED, routing="uniform", num_topk=4),
        ]
    )
)
def test_rank_that_leaves_after_dispatch_is_masked_by_those_who_need_it(
    case: Case, override: bool
) -> None:
    absent = 3

    def body(session: Session) -> None:
        lose_after_dispatch(session, absent, override=override)

    run(case, body, timeout_s=SHORT_S)


@pytest.mark.parametrize("rank", [-1, 4, "own"])
def test_mask_of_no_peer_is_refused(rank: Any) -> None:
    def body(session: Session) -> None:
        with pytest.raises(InvalidArgument, match="rank: expected a peer"):
            session.buffer.set_rank_mask(session.rank if rank == "own" else rank, True)

    run(Case(), body)


def test_rank_is_not_taken_back_between_send_and_hook() -> None:
    run(Case(layout=PADDED, num_topk=4, routing="uniform"), take_back_in_flight)
