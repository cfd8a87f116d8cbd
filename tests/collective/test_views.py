# SPDX-License-Identifier: Apache-2.0
"""Views of symmetric memory: who may write where, and when."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from collective.case import Case, case_params
from collective.session import Dispatched, Oracle, Session

from deepcomm import RecvLayout
from deepcomm.testing import LocalCluster
from deepcomm.testing.oracle import assert_dispatch_equal

TOKEN, EXPERT, PADDED = RecvLayout
VIEWED = [
    Case(even=True, layout=layout, wire=wire, ranks_per_node=per_node, routing="uniform")
    for layout in (TOKEN, EXPERT)
    for wire in ("bf16", "fp8")
    for per_node in (None, 2)
]


def is_view(tensor: torch.Tensor) -> bool:
    """Return whether the memory is lent: torch cannot resize what it does not own."""
    return not tensor.untyped_storage().resizable()


def assert_untouched(dispatched: Dispatched, rank: int) -> None:
    assert_dispatch_equal(dispatched.actual, dispatched.expected[rank], rank=rank)


def run(case: Case, body: Any, **options: Any) -> list[Any]:
    oracle = Oracle()

    def on_rank(group: Any) -> Any:
        with Session(group, case, oracle, **options) as session:
            return body(session)

    return LocalCluster(case.num_ranks).run(on_rank)


@pytest.mark.parametrize(**case_params(VIEWED))
def test_leased_view_is_never_overwritten(case: Case) -> None:
    def body(session: Session) -> Dispatched:
        session.dispatch(0)  # EXPERT: learns how much room such rows need
        kept = session.dispatch(1)
        assert is_view(kept.actual.x)
        for round_idx in range(2, 9):
            session.combine(session.dispatch(round_idx))
        assert_untouched(kept, session.rank)
        return kept

    for rank, kept in enumerate(run(case, body)):
        gc.collect()  # the buffer is closed and gone
        assert_untouched(kept, rank)


@pytest.mark.parametrize(**case_params(VIEWED[:4]))
def test_part_of_a_view_keeps_the_lease(case: Case) -> None:
    def body(session: Session) -> None:
        session.dispatch(0)
        kept = session.dispatch(1)
        part = kept.actual.x[1:3, 8:24]
        copy = part.clone()
        del kept
        for round_idx in range(2, 9):
            session.dispatch(round_idx)
        assert torch.equal(part.view(torch.uint8), copy.view(torch.uint8))

    run(case, body)


@pytest.mark.parametrize("num_generations", [2, 3, 5])
@pytest.mark.parametrize(**case_params(VIEWED[:4]))
def test_dispatch_returns_owned_copy_when_all_is_leased(case: Case, num_generations: int) -> None:
    def body(session: Session) -> None:
        session.dispatch(0, owned=True)
        for round_idx in range(num_generations):  # each area learns its size
            session.dispatch(round_idx)
        kept = [session.dispatch(round_idx) for round_idx in range(num_generations - 1)]
        assert all(is_view(one.actual.x) for one in kept)
        more = [session.dispatch(10 + round_idx) for round_idx in range(3)]
        assert not any(is_view(one.actual.x) for one in more)
        session.combine(more[0], carried=True)
        for one in (*kept, *more):
            assert_untouched(one, session.rank)
        session.combine(kept.pop(), in_place=case.wire == "bf16")
        assert is_view(session.dispatch(20).actual.x)

    run(case, body, num_generations=num_generations)


@pytest.mark.parametrize(**case_params(VIEWED[:2]))
def test_ranks_may_differ_in_what_they_hold(case: Case) -> None:
    def body(session: Session) -> None:
        kept = []
        for round_idx in range(12):
            one = session.dispatch(round_idx)
            if session.rank % 2:
                kept.append(one)
            session.combine(one, carried=True)
        for one in kept:
            assert_untouched(one, session.rank)
        assert [is_view(one.actual.x) for one in kept] == [i < 2 for i in range(len(kept))]

    run(case, body)


@pytest.mark.parametrize(
    **case_params([Case(layout=layout, ranks_per_node=2) for layout in RecvLayout])
)
def test_owned_is_never_a_view(case: Case) -> None:
    def body(session: Session) -> None:
        for round_idx in range(3):
            one = session.dispatch(round_idx, owned=True, zero_padding=True)
            assert not is_view(one.actual.x)
            session.combine(one, in_place=True)

    run(case, body)


@pytest.mark.parametrize(
    **case_params([Case(layout=layout, delay_ms=3, ranks_per_node=2) for layout in (TOKEN, EXPERT)])
)
def test_view_may_be_changed_as_soon_as_combine_returned(case: Case) -> None:
    def body(session: Session) -> None:
        for round_idx in range(20):
            session.combine(session.dispatch(round_idx), in_place=True)

    run(case, body)


@pytest.mark.parametrize(**case_params([Case(delay_ms=1), Case(ranks_per_node=2)]))
def test_combine_takes_the_view_of_another_dispatch(case: Case) -> None:
    def body(session: Session) -> None:
        first = session.dispatch(0)
        second = session.dispatch(1, cached=first)
        for one in (first, second):
            y = first.actual.x
            mixed = Dispatched(
                one.actual.__class__(**{**_fields(one.actual), "x": y}),
                one.expected,
                one.inputs,
                one.round_idx,
            )
            session.combine(mixed, in_place=True, carried=True)
        assert_untouched(second, session.rank)

    run(case, body)


def _fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__}


@pytest.mark.parametrize("size", ["exact", "longer"])
@pytest.mark.parametrize(**case_params(VIEWED))
def test_dispatch_receives_into_out(case: Case, size: str) -> None:
    def body(session: Session) -> None:
        first = session.dispatch(0, zero_padding=True)
        rows = torch.empty_like(first.actual.x)
        out = rows if size == "exact" else torch.cat([rows, rows])
        again = session.dispatch(0, zero_padding=True, out=out)
        assert again.actual.x.data_ptr() == out.data_ptr()

    run(case, body)
