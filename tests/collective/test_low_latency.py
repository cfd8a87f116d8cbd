# SPDX-License-Identifier: Apache-2.0
"""Low latency beyond the matrix: hooks, flights, weights, statistics."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from collective.case import Case, case_params
from collective.scenario import spoil
from collective.session import Oracle, Session

from deepcomm import CommError, InvalidArgument, RecvLayout
from deepcomm.testing import LocalCluster

TOKEN, _, PADDED = RecvLayout
BOTH = [
    Case(layout=layout, wire=wire, ranks_per_node=per_node, num_topk=3)
    for layout in (TOKEN, PADDED)
    for wire in ("bf16", "fp8")
    for per_node in (None, 2)
]
PLAIN = [Case(layout=PADDED, ranks_per_node=per_node) for per_node in (None, 2, 1)]


def run(case: Case, body: Any, **options: Any) -> list[Any]:
    oracle = Oracle()

    def on_rank(group: Any) -> Any:
        with Session(group, case, oracle, **options) as session:
            return body(session)

    return LocalCluster(case.num_ranks).run(on_rank)


# ---- flights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_slots", [3, 4, 6])
@pytest.mark.parametrize(**case_params(BOTH))
def test_operations_in_flight_equal_reference(case: Case, num_slots: int) -> None:
    def body(session: Session) -> None:
        spoil(session, num_slots)
        for start in (0, num_slots):
            flying = [
                session.low_latency_dispatch(start + i, return_hook=True) for i in range(num_slots)
            ]
            for one in flying:
                one.finish()
            back = [
                session.low_latency_combine(one, extras=True, return_hook=True) for one in flying
            ]
            for one in back:
                one.finish()

    run(case, body, num_low_latency_slots=num_slots)


@pytest.mark.parametrize(
    **case_params([Case(layout=PADDED, delay_ms=3, ranks_per_node=node) for node in (None, 2)])
)
def test_flights_overlap_whatever_the_delays(case: Case) -> None:
    def body(session: Session) -> None:
        flying = [session.low_latency_dispatch(0, return_hook=True)]
        for round_idx in range(1, 25):
            flying.append(session.low_latency_dispatch(round_idx, return_hook=True))
            one = flying.pop(0)
            one.finish()
            session.dispatch(round_idx)  # the other mode has epochs of its own
            back = session.low_latency_combine(one, override=True, return_hook=True)
            flying[0].finish()
            back.finish()
            flying[0].finish = lambda: None

    run(case, body)


@pytest.mark.parametrize(**case_params(PLAIN))
def test_too_many_in_flight_is_refused_and_harmless(case: Case) -> None:
    def body(session: Session) -> None:
        flying = [session.low_latency_dispatch(i, return_hook=True) for i in range(4)]
        inputs = session.inputs(9)
        with pytest.raises(InvalidArgument, match="num_low_latency_slots = 4"):
            session.buffer.low_latency_dispatch(
                inputs.xs[session.rank], inputs.ids[session.rank], return_hook=True
            )
        for one in flying:
            one.finish()
        session.low_latency_combine(session.low_latency_dispatch(5))

    run(case, body)


@pytest.mark.parametrize(**case_params(PLAIN[:2]))
def test_hook_runs_once(case: Case) -> None:
    def body(session: Session) -> None:
        one = session.low_latency_dispatch(0, return_hook=True)
        one.finish()
        with pytest.raises(InvalidArgument, match="one call of its hook"):
            one.actual.hook()
        back = session.low_latency_combine(one, return_hook=True)
        back.finish()
        with pytest.raises(InvalidArgument, match="one call of its hook"):
            back.actual.hook()
        session.low_latency_combine(one)

    run(case, body)


def test_buffer_without_slots_refuses_low_latency() -> None:
    def body(session: Session) -> None:
        inputs = session.inputs(0)
        with pytest.raises(InvalidArgument, match="num_low_latency_slots = 0"):
            session.buffer.low_latency_dispatch(inputs.xs[session.rank], inputs.ids[session.rank])
        session.combine(session.dispatch(0))

    run(Case(), body, num_low_latency_slots=0)


@pytest.mark.parametrize("ranks_per_node", [None, 2, 1])
def test_refusal_spares_operations_that_others_have_in_flight(ranks_per_node: int | None) -> None:
    """Rank 0 has four flights to land when rank 1, ahead, refuses the fifth operation."""
    case = Case(layout=PADDED, ranks_per_node=ranks_per_node)

    def body(session: Session) -> None:
        flying = [session.low_latency_dispatch(i, return_hook=True) for i in range(4)]
        inputs = session.inputs(4)
        x, ids = inputs.xs[session.rank], inputs.ids[session.rank]
        if session.rank != 1:
            time.sleep(0.3)
        for one in flying:
            one.finish()
        if session.rank == 1:
            with pytest.raises(InvalidArgument, match="x: expected"):
                session.buffer.low_latency_dispatch(x[:, 1:], ids)
        else:
            with pytest.raises(CommError, match="rank 1 refused"):
                session.buffer.low_latency_dispatch(x, ids)
        session.low_latency_combine(flying[3])

    run(case, body)


# ---- weights, out, events --------------------------------------------------------------------


@pytest.mark.parametrize(**case_params([case for case in BOTH if case.layout is PADDED]))
def test_weights_given_to_combine_replace_the_recorded(case: Case) -> None:
    def body(session: Session) -> None:
        bare = session.low_latency_dispatch(0, has_weights=False)
        session.low_latency_combine(bare, override=True, extras=True)
        full = session.low_latency_dispatch(1)
        session.low_latency_combine(full, override=True)
        session.low_latency_combine(full, extras=True)
        session.low_latency_combine(full, apply_weights=False, carried=True)

    run(case, body)


@pytest.mark.parametrize(**case_params([case for case in BOTH if case.layout is TOKEN]))
def test_token_rows_are_summed_plainly(case: Case) -> None:
    def body(session: Session) -> None:
        one = session.low_latency_dispatch(0)
        session.low_latency_combine(one)
        session.low_latency_combine(one, carried=True)
        session.low_latency_combine(one, carried=True, apply_weights=False)

    run(case, body)


@pytest.mark.parametrize(**case_params(BOTH))
def test_out_and_event(case: Case) -> None:
    def body(session: Session) -> None:
        first = session.low_latency_dispatch(0)
        out = torch.empty_like(first.actual.x)
        again = session.low_latency_dispatch(
            1, out=out, zero_padding=True, async_op=True, previous_event=first.actual.event
        )
        assert again.actual.x.data_ptr() == out.data_ptr()
        assert again.actual.event is not None
        again.actual.event.synchronize()
        assert again.actual.event.query()
        session.low_latency_combine(again, extras=True, previous_event=again.actual.event)

    run(case, body)


@pytest.mark.parametrize(**case_params([Case(layout=PADDED, ranks_per_node=2)]))
def test_handles_stay_valid(case: Case) -> None:
    def body(session: Session) -> None:
        all_dispatches = [session.low_latency_dispatch(i) for i in range(9)]
        for one in reversed(all_dispatches):
            session.low_latency_combine(one)

    run(case, body)


# ---- statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(**case_params(PLAIN))
def test_expert_token_stats_add_up(case: Case, dtype: torch.dtype) -> None:
    def body(session: Session) -> None:
        stats = torch.full((case.experts_per_rank,), 100, dtype=dtype)
        expected = stats.clone()
        for round_idx in range(3):
            one = session.low_latency_dispatch(
                round_idx, expert_token_stats=stats, return_hook=round_idx == 1
            )
            if round_idx == 1:
                assert torch.equal(stats, expected)
                one.finish()
            expected += one.expected[session.rank].num_tokens_per_expert
        assert torch.equal(stats, expected)

    run(case, body)


@pytest.mark.parametrize(**case_params(PLAIN))
def test_wait_us_stats_name_the_late_source(case: Case) -> None:
    late = 2

    def body(session: Session) -> tuple[list[int], list[int]]:
        waits = [torch.zeros(case.num_ranks, dtype=torch.int64) for _ in range(2)]
        session.low_latency_dispatch(0)
        if session.rank == late:
            time.sleep(0.4)
        one = session.low_latency_dispatch(1, wait_us_stats=waits[0])
        if session.rank == late:
            time.sleep(0.4)
        session.low_latency_combine(one, wait_us_stats=waits[1])
        return waits[0].tolist(), waits[1].tolist()

    results = run(case, body)
    for phase in (0, 1):
        waits = results[0][phase]
        assert waits[late] > 200_000, waits
        assert waits[0] < 100_000, waits
        assert results[late][phase][late] < 100_000
