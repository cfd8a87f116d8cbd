# SPDX-License-Identifier: Apache-2.0
"""Rows of a dispatch cross a network in parts, and are sent on while others are on their way."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
from collective.case import Case, make_inputs
from collective.nodes import TWO_BY_TWO
from collective.scenario import exchange
from collective.session import Oracle, Session
from emulated.conftest import Schedules
from emulated.network import PATIENCE_S
from emulated.operations import HIGH_THROUGHPUT_ONLY, exchange_for_ever
from emulated.runtime import EmulatedRuntime, LazyRuntime, use_runtime
from emulated.streams import Mark
from emulated.test_rails import (
    PART_ROWS,
    SLOW,
    hear_of_refusal,
    make_parts_small,
    refuse_cached,
    run_carried,
)

from deepcomm import RecvLayout
from deepcomm.backends.cuda import gin
from deepcomm.backends.cuda.carrier import ROWS, NetworkCarrier
from deepcomm.errors import CommTimeout
from deepcomm.testing import LocalGroup

pytestmark = pytest.mark.emulated_backend

TOKEN, EXPERT, PADDED = RecvLayout
MANY = replace(TWO_BY_TWO, num_tokens=34, routing="uniform", sizes=(34, 21, 30, 0))
FULL = replace(TWO_BY_TWO, num_tokens=40, routing="uniform", even=True)


@pytest.fixture(params=["nccl", "gin"])
def options(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of buffers over each network."""
    monkeypatch.setattr(gin, "GRACE_S", 0.05)  # real seconds, in which no kernel goes on
    return {**HIGH_THROUGHPUT_ONLY, "rail": request.param}


CASES = [
    *(replace(MANY, layout=layout) for layout in RecvLayout),
    replace(MANY, wire="fp8_ue8m0"),
    replace(MANY, layout=EXPERT, wire="scaled", alignment=4, id_dtype=torch.int32),
    replace(MANY, layout=EXPERT, hidden=512, wire="fp8"),
    replace(MANY, capacity=16),
]


@pytest.mark.parametrize(
    ("rail", "case"),
    [*(("nccl", case) for case in CASES), *(("gin", case) for case in CASES[:: len(RecvLayout)])],
    ids=lambda value: value if isinstance(value, str) else value.id,
)
def test_rows_in_parts_equal_reference(
    schedules: Schedules, monkeypatch: pytest.MonkeyPatch, rail: str, case: Case
) -> None:
    """Those of a rank that brings nothing, too."""
    make_parts_small(monkeypatch, case)
    options, oracle = {**HIGH_THROUGHPUT_ONLY, "rail": rail}, Oracle()
    for settings in schedules():
        run_carried(lambda group: exchange(group, case, oracle, **options), case, settings)


@pytest.mark.parametrize("layout", [TOKEN, EXPERT])
@pytest.mark.parametrize("sizes", [(34, 9, 0), (5, 33, 18)])
def test_pairs_of_ranks_have_parts_of_their_own(
    schedules: Schedules,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    layout: RecvLayout,
    sizes: tuple[int, ...],
) -> None:
    """What a rank has for one peer does not hold up, or mix with, what it has for another."""
    case = replace(MANY, ranks_per_node=1, num_ranks=3, sizes=sizes, layout=layout)
    make_parts_small(monkeypatch, case)
    oracle = Oracle()
    for settings in schedules():
        run_carried(lambda group: go_both_ways(group, case, oracle, options), case, settings)


def dispatch_all(group: LocalGroup, case: Case, oracle: Oracle, options: dict[str, Any]) -> None:
    with Session(group, case, oracle, **options) as session:
        first = session.dispatch(0)
        session.dispatch(1, cached=first)
        session.dispatch(2)
        session.dispatch(3, cached=first)


def go_both_ways(group: LocalGroup, case: Case, oracle: Oracle, options: dict[str, Any]) -> None:
    with Session(group, case, oracle, **options) as session:
        first = session.dispatch(0)
        session.combine(first)
        session.combine(session.dispatch(1, cached=first))
        session.combine(session.dispatch(2))


@pytest.mark.parametrize("fault", SLOW)
def test_late_parts_change_nothing(
    schedules: Schedules, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], fault: str
) -> None:
    case, oracle = replace(MANY, layout=EXPERT), Oracle()
    make_parts_small(monkeypatch, case)
    for settings in schedules(faults=SLOW[fault]):
        run_carried(lambda group: dispatch_all(group, case, oracle, options), case, settings)


@pytest.mark.parametrize("layout", [TOKEN, EXPERT])
def test_refused_parts_are_posted_by_all(
    schedules: Schedules,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    layout: RecvLayout,
) -> None:
    """The rank at fault posts the moves of a cached dispatch that its peers have posted."""
    case, oracle = replace(MANY, layout=layout), Oracle()
    make_parts_small(monkeypatch, case)

    def refuse(group: LocalGroup) -> None:
        with Session(group, case, oracle, **options) as session:
            first = session.dispatch(0)
            hear_of_refusal(session, first, refuse_cached)
            session.dispatch(1, cached=first)
            session.dispatch(2)

    for settings in schedules():
        run_carried(refuse, case, settings)


def test_grown_buffer_has_parts(
    schedules: Schedules, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    make_parts_small(monkeypatch, MANY)
    oracle, grown = Oracle(), {**options, "max_tokens_per_rank": 4, "growable": True}
    for settings in schedules():
        run_carried(lambda group: dispatch_all(group, MANY, oracle, grown), MANY, settings)


# ---- a network that does not bring all parts

LATE, RECEIVER, OBSERVER = 2, 0, 1
"""Whose network is late; its peer; and whom that one sends on to."""


class HeldNetwork:
    """The network of a rank, which waits before one of the parts of the first dispatch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, patience_s: float) -> None:
        self.begin_row = PART_ROWS
        self._mark: Mark | None = None
        self._patience_s = patience_s
        self._num_held = 0
        carry = NetworkCarrier._carry

        def carry_late(network: NetworkCarrier, params: Any, messages: Any) -> None:
            domain = network._domain
            if domain.failure.rank == LATE and params.step == ROWS:
                self._hold(domain.runtime, params.begin_row)
            carry(network, params, messages)

        monkeypatch.setattr(NetworkCarrier, "_carry", carry_late)

    def open(self, group: LocalGroup) -> None:
        """Share what it waits for; collective."""
        runtime: Any = group.runtime
        self._mark = group.all_gather(Mark(0, runtime.memory(8), 1))[LATE]

    def _hold(self, runtime: Any, begin_row: int) -> None:
        if begin_row != self.begin_row or self._num_held > 0:
            return
        self._num_held += 1
        assert self._mark is not None
        with runtime.on_side():
            runtime._order.wait(self._mark, self._patience_s)

    def go_on(self, runtime: EmulatedRuntime) -> None:
        """Let it, by a rank whose own network has nothing to wait for."""
        assert self._mark is not None
        with runtime.on_side():
            runtime._order.reach(self._mark)


def split_rows(case: Case, begin_row: int) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """Return, by slot, what the receiver sends on to the observer: what comes from others; late."""
    inputs = make_inputs(case, 0)
    here: dict[int, bytes] = {}
    late: dict[int, bytes] = {}
    slot = 0
    sources = range(case.num_ranks)
    # Expert layouts: origin after origin of each rank that sends on.
    for source in sources if case.layout is TOKEN else sorted(sources, key=lambda rank: rank % 2):
        ranks = inputs.ids[source] // case.experts_per_rank
        num_carried = 0
        for row, dsts in zip(inputs.xs[source], ranks, strict=True):
            if OBSERVER in dsts:
                if source % 2 == RECEIVER:
                    rows = late if source == LATE and num_carried >= begin_row else here
                    rows[slot] = bytes(row.view(torch.uint8).tolist())
                slot += 1
            num_carried += bool((dsts // 2 == RECEIVER // 2).any())
    assert here
    assert late
    return here, late


def observe(session: Session, runtime: EmulatedRuntime, network: HeldNetwork) -> None:
    """Wait until the receiver has sent on what it has; then let it have the rest."""
    exchange_here = session.buffer._backend.engine.node.exchange  # type: ignore[attr-defined]
    areas = exchange_here.layout.areas
    begin = exchange_here.bases[OBSERVER % 2] + areas.generation(0) + areas.landing.rows

    def have_landed(rows: dict[int, bytes]) -> list[bool]:
        size = len(rows[min(rows)])
        return [ctypes.string_at(begin + slot * size, size) == rows[slot] for slot in rows]

    here, late = split_rows(session.case, network.begin_row)
    never = runtime.host_memory(8)
    for _ in range(1000):
        if all(have_landed(here)):
            break
        runtime.wait_word(never.address, 1, never.address, 50e-6)
    assert all(have_landed(here))
    assert not any(have_landed(late))
    network.go_on(runtime)
    runtime.drain()
    assert all(have_landed(late))


@pytest.mark.parametrize("layout", [TOKEN, EXPERT])
def test_rows_are_sent_on_while_others_are_on_their_way(
    schedules: Schedules,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    layout: RecvLayout,
) -> None:
    """The last part comes when rows of the others have been seen beyond their first rank."""
    case, oracle = replace(FULL, layout=layout), Oracle()
    make_parts_small(monkeypatch, case)

    def dispatch(group: LocalGroup) -> None:
        with Session(group, case, oracle, **options) as session:
            network.open(group)
            runtime: Any = group.runtime
            if group.rank == OBSERVER:
                use_runtime(session.buffer, LazyRuntime(runtime))
                inputs, rank = session.inputs(0), group.rank
                arguments = (inputs.xs[rank], inputs.ids[rank], inputs.weights[rank])
                session.buffer.dispatch(*arguments, recv_layout=layout)
                observe(session, runtime, network)
                use_runtime(session.buffer, runtime)
                session.rewind(1)
            else:
                session.dispatch(0)
            session.dispatch(1)

    for settings in schedules():
        with monkeypatch.context() as patch:
            network = HeldNetwork(patch, PATIENCE_S)
            network.begin_row = last_part(case)
            run_carried(dispatch, case, settings)


def last_part(case: Case) -> int:
    """Return the first row of the last one that the late network brings."""
    ids = make_inputs(case, 0).ids[LATE]
    num_rows = int((ids // (2 * case.experts_per_rank) == RECEIVER // 2).any(dim=1).sum())
    return (num_rows - 1) // PART_ROWS * PART_ROWS


@pytest.mark.parametrize("layout", [TOKEN, EXPERT])
def test_network_that_stops_between_parts_is_named(
    schedules: Schedules,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    layout: RecvLayout,
) -> None:
    case, oracle = replace(FULL, layout=layout), Oracle()
    make_parts_small(monkeypatch, case)

    def run_into_timeout(group: LocalGroup) -> int | None:
        with Session(group, case, oracle, **options) as session:
            network.open(group)
            with pytest.raises(CommTimeout) as caught:
                exchange_for_ever(session)
            return caught.value.peer

    for settings in schedules():
        with monkeypatch.context() as patch:
            network = HeldNetwork(patch, 10 * PATIENCE_S)
            named = run_carried(run_into_timeout, case, settings)
        assert named == [LATE, RECEIVER, RECEIVER, LATE]
