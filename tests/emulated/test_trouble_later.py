# SPDX-License-Identifier: Apache-2.0
"""Hosts that run ahead learn of a refusal at different calls, and yet enter the same operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from collective.session import Oracle, Session
from emulated.conftest import Schedules
from emulated.runtime import LazyRuntime, run_emulated, use_runtime
from emulated.test_trouble import (
    AT_FAULT,
    FAULTS,
    HIGH_THROUGHPUT_ONLY,
    dispatch_arguments,
    exchange_well,
    layout_case,
)

from deepcomm import DispatchOutput, RecvLayout
from deepcomm.errors import CommError, Error, InvalidArgument
from deepcomm.testing import LocalGroup

pytestmark = pytest.mark.emulated_backend

RANKS = range(3)
NOBODY = -1
UNRAISED = "refused: the error of an earlier operation was yet to be raised there"


class RunningAhead:
    """While the block runs, a session's calls return before their kernels have run."""

    def __init__(self, session: Session) -> None:
        self._buffer: Any = session.buffer
        self._actual = self._buffer._backend.runtime

    def __enter__(self) -> RunningAhead:
        use_runtime(self._buffer, LazyRuntime(self._actual))
        return self

    def __exit__(self, *_: object) -> None:
        use_runtime(self._buffer, self._actual)

    def catch_up(self) -> None:
        """Let the device do what was launched."""
        self._actual.flush()

    def look(self, *, reads_views: bool = True) -> Error | None:
        """Return what the operations so far have found to be wrong, as their event raises it.

        Peers may still write to views that have come to nothing.
        """
        if reads_views:
            self.catch_up()
        else:
            self._actual.drain()
        return error_of(self._buffer._backend.failure.check_complete)


def error_of(call: Callable[[], Any]) -> Error | None:
    try:
        call()
    except Error as error:
        return error
    return None


def dispatch(session: Session, results: list[Any], fault: str | None = None) -> Error | None:
    """Dispatch, keep what is returned, return what is raised."""
    arguments = dispatch_arguments(session)
    if fault is not None and session.rank == AT_FAULT:
        FAULTS[fault][0](arguments)
    return error_of(lambda: results.append(session.buffer.dispatch(**arguments)))


def check_told(rank: int, errors: list[Error | None]) -> None:
    """Check that a rank was told once: who was at fault, or what it did."""
    told = [error for error in errors if error is not None]
    assert len(told) == 1, told
    if rank == AT_FAULT:
        assert isinstance(told[0], InvalidArgument)
    else:
        assert isinstance(told[0], CommError)
        assert told[0].peer == AT_FAULT


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("knowing", RANKS)
def test_call_that_raises_has_taken_its_turn(
    schedules: Schedules, knowing: int, fault: str
) -> None:
    case, oracle = layout_case(RecvLayout.EXPERT_PADDED, "one-node"), Oracle()

    def learn(group: LocalGroup) -> None:
        with Session(group, case, oracle, **HIGH_THROUGHPUT_ONLY) as session:
            good, results = session.dispatch(0).actual, []
            with RunningAhead(session) as ahead:
                errors = [dispatch(session, [], fault)]
                if group.rank == knowing:
                    ahead.catch_up()
                errors += [dispatch(session, results), ahead.look()]
            check_told(group.rank, errors)
            assert results or group.rank == knowing
            for output in results:  # it took place, whoever has raised instead of returning it
                assert torch.equal(output.num_tokens_per_expert, good.num_tokens_per_expert)
            exchange_well(session)

    for settings in schedules():
        run_emulated(learn, case.num_ranks, settings)


@pytest.mark.parametrize("layout", [RecvLayout.TOKEN, RecvLayout.EXPERT])
@pytest.mark.parametrize("knowing", [NOBODY, *RANKS])
def test_call_that_waits_raises_on_all_ranks(
    schedules: Schedules, knowing: int, layout: RecvLayout
) -> None:
    """Who has raised it already, or made it, hears that the others have not."""
    case, oracle = layout_case(layout, "one-node"), Oracle()

    def learn(group: LocalGroup) -> None:
        rank = group.rank
        with Session(group, case, oracle, **HIGH_THROUGHPUT_ONLY) as session:
            for _ in range(2):
                session.rewind(0)
                received = session.dispatch(0).actual
                with RunningAhead(session) as ahead:
                    errors = [combine_badly(session, received)]
                    if rank == knowing:
                        errors.append(ahead.look())
                    results: list[Any] = []
                    error = dispatch(session, results)
                assert not results
                assert error is not None
                if rank in (AT_FAULT, knowing):
                    assert isinstance(error, CommError)
                    assert error.peer not in (AT_FAULT, knowing)
                    assert UNRAISED in str(error)
                else:
                    errors.append(error)
                check_told(rank, errors)
                exchange_well(session)

    for settings in schedules():
        run_emulated(learn, case.num_ranks, settings)


def combine_badly(session: Session, received: DispatchOutput) -> Error | None:
    """Combine rows that are too narrow on rank AT_FAULT; no host waits."""
    y = torch.zeros(received.x.shape, dtype=torch.bfloat16)
    if session.rank == AT_FAULT:
        y = y[:, 1:]
    return error_of(lambda: session.buffer.combine(y, received.handle))


@pytest.mark.parametrize("layout", [RecvLayout.TOKEN, RecvLayout.EXPERT])
def test_buffer_does_not_grow_on_some_ranks_alone(schedules: Schedules, layout: RecvLayout) -> None:
    """An error that some ranks have yet to raise comes before growing, which takes all of them."""
    case = layout_case(layout, "one-node")

    def grow(group: LocalGroup) -> int:
        options = {**HIGH_THROUGHPUT_ONLY, "max_tokens_per_rank": 2, "growable": True}
        with Session(group, case, oracle, **options) as session:
            received = small_dispatch(session)
            with RunningAhead(session):
                first = combine_badly(session, received)
                second = dispatch(session, [])
            assert (first is not None) == (group.rank == AT_FAULT)
            assert isinstance(second, CommError)
            assert session.buffer.config.max_tokens_per_rank == 2
            exchange_well(session)
            return int(session.buffer.config.max_tokens_per_rank)

    for settings in schedules():
        oracle = Oracle()
        assert len(set(run_emulated(grow, case.num_ranks, settings))) == 1


def small_dispatch(session: Session) -> DispatchOutput:
    """Dispatch as many tokens as there is room for before the buffer grows."""
    arguments = dispatch_arguments(session)
    return session.buffer.dispatch(
        arguments["x"][:2], arguments["topk_idx"][:2], recv_layout=session.case.layout
    )
