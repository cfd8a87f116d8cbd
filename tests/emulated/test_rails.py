# SPDX-License-Identifier: Apache-2.0
"""Rails whose ranks do not reach each other, over a network that is late and out of order.

Scenarios and oracle are those of nodes whose ranks do reach each other (``test_nodes.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from collective.case import Case
from collective.nodes import NODES_CASES, SHAPE_CASES, TWO_BY_TWO, bytes_to_other_nodes
from collective.scenario import exchange
from collective.session import Oracle, Session
from emulated.build import CSRC
from emulated.cluster import RankStopped, Settings
from emulated.conftest import Schedules
from emulated.host_api import Faults
from emulated.operations import HIGH_THROUGHPUT_ONLY, exchange_for_ever
from emulated.runtime import run_emulated
from emulated.test_trouble import (
    AT_FAULT,
    FAULTS,
    dispatch_arguments,
    dispatch_badly,
    exchange_well,
    expect_refusal,
    layout_case,
)

from deepcomm import Buffer, RecvLayout, buffer_bytes
from deepcomm.backends.cuda import carrier
from deepcomm.errors import CommError, CommTimeout, ConfigMismatch, InvalidArgument
from deepcomm.testing import LocalGroup

pytestmark = pytest.mark.emulated_backend

TOKEN, EXPERT, PADDED = RecvLayout
CARRIED = {**HIGH_THROUGHPUT_ONLY, "rail": "nccl"}
PAIR = Case(num_ranks=2, ranks_per_node=1, num_tokens=10, num_topk=3)
PART_ROWS = 8
FEW_CASES = [
    *SHAPE_CASES[:: len(RecvLayout)],
    *(replace(TWO_BY_TWO, layout=layout) for layout in RecvLayout),
    replace(PAIR, wire="fp8_ue8m0"),
    replace(PAIR, layout=EXPERT, wire="fp8", alignment=4),
    replace(PAIR, wire="scaled", strided=True, id_dtype=torch.int32),
    replace(PAIR, capacity=4),
    replace(PAIR, routing="none"),
]


def run_carried(function: Callable[[LocalGroup], Any], case: Case, settings: Settings) -> list[Any]:
    return run_emulated(function, case.num_ranks, replace(settings, has_network=True))


def make_parts_small(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """Let a part be PART_ROWS rows."""
    row_bytes = case.hidden * (2 if case.wire == "bf16" else 1)
    monkeypatch.setattr(carrier, "PART_BYTES", PART_ROWS * row_bytes)


def params(cases: list[Case]) -> list[Any]:
    """Few of the whole matrix unless what is slow is asked for."""
    few = set(FEW_CASES)
    slow = [pytest.param(case, marks=pytest.mark.slow) for case in cases if case not in few]
    return [*FEW_CASES, *slow]


@pytest.mark.parametrize("case", params(NODES_CASES), ids=lambda case: case.id)
def test_carried_exchange_equals_reference(schedules: Schedules, case: Case) -> None:
    oracle = Oracle()
    for settings in schedules(num_sms=1 if case.num_ranks > 4 else 2):
        run_carried(lambda group: exchange(group, case, oracle, **CARRIED), case, settings)


@pytest.mark.parametrize("layout", [TOKEN, EXPERT])
def test_sums_travel_in_parts(
    schedules: Schedules, monkeypatch: pytest.MonkeyPatch, layout: RecvLayout
) -> None:
    """Each part is announced by itself, and ranks have different numbers of them."""
    case, oracle = replace(PAIR, num_tokens=34, layout=layout, routing="uniform"), Oracle()
    make_parts_small(monkeypatch, case)
    for settings in schedules():
        run_carried(lambda group: exchange(group, case, oracle, **CARRIED), case, settings)


# The network of rank r runs on stream r + num_ranks.
SLOW = {
    "network": Faults(slow_src=4, slow_dst=2, slow_extra_ns=100_000),
    "network-back": Faults(slow_src=6, slow_dst=0, slow_extra_ns=300_000),
    "late-network": Faults(delay_rank=5, delay_from_ns=50_000, delay_for_ns=2_000_000),
    "late-rank": Faults(delay_rank=1, delay_from_ns=50_000, delay_for_ns=2_000_000),
    "inside": Faults(slow_src=2, slow_dst=3, slow_extra_ns=100_000),
}


@pytest.mark.parametrize("fault", SLOW)
def test_slow_networks_change_nothing(schedules: Schedules, fault: str) -> None:
    oracle = Oracle()
    for settings in schedules(faults=SLOW[fault]):
        run_carried(
            lambda group: exchange(group, TWO_BY_TWO, oracle, **CARRIED), TWO_BY_TWO, settings
        )


STOPS = {"rank": 3, "network": 7}


@pytest.mark.parametrize("stop_at_ns", [0, 60_000, 300_000])
@pytest.mark.parametrize("stopped", STOPS)
def test_what_stops_ends_the_operation_everywhere(
    schedules: Schedules, stopped: str, stop_at_ns: int
) -> None:
    """Of a rank that stops, and of one whose network alone does."""
    case, oracle, errors = TWO_BY_TWO, Oracle(), {}

    def run_into_timeout(group: LocalGroup) -> None:
        with Session(group, case, oracle, **CARRIED) as session:
            if stopped == "rank" and group.rank == STOPS["rank"]:
                exchange_for_ever(session)
            with pytest.raises(CommTimeout) as caught:
                exchange_for_ever(session)
            errors[group.rank] = caught.value.peer

    for settings in schedules(faults=Faults(stop_rank=STOPS[stopped], stop_at_ns=stop_at_ns)):
        errors.clear()
        if stopped == "rank":
            with pytest.raises(RankStopped):
                run_carried(run_into_timeout, case, settings)
        else:
            run_carried(run_into_timeout, case, settings)
        assert set(errors) >= set(range(case.num_ranks)) - {STOPS["rank"]}
        for rank, peer in errors.items():
            assert peer is None or peer // 2 == rank // 2 or peer % 2 == rank % 2


@pytest.mark.parametrize("delay_from_ns", range(400_000, 1_600_000, 150_000))
def test_late_rank_takes_no_rows_of_one_that_has_failed(
    schedules: Schedules, delay_from_ns: int
) -> None:
    """Both have told the network how much to carry; what the failed one's mirror holds is old."""
    oracle = Oracle()

    def repeat(group: LocalGroup) -> None:
        with Session(group, PAIR, oracle, **CARRIED, timeout_s=2e-3) as session:
            backend: Any = session.buffer._backend
            try:
                first = session.dispatch(0)
                for round_idx in range(1, 9):
                    session.combine(session.dispatch(round_idx, cached=first))
            except AssertionError:  # of an operation that the next call would say has failed
                if not backend.failure.failed:
                    raise
            except CommTimeout:
                pass
            assert backend.failure.failed

    late = Faults(delay_rank=1, delay_from_ns=delay_from_ns, delay_for_ns=5_000_000)
    for settings in schedules(faults=late):
        run_carried(repeat, PAIR, settings)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("layout", [TOKEN, EXPERT])
def test_refused_dispatch_is_named_and_the_buffer_goes_on(
    schedules: Schedules, layout: RecvLayout, fault: str
) -> None:
    case, oracle = layout_case(layout, "2x2"), Oracle()

    def refuse(group: LocalGroup) -> None:
        with Session(group, case, oracle, **CARRIED) as session:
            for _ in range(2):
                exchange_well(session)
                expect_refusal(session, fault)
            exchange_well(session)

    for settings in schedules():
        run_carried(refuse, case, settings)


def refuse_combine(session: Session, received: Any) -> None:
    output = received.actual
    weights = torch.zeros(output.x.shape[:1] if output.topk_idx is None else output.topk_idx.shape)
    session.buffer.combine(
        output.x,
        output.handle,
        topk_weights=weights.double() if session.rank == AT_FAULT else weights,
    )


def refuse_cached(session: Session, received: Any) -> None:
    inputs, rank = session.inputs(0), session.rank
    weights = inputs.weights[rank]
    session.buffer.dispatch(
        inputs.xs[rank],
        topk_weights=weights.double() if rank == AT_FAULT else weights,
        handle=received.actual.handle,
    )


def hear_of_refusal(
    session: Session, received: Any, refuse: Callable[[Session, Any], None]
) -> None:
    """Let the rank at fault refuse; its peers hear of it in the operation after, which waits."""

    def refuse_and_wait() -> None:
        refuse(session, received)
        session.buffer.dispatch(**dispatch_arguments(session))  # it waits, and raises

    with pytest.raises(InvalidArgument if session.rank == AT_FAULT else CommError):
        refuse_and_wait()


@pytest.mark.parametrize("refuse", [refuse_combine, refuse_cached])
@pytest.mark.parametrize("layout", [TOKEN, EXPERT])
def test_refusal_of_what_the_network_has_been_told(
    schedules: Schedules, layout: RecvLayout, refuse: Callable[[Session, Any], None]
) -> None:
    """Peers know how much they carry by the handle; the rank at fault carries as much."""
    case, oracle = layout_case(layout, "2x2"), Oracle()

    def run(group: LocalGroup) -> None:
        with Session(group, case, oracle, **CARRIED) as session:
            hear_of_refusal(session, session.dispatch(0), refuse)
            exchange_well(session)

    for settings in schedules():
        run_carried(run, case, settings)


def test_ranks_that_differ_all_say_so(schedules: Schedules) -> None:
    case, oracle = layout_case(EXPERT, "2x2"), Oracle()

    def differ(group: LocalGroup) -> None:
        with Session(group, case, oracle, **CARRIED) as session:
            for _ in range(2):
                with pytest.raises(ConfigMismatch):
                    dispatch_badly(session, quantized)
                exchange_well(session)

    for settings in schedules():
        run_carried(differ, case, settings)


def quantized(arguments: dict[str, Any]) -> None:
    arguments["quantize"] = "fp8_e4m3"


@pytest.mark.parametrize("layout", [TOKEN, EXPERT])
def test_buffer_grows(schedules: Schedules, layout: RecvLayout) -> None:
    case = layout_case(layout, "2x2")

    def grow(group: LocalGroup) -> int:
        options = {**CARRIED, "max_tokens_per_rank": 2, "growable": True}
        with Session(group, case, oracle, **options) as session:
            session.combine(session.dispatch(0))
            session.combine(session.dispatch(1))
            return int(session.buffer.config.max_tokens_per_rank)

    for settings in schedules():
        oracle = Oracle()
        assert run_carried(grow, case, settings) == [case.num_tokens] * case.num_ranks


def test_token_is_carried_once_per_node(schedules: Schedules) -> None:
    case, oracle = replace(TWO_BY_TWO, wire="fp8"), Oracle()

    def count(group: LocalGroup) -> None:
        with Session(group, case, oracle, **CARRIED) as session:
            dispatched = session.dispatch(0)
            ids = dispatched.inputs.ids[group.rank]
            expected = bytes_to_other_nodes(case, ids, group.rank)
            assert session.buffer.stats().bytes_network == expected

    for settings in schedules():
        run_carried(count, case, settings)


def test_graph_is_refused_and_explain_and_sizes_know_the_network(schedules: Schedules) -> None:
    def refuse(group: LocalGroup) -> None:
        with Session(group, PAIR, Oracle(), **CARRIED, traffic_class=7) as session:
            assert "the emulated network, traffic class 7" in session.buffer.explain()
            sizes = {"num_ranks": 2, "hidden": PAIR.hidden, "max_tokens_per_rank": PAIR.num_tokens}
            expected = buffer_bytes(
                **sizes,
                num_experts=PAIR.num_experts,
                num_topk=PAIR.num_topk,
                ranks_per_node=1,
                device="cuda",
                **CARRIED,
            )
            assert session.buffer.num_bytes == expected.total
            inputs, rank = session.inputs(0), group.rank
            received = session.dispatch(0).actual
            group.runtime.is_capturing = lambda: True  # type: ignore[method-assign, union-attr]
            with pytest.raises(InvalidArgument, match="rail: expected 'lsa' while a CUDA graph"):
                session.buffer.dispatch(inputs.xs[rank], inputs.ids[rank], num_recv_tokens=20)
            with pytest.raises(InvalidArgument, match="rail: expected 'lsa' while a CUDA graph"):
                session.buffer.combine(received.x, received.handle)

    for settings in schedules():
        run_carried(refuse, PAIR, settings)


def test_rail_is_chosen_by_what_ranks_reach(schedules: Schedules) -> None:
    """And so are nodes, where the user says nothing."""
    case = Case(num_ranks=4, num_tokens=4)

    def open_buffer(group: LocalGroup) -> str:
        group.runtime.reach = f"host {group.rank // 2}"  # type: ignore[union-attr]
        with pytest.raises(InvalidArgument, match=r"ranks_per_node: expected ranks 0\.\.3"):
            case.open(group, **HIGH_THROUGHPUT_ONLY, ranks_per_node=4)
        buffer: Buffer = case.open(group, **HIGH_THROUGHPUT_ONLY)
        text = buffer.explain()
        assert buffer.ranks_per_node == 2
        buffer.close()
        return text

    for settings in schedules():
        for text in run_carried(open_buffer, case, settings):
            assert "mirrors" in text
            assert "out of each other's reach" in text


def test_unknown_rail_is_refused(schedules: Schedules) -> None:
    def open_buffer(group: LocalGroup) -> None:
        with pytest.raises(
            InvalidArgument, match="rail: expected one of 'auto', 'lsa', 'gin', 'nccl'"
        ):
            PAIR.open(group, rail="pigeon")

    run_emulated(open_buffer, PAIR.num_ranks, schedules()[0])


# ---- the example of csrc/kernels/PROTOCOLS.md


def example() -> dict[str, list[list[list[int]]]]:
    """Return rows of numbers by array, then by rank."""
    text = (CSRC / "kernels" / "PROTOCOLS.md").read_text().split("\n## carried rails\n")[1]
    row = re.compile(r"^\| `([^`]+)` \|[^|]*\| `([^`]+)` \| `([^`]+)` \|$", re.MULTILINE)
    return {
        name: [[[int(n) for n in row.split()] for row in cell.split("/")] for cell in cells]
        for name, *cells in row.findall(text.split("\n## ")[0])
    }


def test_worked_example_of_carried_rails(schedules: Schedules) -> None:
    ids = [[[0, 2], [3, 2]], [[0, 3]]]
    case = Case(num_ranks=2, ranks_per_node=1, num_tokens=2, num_topk=2)

    def play(group: LocalGroup) -> dict[str, list[list[int]]]:
        buffer = case.open(group, **CARRIED)
        rank_ids = torch.tensor(ids[group.rank])
        x = torch.ones(len(rank_ids), case.hidden, dtype=torch.bfloat16)
        record = buffer.dispatch(x, rank_ids).handle.records.rail.records
        plan = record.plan.tolist()  # csrc/layout/plan.hpp
        arrays = {
            "rows_to": [list(record.rows.to)],
            "rows_from": [list(record.rows.from_)],
            "token_slot": record.token_slot.tolist(),
            "plan: rows_from": [plan[0:3]],
            "plan: push_base": [[plan[3 + 1 - group.rank]]],
            "plan: sent_base": [plan[5:7]],
        }
        buffer.close()
        return arrays

    expected = example()
    for settings in schedules():
        for rank, arrays in enumerate(run_carried(play, case, settings)):
            assert arrays == {name: of_ranks[rank] for name, of_ranks in expected.items()}
