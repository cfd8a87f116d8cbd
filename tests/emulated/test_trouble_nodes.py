# SPDX-License-Identifier: Apache-2.0
"""Operations over several nodes that do not take place: in whichever stage, all ranks say the same.

The ranks of a node, and those of a rail, learn of it in different stages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from collective.session import Oracle, Session
from emulated.conftest import Schedules
from emulated.runtime import run_emulated
from emulated.test_trouble import (
    AT_FAULT,
    HIGH_THROUGHPUT_ONLY,
    Arguments,
    dispatch_arguments,
    dispatch_badly,
    exchange_well,
    layout_case,
    wrong_dtype,
)
from emulated.test_trouble_later import error_of

from deepcomm import DispatchOutput, RecvLayout
from deepcomm.errors import CommError, CommTimeout, ConfigMismatch, InvalidArgument
from deepcomm.testing import LocalGroup

pytestmark = pytest.mark.emulated_backend

TOKEN, EXPERT, PADDED = RecvLayout
NUM_RANKS = 4
DIFFER = r"{} differs between ranks|ranks differ that rank \d"
DIFFERENT = {
    **{f"rank-{rank}": {rank} for rank in range(NUM_RANKS)},
    "node": {2, 3},
    "rail": {1, 3},
}
COMBINING = {**DIFFERENT, "crosswise": {0, 3}}


@pytest.mark.parametrize("layout", [TOKEN, EXPERT])
def test_nobody_grows_beside_a_refusal_on_another_rail(
    schedules: Schedules, layout: RecvLayout
) -> None:
    case = layout_case(layout, "2x2")

    def grow(group: LocalGroup) -> int:
        options = {**HIGH_THROUGHPUT_ONLY, "max_tokens_per_rank": 2, "growable": True}
        with Session(group, case, oracle, **options) as session:
            expected = InvalidArgument if group.rank == AT_FAULT else CommError
            with pytest.raises(expected):
                dispatch_badly(session, wrong_dtype)
            assert session.buffer.config.max_tokens_per_rank == 2
            exchange_well(session)
            return int(session.buffer.config.max_tokens_per_rank)

    for settings in schedules():
        oracle = Oracle()
        assert len(set(run_emulated(grow, case.num_ranks, settings))) == 1


def combine_or_dispatch(session: Session, received: DispatchOutput, combines: bool) -> None:
    if combines:
        session.buffer.combine(torch.zeros_like(received.x), received.handle)
    else:
        session.buffer.dispatch(**dispatch_arguments(session))


@pytest.mark.parametrize("who", COMBINING)
@pytest.mark.parametrize("layout", RecvLayout)
def test_combine_beside_dispatches_is_told_to_all(
    schedules: Schedules, layout: RecvLayout, who: str
) -> None:
    case, oracle = layout_case(layout, "2x2"), Oracle()

    def differ(group: LocalGroup) -> None:
        with Session(group, case, oracle, **HIGH_THROUGHPUT_ONLY) as session:
            received = session.dispatch(0).actual
            for _ in range(2):
                with pytest.raises(ConfigMismatch, match=DIFFER.format("operation")):
                    combine_or_dispatch(session, received, group.rank in COMBINING[who])
                exchange_well(session)

    for settings in schedules():
        run_emulated(differ, case.num_ranks, settings)


def other_layout(arguments: Arguments) -> None:
    arguments["recv_layout"] = PADDED


def other_alignment(arguments: Arguments) -> None:
    arguments["expert_alignment"] = 8


def other_wire(arguments: Arguments) -> None:
    arguments["quantize"] = "fp8_e4m3"


ASKED: dict[str, Callable[[Arguments], None]] = {
    "layout": other_layout,
    "alignment": other_alignment,
    "wire": other_wire,
}


@pytest.mark.parametrize("who", DIFFERENT)
@pytest.mark.parametrize("what", ASKED)
def test_dispatches_that_differ_between_stages_are_told(
    schedules: Schedules, what: str, who: str
) -> None:
    case, oracle = layout_case(EXPERT, "2x2"), Oracle()

    def differ(group: LocalGroup) -> None:
        with Session(group, case, oracle, **HIGH_THROUGHPUT_ONLY) as session:
            for _ in range(2):
                arguments = dispatch_arguments(session)
                if group.rank in DIFFERENT[who]:
                    ASKED[what](arguments)
                with pytest.raises(ConfigMismatch, match=DIFFER.format(what)):
                    session.buffer.dispatch(**arguments)
                exchange_well(session)

    for settings in schedules():
        run_emulated(differ, case.num_ranks, settings)


@pytest.mark.parametrize("who", DIFFERENT)
def test_combines_that_differ_between_stages_are_told(schedules: Schedules, who: str) -> None:
    case, oracle = layout_case(EXPERT, "2x2"), Oracle()

    def differ(group: LocalGroup) -> None:
        with Session(group, case, oracle, **HIGH_THROUGHPUT_ONLY) as session:
            received = session.dispatch(0).actual
            for _ in range(2):
                with pytest.raises(ConfigMismatch, match=DIFFER.format("apply_weights")):
                    session.buffer.combine(
                        received.x, received.handle, apply_weights=group.rank in DIFFERENT[who]
                    )
                exchange_well(session)

    for settings in schedules():
        run_emulated(differ, case.num_ranks, settings)


@pytest.mark.parametrize("layout", RecvLayout)
def test_handle_outlives_growth(schedules: Schedules, layout: RecvLayout) -> None:
    case = layout_case(layout, "2x2")

    def grow(group: LocalGroup) -> None:
        options = {**HIGH_THROUGHPUT_ONLY, "max_tokens_per_rank": 2, "growable": True}
        with Session(group, case, oracle, **options) as session:
            arguments = dispatch_arguments(session)
            x, ids = arguments["x"][:2], arguments["topk_idx"][:2]
            first = session.buffer.dispatch(x, ids, recv_layout=layout)
            kept = session.buffer.combine(first.x, first.handle).x
            exchange_well(session)
            assert session.buffer.config.max_tokens_per_rank >= 4
            again = session.buffer.dispatch(x, handle=first.handle)
            assert torch.equal(session.buffer.combine(again.x, again.handle).x, kept)
            exchange_well(session)

    for settings in schedules():
        oracle = Oracle()
        run_emulated(grow, case.num_ranks, settings)


class Broken:
    """In the place of kernels that a launch would take."""

    def __getitem__(self, _: object) -> Any:
        raise MemoryError("no room")


def break_node_stage(session: Session, operation: str) -> Any:
    """Let the host fail on rank AT_FAULT on its way to the node's stage; return what it has."""
    engine: Any = session.buffer._backend.engine  # type: ignore[attr-defined]
    domain = engine.node
    functions = domain.functions
    if session.rank == AT_FAULT:
        field = "combine" if operation == "combine" else "send"
        domain.functions = replace(functions, **{field: Broken()})
    return domain, functions


def operate(session: Session, first: DispatchOutput, operation: str) -> Exception | None:
    """Return what a combine or a cached dispatch raises."""
    try:
        if operation == "combine":
            session.buffer.combine(first.x, first.handle)
        else:
            session.buffer.dispatch(session.inputs(0).xs[session.rank], handle=first.handle)
    except (MemoryError, CommError) as caught:
        return caught
    return None


def fail_twice(session: Session, operation: str, told: set[int]) -> None:
    """Let the host at fault fail before the node's stage; some are told, and all go on."""
    first = session.dispatch(0).actual
    for _ in range(2):
        domain, functions = break_node_stage(session, operation)
        error = operate(session, first, operation)
        domain.functions = functions
        if session.rank == AT_FAULT:
            assert isinstance(error, MemoryError)
        elif session.rank in told:
            assert isinstance(error, CommError)
            assert error.peer == AT_FAULT
        else:
            assert error is None
        exchange_well(session)


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
@pytest.mark.parametrize("layout", RecvLayout)
def test_host_that_fails_before_the_node_keeps_stages_in_step(
    schedules: Schedules, layout: RecvLayout, operation: str
) -> None:
    case, oracle = layout_case(layout, "2x2"), Oracle()
    # Who hears of it: of a dispatch, whose rail has done its part, the node; of a combine all:
    # all that may fail comes before the first launch.
    told = {"dispatch": {0}, "combine": {0, 2, 3}}[operation]

    def fail(group: LocalGroup) -> None:
        with Session(group, case, oracle, **HIGH_THROUGHPUT_ONLY) as session:
            fail_twice(session, operation, told)

    for settings in schedules():
        run_emulated(fail, case.num_ranks, settings)


@pytest.mark.parametrize("layout", RecvLayout)
def test_host_that_fails_once_the_rail_has_met_ends_the_combine_everywhere(
    schedules: Schedules, layout: RecvLayout
) -> None:
    """Its node calls it off; who awaits sums of that node runs out of time."""
    case, oracle = layout_case(layout, "2x2"), Oracle()

    def fail(group: LocalGroup) -> None:
        with Session(group, case, oracle, **HIGH_THROUGHPUT_ONLY) as session:
            first = session.dispatch(0).actual
            engine: Any = session.buffer._backend.engine  # type: ignore[attr-defined]
            launch = engine.node.launch

            def break_once(*_: object, **__: object) -> None:
                engine.node.launch = launch
                raise MemoryError("no room")

            if group.rank == AT_FAULT:
                engine.node.launch = break_once
            error = operate(session, first, "combine")
            if error is None:  # the host was ahead
                error = error_of(session.buffer._backend.failure.check_complete)
            if group.rank == AT_FAULT:
                assert isinstance(error, MemoryError)
            elif group.rank // 2 == AT_FAULT // 2:
                assert isinstance(error, CommError)
                assert error.peer == AT_FAULT
            else:
                assert isinstance(error, CommTimeout)
                assert error.peer == group.rank - 2

    for settings in schedules():
        run_emulated(fail, case.num_ranks, settings)
