# SPDX-License-Identifier: Apache-2.0
"""What hosts do beside the kernels: reserve memory, grow, wait, copy inputs."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from collective.case import Case
from collective.session import Oracle, Session
from emulated.cluster import Settings
from emulated.conftest import Schedules
from emulated.runtime import EmulatedRuntime, run_emulated
from emulated.test_trouble import (
    AT_FAULT,
    HIGH_THROUGHPUT_ONLY,
    NODES,
    dispatch_arguments,
    exchange_well,
    layout_case,
)

from deepcomm import RecvLayout
from deepcomm.backends.base import NO_REPEATS
from deepcomm.errors import CommError, InvalidArgument
from deepcomm.testing import LocalGroup

pytestmark = pytest.mark.emulated_backend

TOKEN, EXPERT, PADDED = RecvLayout
RESERVATIONS = ("memory", "host_memory", "upload")
WORDS_OF_BUFFER = {"one-node": 12, "2x2": 20}
"""The fewest pieces of memory that a rank's buffer reserves."""
WORDS_OF_GROWTH = {"one-node": 3, "2x2": 5}


class OutOfMemory(Exception):
    """In the place of what a driver raises."""


@contextlib.contextmanager
def exhausted(group: LocalGroup, num_left: int) -> Iterator[None]:
    """Let rank AT_FAULT reserve that many more pieces of memory."""
    runtime: Any = group.runtime
    left = iter(range(num_left))

    def limit(reserve: Any) -> Any:
        def reserve_if_any_left(argument: Any) -> Any:
            if next(left, None) is None:
                raise OutOfMemory
            return reserve(argument)

        return reserve_if_any_left

    if group.rank == AT_FAULT:
        for name in RESERVATIONS:
            setattr(runtime, name, limit(getattr(runtime, name)))
    try:
        yield
    finally:
        for name in RESERVATIONS:
            vars(runtime).pop(name, None)


def failure_of(group: LocalGroup, num_left: int, act: Any) -> bool:
    """Return whether an action fails for want of memory; it must on all ranks, or on none."""
    error: Exception | None = None
    try:
        with exhausted(group, num_left):
            act()
    except (OutOfMemory, CommError) as caught:
        error = caught
    if error is not None and group.rank == AT_FAULT:
        assert isinstance(error, OutOfMemory)
    elif error is not None:
        assert isinstance(error, CommError)
        assert error.peer == AT_FAULT
    outcomes = group.all_gather(error is None)
    assert len(set(outcomes)) == 1
    return error is not None


@pytest.mark.parametrize("nodes", NODES)
def test_construction_that_lacks_memory_fails_on_all_ranks(
    schedules: Schedules, nodes: str
) -> None:
    case = layout_case(TOKEN, nodes)

    def construct(group: LocalGroup) -> int:
        num_failures = 0
        while failure_of(group, num_failures, lambda: case.open(group).close()):
            num_failures += 1
        return num_failures

    for settings in schedules():
        assert min(run_emulated(construct, case.num_ranks, settings)) >= WORDS_OF_BUFFER[nodes]


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("layout", [TOKEN, EXPERT])
def test_growth_that_fails_leaves_a_buffer_that_goes_on(
    schedules: Schedules, layout: RecvLayout, nodes: str
) -> None:
    case = layout_case(layout, nodes)

    def grow(group: LocalGroup) -> None:
        options = {**HIGH_THROUGHPUT_ONLY, "max_tokens_per_rank": 2, "growable": True}
        num_failures = 0
        with Session(group, case, oracle, **options) as session:
            arguments = dispatch_arguments(session)
            few = {**arguments, "x": arguments["x"][:2], "topk_idx": arguments["topk_idx"][:2]}
            few["topk_weights"] = arguments["topk_weights"][:2]
            while failure_of(group, num_failures, lambda: session.buffer.dispatch(**arguments)):
                num_failures += 1
                session.buffer.dispatch(**few)
            exchange_well(session)
            assert num_failures >= WORDS_OF_GROWTH[nodes]

    for settings in schedules():
        oracle = Oracle()
        run_emulated(grow, case.num_ranks, settings)


@pytest.mark.parametrize("nodes", NODES)
def test_buffer_can_be_closed_after_a_growth_that_failed(schedules: Schedules, nodes: str) -> None:
    case, oracle = layout_case(TOKEN, nodes), Oracle()

    def grow(group: LocalGroup) -> None:
        options = {**HIGH_THROUGHPUT_ONLY, "max_tokens_per_rank": 2, "growable": True}
        with Session(group, case, oracle, **options) as session:
            arguments = dispatch_arguments(session)
            assert failure_of(group, 1, lambda: session.buffer.dispatch(**arguments))
            session.buffer._backend.engine.close()  # type: ignore[attr-defined]

    for settings in schedules():
        run_emulated(grow, case.num_ranks, settings)


@pytest.mark.parametrize(("nodes", "num_waits"), [("one-node", 1), ("2x2", 3)])
def test_host_waits_longer_than_all_waits_of_the_device(
    schedules: Schedules, nodes: str, num_waits: int
) -> None:
    case, oracle, timeout_s = layout_case(EXPERT, nodes), Oracle(), 100.0

    def wait(group: LocalGroup) -> float:
        options = {**HIGH_THROUGHPUT_ONLY, "timeout_s": timeout_s}
        runtime: Any = group.runtime
        limits: list[float] = []

        def wait_word(address: int, expected: int, record_address: int, limit_s: float) -> bool:
            limits.append(limit_s)
            if len(limits) == 1:
                return False  # late
            actual = EmulatedRuntime.wait_word
            return actual(runtime, address, expected, record_address, limit_s)

        runtime.wait_word = wait_word
        with Session(group, case, oracle, **options) as session:
            exchange_well(session)
        return limits[1]

    for settings in schedules():
        for limit_s in run_emulated(wait, case.num_ranks, settings):
            assert num_waits * timeout_s < limit_s < (num_waits + 1) * timeout_s


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor of the same shape whose rows kernels cannot read in place."""
    wider = torch.zeros(len(tensor), tensor.shape[1] + 3, dtype=tensor.dtype)
    return wider[:, 1 : 1 + tensor.shape[1]]


def scattered(tensor: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor of the same shape that is no consecutive memory."""
    return torch.zeros(tensor.shape[1], len(tensor), dtype=tensor.dtype).T


@pytest.mark.parametrize("make", [unaligned, scattered])
@pytest.mark.parametrize("nodes", NODES)
def test_inputs_are_copied_after_the_event_that_says_they_are_written(
    schedules: Schedules, nodes: str, make: Any
) -> None:
    case, oracle = layout_case(TOKEN, nodes), Oracle()

    def write_late(group: LocalGroup) -> None:
        runtime: Any = group.runtime
        with Session(group, case, oracle, **HIGH_THROUGHPUT_ONLY) as session:
            arguments = dispatch_arguments(session)
            expected = session.buffer.dispatch(**arguments)
            combined = session.buffer.combine(expected.x, expected.handle)
            late = {name: make(arguments[name]) for name in ("x", "topk_idx", "topk_weights")}
            y = make(expected.x)
            written = [(late[name], arguments[name]) for name in late] + [(y, expected.x)]

            def write(_: Any) -> None:
                for target, source in written:
                    target.copy_(source)

            @contextlib.contextmanager
            def on_stream(event: Any) -> Iterator[None]:
                if event is not None:
                    write(event)
                yield

            runtime.on_stream, runtime.wait_event = on_stream, write
            options = {"previous_event": expected.event or runtime.record_event(), "async_op": True}
            late["topk_idx"].fill_(-1)
            output = session.buffer.dispatch(**{**arguments, **late}, **options)
            output.event.synchronize()
            assert torch.equal(output.x, expected.x)
            assert torch.equal(output.topk_weights, expected.topk_weights)
            y.zero_()
            again = session.buffer.combine(y, output.handle, **options)
            again.event.synchronize()
            assert torch.equal(again.x, combined.x)

    for settings in schedules():
        run_emulated(write_late, case.num_ranks, settings)


def test_low_latency_operations_follow_asynchronous_ones(schedules: Schedules) -> None:
    case, oracle = Case(num_ranks=2, num_tokens=4), Oracle()

    def dispatch_often(group: LocalGroup) -> None:
        runtime: Any = group.runtime
        waited: list[Any] = []
        with Session(group, case, oracle) as session:
            arguments = dispatch_arguments(session)
            inputs = [arguments[name] for name in ("x", "topk_idx", "topk_weights")]
            dispatch = session.buffer.low_latency_dispatch
            runtime.wait_event = waited.append
            first = dispatch(*inputs, async_op=True)
            assert first.event is not None
            dispatch(*inputs)
            assert waited == [first.event]
            waited.clear()
            flying = dispatch(*inputs, async_op=True)
            session.buffer.set_rank_mask(1 - group.rank, False)
            assert waited == [flying.event]
            waited.clear()
            # What ran on the caller's stream has left no event: all of its work is waited for.
            written = runtime.record_event()
            dispatch(*inputs, async_op=True, previous_event=written)
            assert waited == [written]
            # A graph cannot wait for what was recorded outside.
            runtime.is_capturing = lambda: True
            session.buffer._backend._order_on_current_stream(None)
            assert waited == [written]

    for settings in itertools.islice(schedules(), 1):
        run_emulated(dispatch_often, case.num_ranks, settings)


def test_low_latency_calls_are_repeated_where_nothing_is_to_be_waited_for(
    schedules: Schedules,
) -> None:
    case = Case(num_ranks=2, num_tokens=4)

    def dispatch_often(group: LocalGroup) -> None:
        with Session(group, case, Oracle(), max_tokens_per_rank=2, growable=True) as session:
            arguments, buffer = dispatch_arguments(session), session.buffer
            backend: Any = buffer._backend
            few = {"x": arguments["x"][:2], "topk_idx": arguments["topk_idx"][:2]}
            assert backend.repeats is NO_REPEATS
            buffer.low_latency_dispatch(**few)
            repeats = backend.repeats
            assert repeats is not NO_REPEATS
            for asynchronous in (buffer.low_latency_dispatch, buffer.dispatch):
                asynchronous(**few, async_op=True)
                assert backend.repeats is NO_REPEATS
                buffer.low_latency_dispatch(**few)
                assert backend.repeats is repeats
            buffer.dispatch(**arguments)
            assert backend.repeats is NO_REPEATS, "the buffer has grown"
            buffer.low_latency_dispatch(**few)
            assert backend.repeats not in (NO_REPEATS, repeats)
            counts = backend._low_latency.counts
            assert counts.num_dispatches == 5, "those of the smaller buffer count"
            assert buffer.stats().num_dispatches == 7, "one that grows it takes place once"
        assert backend.repeats is NO_REPEATS
        with pytest.raises(CommError, match="low_latency_dispatch: the buffer is closed"):
            buffer.low_latency_dispatch(**few)

    for settings in itertools.islice(schedules(), 1):
        run_emulated(dispatch_often, case.num_ranks, settings)


@pytest.mark.parametrize("nodes", NODES)
def test_low_latency_of_a_smaller_buffer_is_refused(schedules: Schedules, nodes: str) -> None:
    """Its slots are gone: an operation in flight cannot be received, nor a handle be used."""
    case = layout_case(PADDED, nodes)

    def outlive(group: LocalGroup) -> None:
        with Session(group, case, Oracle(), max_tokens_per_rank=2, growable=True) as session:
            arguments, buffer = dispatch_arguments(session), session.buffer
            few = {"x": arguments["x"][:2], "topk_idx": arguments["topk_idx"][:2]}
            few["recv_layout"] = PADDED
            whole = buffer.low_latency_dispatch(**few)
            flying = buffer.low_latency_dispatch(**few, return_hook=True)
            buffer.dispatch(**arguments)
            with pytest.raises(CommError, match=r"has grown, since the call$"):
                flying.hook()
            y = torch.zeros(whole.x.shape, dtype=torch.bfloat16)
            with pytest.raises(InvalidArgument, match=r"from before it grew$"):
                buffer.low_latency_combine(y, whole.handle, apply_weights=False)
            flying = buffer.low_latency_dispatch(**few, return_hook=True)
        with pytest.raises(CommError, match="low_latency_dispatch: the buffer has been closed"):
            flying.hook()

    for settings in schedules():
        run_emulated(outlive, case.num_ranks, settings)


@pytest.mark.parametrize("nodes", NODES)
def test_buffer_is_freed_when_it_is_dropped(nodes: str) -> None:
    """Its streams go back at once: ranks of one device have few that do not wait for each other."""
    case = layout_case(TOKEN, nodes)
    backends: list[weakref.ref[Any]] = []

    def body(group: LocalGroup) -> None:
        with Session(group, case) as session:
            backends.append(weakref.ref(session.buffer._backend))
            for round_idx in range(2):
                session.low_latency_combine(session.low_latency_dispatch(round_idx))
            flying = session.low_latency_dispatch(1, async_op=True, return_hook=True)
            flying.finish()
            session.low_latency_combine(flying, async_op=True)
            flying = session.dispatch(0, async_op=True)
            session.combine(flying, async_op=True)
            flying.actual.event.synchronize()

    gc.collect()
    gc.disable()
    try:
        run_emulated(body, case.num_ranks, Settings())
        assert [backend() for backend in backends] == [None] * case.num_ranks
    finally:
        gc.enable()
