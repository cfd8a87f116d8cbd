# SPDX-License-Identifier: Apache-2.0
"""What follows an operation that came to nothing: by its handle, and queued behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from collective.case import Case
from collective.session import Oracle, Session
from emulated.conftest import Schedules
from emulated.host_api import Faults
from emulated.runtime import run_emulated
from emulated.test_trouble import (
    AT_FAULT,
    HIGH_THROUGHPUT_ONLY,
    NODES,
    dispatch_arguments,
    exchange_well,
    layout_case,
    out_of_range,
)
from emulated.test_trouble_later import RunningAhead, error_of

from deepcomm import DispatchOutput, RecvLayout
from deepcomm.errors import CommTimeout, InvalidArgument
from deepcomm.testing import LocalGroup

pytestmark = pytest.mark.emulated_backend

CAPACITY = 48
USES = ("combine", "cached dispatch")
TIMEOUT_S = 5e-3
LATE_NS = {"at-once": 0, "in-time": 5_030_000, "just-too-late": 5_060_000, "too-late": 8_000_000}
"""When a rank comes, beside peers that wait for ``TIMEOUT_S``, some 50 us after their start."""
NUM_QUEUED = 3


def dispatch_ahead(session: Session, round_idx: int = 0, *, spoilt: bool = False) -> DispatchOutput:
    """Dispatch so that no host waits."""
    arguments, inputs = dispatch_arguments(session), session.inputs(round_idx)
    arguments["x"] = inputs.xs[session.rank]
    if session.case.layout is not RecvLayout.EXPERT_PADDED:
        arguments["num_recv_tokens"] = CAPACITY
    if spoilt and session.rank == AT_FAULT:
        out_of_range(arguments)
    return session.buffer.dispatch(**arguments)


def use_handle(session: Session, output: DispatchOutput, use: str) -> Any:
    if use == "combine":
        return session.buffer.combine(torch.zeros_like(output.x), output.handle)
    return session.buffer.dispatch(session.inputs(0).xs[session.rank], handle=output.handle)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("layout", RecvLayout)
def test_handle_of_a_dispatch_that_was_called_off_is_refused(
    schedules: Schedules, layout: RecvLayout, nodes: str, use: str
) -> None:
    case, oracle = layout_case(layout, nodes), Oracle()

    def misuse(group: LocalGroup) -> None:
        with Session(group, case, oracle, **HIGH_THROUGHPUT_ONLY) as session:
            exchange_well(session)
            with RunningAhead(session) as ahead:
                output = dispatch_ahead(session, spoilt=True)
                assert ahead.look() is not None
                error = error_of(lambda: use_handle(session, output, use)) or ahead.look()
            assert isinstance(error, InvalidArgument)
            assert "handle: expected one of a dispatch that took place" in str(error)
            exchange_well(session)

    for settings in schedules():
        run_emulated(misuse, case.num_ranks, settings)


def has_other_rows(session: Session, rows: torch.Tensor) -> bool:
    """Return whether there are rows of the second round's inputs among those of a dispatch."""
    first, second = (torch.cat(session.inputs(round_idx).xs) for round_idx in (0, 1))
    return any(
        bool((second == row).all(1).any()) and not bool((first == row).all(1).any())
        for row in rows.reshape(-1, rows.shape[-1])
    )


@contextmanager
def queueing_behind_a_dispatch(
    group: LocalGroup, case: Case, oracle: Oracle
) -> Iterator[tuple[Session, RunningAhead, DispatchOutput]]:
    """Run ahead of a first dispatch, one that will run out of time if a peer is too late."""
    options = {**HIGH_THROUGHPUT_ONLY, "timeout_s": TIMEOUT_S}
    with Session(group, case, oracle, **options) as session, RunningAhead(session) as ahead:
        yield session, ahead, dispatch_ahead(session)


@pytest.mark.parametrize("late", LATE_NS)
@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("layout", RecvLayout)
def test_operation_queued_behind_a_timeout_meets_nobody(
    schedules: Schedules, layout: RecvLayout, nodes: str, late: str
) -> None:
    """A rank that is in its first operation must not take a later one of its peers for the same."""
    case, oracle = layout_case(layout, nodes), Oracle()

    def queue(group: LocalGroup) -> None:
        with queueing_behind_a_dispatch(group, case, oracle) as (session, ahead, output):
            if group.rank != AT_FAULT:
                for _ in range(NUM_QUEUED):
                    dispatch_ahead(session, 1)
                assert isinstance(ahead.look(reads_views=False), CommTimeout)
                return
            error = ahead.look(reads_views=False)
            assert isinstance(error, CommTimeout) or not has_other_rows(session, output.x)

    faults = Faults(delay_rank=AT_FAULT, delay_from_ns=0, delay_for_ns=LATE_NS[late])
    for settings in schedules(faults=faults):
        run_emulated(queue, case.num_ranks, settings)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("layout", RecvLayout)
def test_handle_of_a_dispatch_that_ran_out_of_time_is_not_read(
    schedules: Schedules, layout: RecvLayout, nodes: str, use: str
) -> None:
    case, oracle = layout_case(layout, nodes), Oracle()

    def queue(group: LocalGroup) -> None:
        with queueing_behind_a_dispatch(group, case, oracle) as (session, ahead, output):
            if group.rank != AT_FAULT:
                use_handle(session, output, use)
            assert isinstance(ahead.look(reads_views=False), CommTimeout)

    late = Faults(delay_rank=AT_FAULT, delay_from_ns=0, delay_for_ns=LATE_NS["too-late"])
    for settings in schedules(faults=late):
        run_emulated(queue, case.num_ranks, settings)
