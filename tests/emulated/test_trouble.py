# SPDX-License-Identifier: Apache-2.0
"""Operations that do not take place: the rank at fault says why, its peers say who, all go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from collective.case import Case
from collective.session import Oracle, Session
from emulated.conftest import Schedules
from emulated.operations import HIGH_THROUGHPUT_ONLY
from emulated.runtime import run_emulated

from deepcomm import RecvLayout
from deepcomm.errors import CommError, ConfigMismatch, InvalidArgument
from deepcomm.testing import LocalGroup

pytestmark = pytest.mark.emulated_backend

AT_FAULT = 1
TWO_BY_TWO = {"num_ranks": 4, "ranks_per_node": 2}
NODES = {"one-node": {"num_ranks": 3}, "2x2": TWO_BY_TWO}

Arguments = dict[str, Any]


def out_of_range(arguments: Arguments) -> None:
    arguments["topk_idx"][-1, -1] = 1000


def expert_twice(arguments: Arguments) -> None:
    arguments["topk_idx"][0] = 2


def wrong_dtype(arguments: Arguments) -> None:
    arguments["topk_weights"] = arguments["topk_weights"].double()


def without_weights(arguments: Arguments) -> None:
    arguments["topk_weights"] = None


FAULTS: dict[str, tuple[Callable[[Arguments], None], str]] = {
    "out-of-range": (out_of_range, r"topk_idx: expected ids in -1\.\.[57],"),
    "expert-twice": (expert_twice, "topk_idx: expected distinct experts in a row"),
    "wrong-dtype": (wrong_dtype, "topk_weights: expected .*float64"),
}

ON_DEVICE = ("out-of-range", "expert-twice")


def dispatch_arguments(session: Session) -> Arguments:
    """Return good arguments of one dispatch, of tensors of their own."""
    inputs, rank = session.inputs(0), session.rank
    return {
        "x": inputs.xs[rank],
        "topk_idx": inputs.ids[rank].clone(),
        "topk_weights": inputs.weights[rank].clone(),
        "recv_layout": session.case.layout,
    }


def layout_case(layout: RecvLayout, nodes: str) -> Case:
    return Case(**NODES[nodes], num_tokens=4, even=True, layout=layout, routing="uniform")


def exchange_well(session: Session) -> None:
    session.rewind(0)
    session.combine(session.dispatch(0))


def dispatch_badly(session: Session, spoil: Callable[[Arguments], None]) -> None:
    """Dispatch with arguments that rank AT_FAULT spoils; the emulator ends it in the call."""
    arguments = dispatch_arguments(session)
    if session.rank == AT_FAULT:
        spoil(arguments)
    session.buffer.dispatch(**arguments)


def expect_refusal(session: Session, fault: str) -> None:
    spoil, message = FAULTS[fault]
    if session.rank == AT_FAULT:
        with pytest.raises(InvalidArgument, match=message):
            dispatch_badly(session, spoil)
        return
    with pytest.raises(CommError, match=f"rank {AT_FAULT} refused") as caught:
        dispatch_badly(session, spoil)
    assert caught.value.peer == AT_FAULT


@pytest.mark.parametrize("fault", ON_DEVICE)
@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("layout", RecvLayout)
def test_bad_ids_are_named_and_the_buffer_goes_on(
    schedules: Schedules, layout: RecvLayout, nodes: str, fault: str
) -> None:
    case, oracle = layout_case(layout, nodes), Oracle()

    def refuse(group: LocalGroup) -> None:
        with Session(group, case, oracle, **HIGH_THROUGHPUT_ONLY) as session:
            for _ in range(3):
                exchange_well(session)
                expect_refusal(session, fault)

    for settings in schedules():
        run_emulated(refuse, case.num_ranks, settings)


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("layout", RecvLayout)
def test_refusing_host_is_named_and_the_buffer_goes_on(
    schedules: Schedules, layout: RecvLayout, nodes: str
) -> None:
    case, oracle = layout_case(layout, nodes), Oracle()

    def refuse(group: LocalGroup) -> None:
        with Session(group, case, oracle, **HIGH_THROUGHPUT_ONLY) as session:
            for _ in range(3):
                exchange_well(session)
                expect_refusal(session, "wrong-dtype")

    for settings in schedules():
        run_emulated(refuse, case.num_ranks, settings)


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("layout", RecvLayout)
def test_ranks_that_differ_all_say_so(schedules: Schedules, layout: RecvLayout, nodes: str) -> None:
    case, oracle = layout_case(layout, nodes), Oracle()

    def differ(group: LocalGroup) -> None:
        with Session(group, case, oracle, **HIGH_THROUGHPUT_ONLY) as session:
            for _ in range(2):
                with pytest.raises(
                    ConfigMismatch, match=r"has_weights differs between|ranks differ that rank \d"
                ):
                    dispatch_badly(session, without_weights)
                exchange_well(session)

    for settings in schedules():
        run_emulated(differ, case.num_ranks, settings)


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("layout", RecvLayout)
def test_larger_dispatch_grows_the_buffer_on_all_ranks(
    schedules: Schedules, layout: RecvLayout, nodes: str
) -> None:
    def grow(group: LocalGroup) -> int:
        options = {**HIGH_THROUGHPUT_ONLY, "max_tokens_per_rank": 2, "growable": True}
        with Session(group, layout_case(layout, nodes), oracle, **options) as session:
            session.combine(session.dispatch(0))
            session.combine(session.dispatch(1))
            return int(session.buffer.config.max_tokens_per_rank)

    for settings in schedules():
        oracle = Oracle()
        sizes = run_emulated(grow, layout_case(layout, nodes).num_ranks, settings)
        assert len(set(sizes)) == 1
        assert sizes[0] >= 4


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("layout", RecvLayout)
def test_buffer_that_may_not_grow_refuses_and_goes_on(
    schedules: Schedules, layout: RecvLayout, nodes: str
) -> None:
    case = layout_case(layout, nodes)

    def refuse(group: LocalGroup) -> None:
        with Session(group, case, oracle, **HIGH_THROUGHPUT_ONLY) as session:
            has_many = session.rank == AT_FAULT
            x = torch.ones(case.num_tokens + has_many, case.hidden, dtype=torch.bfloat16)
            expected, match = CommError, f"rank {AT_FAULT} refused"
            if has_many:
                expected, match = InvalidArgument, "at most max_tokens_per_rank = 4 tokens, got 5"
            with pytest.raises(expected, match=match):
                session.buffer.dispatch(x, torch.full((len(x), 1), -1), recv_layout=layout)
            session.combine(session.dispatch(0))

    for settings in schedules():
        oracle = Oracle()
        run_emulated(refuse, case.num_ranks, settings)
