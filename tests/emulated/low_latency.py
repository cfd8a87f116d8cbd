# SPDX-License-Identifier: Apache-2.0
"""Low-latency operations of the CUDA backend on emulated ranks, beside the reference."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pytest
import torch
from collective.case import Case
from collective.scenario import other_side, take_back
from collective.session import Oracle, Session
from emulated.cluster import RankStopped, Settings
from emulated.runtime import EmulatedRuntime, LazyRuntime, run_emulated

from deepcomm import Buffer, RecvLayout, reference
from deepcomm.backends.cuda import functions
from deepcomm.backends.cuda.failure import COMPLETE, ErrorRecord
from deepcomm.backends.cuda.low_latency import LowLatency, Place
from deepcomm.backends.cuda.low_latency_slots import is_carried
from deepcomm.config import BufferConfig
from deepcomm.errors import CommError, CommTimeout, Error, InvalidArgument
from deepcomm.group import SubGroup
from deepcomm.testing.oracle import assert_combine_equal, assert_dispatch_equal
from deepcomm.topology import Topology

if TYPE_CHECKING:
    from deepcomm.backends.base import CombineRequest, DispatchRequest, Repeats
    from deepcomm.backends.cuda.network import Network
    from deepcomm.types import CombineOutput, DispatchOutput

T = TypeVar("T")

NUM_THREADS = 64  # of a block: fewer than on a GPU, so that a seed takes milliseconds
TIMEOUT_S = 1.0  # of virtual time
COUNTED_IN_TURNS = Case(
    num_ranks=2,
    num_tokens=70,  # there is room for 64 at once of so many experts
    hidden=8,
    num_topk=2,
    experts_per_rank=256,
    even=True,
    layout=RecvLayout.EXPERT_PADDED,
    routing="uniform",
)


class Failure:
    """The error record alone."""

    def __init__(self, runtime: EmulatedRuntime) -> None:
        self._memory = runtime.host_memory(ctypes.sizeof(ErrorRecord))
        self._record = ErrorRecord.from_address(self._memory.address)
        self.record_address = self._memory.address
        self.record_device_address = self._memory.device_address
        self._failed = runtime.memory(8)
        self.failed_address = self._failed.address
        self._fatal: Error | None = None

    @property
    def failed(self) -> bool:
        return self._fatal is not None or self._record.state == COMPLETE

    def raise_fatal(self, error: Error) -> None:
        self._fatal = error
        self._record.is_condemned = 1
        raise error

    def condemn(self, error: Error) -> None:
        self._fatal = self._fatal or error
        self._record.is_condemned = 1

    def check_usable(self, operation: str) -> None:
        if self._fatal is not None:
            raise self._fatal
        if self.failed:
            peer = self._record.peer
            raise CommTimeout(f"{operation}: rank {peer} did not come", peer)


class CompleteRepeats:
    """What repeats operations, whose calls are complete."""

    def __init__(self, backend: EmulatedBackend) -> None:
        self._backend = backend

    def dispatch(self, arguments: tuple[Any, ...], /) -> DispatchOutput | None:
        return self._complete(self._backend.low_latency.repeats.dispatch(arguments))

    def combine(self, arguments: tuple[Any, ...], /) -> CombineOutput | None:
        return self._complete(self._backend.low_latency.repeats.combine(arguments))

    def _complete(self, output: Any) -> Any:
        if output is not None:
            self._backend.settle()
        return output


class EmulatedBackend:
    """The part of ``deepcomm.backends.base.Backend`` that is low latency; calls are complete."""

    def __init__(self, group: Any, config: BufferConfig) -> None:
        self.runtime: EmulatedRuntime = group.runtime
        self.config = config
        self.device = self.runtime.device
        self.topology = Topology(group.rank, group.size, config.ranks_per_node or group.size)
        place = Place(
            group,
            LazyRuntime(self.runtime),  # type: ignore[arg-type]
            self.topology,
            b"buffer",
            Failure(self.runtime),
            functions.LowLatencyFunctions.load(self.runtime, config, self.topology),
            self.runtime.num_sms,
            self._open_network(group),
        )
        self.low_latency = LowLatency(place, config, None)

    def _open_network(self, group: Any) -> Network | None:
        if not is_carried(self.config, self.topology):
            return None
        rail = SubGroup(group, self.topology.rail_ranks)
        return self.runtime.network(rail, self.config.timeout_s, None, (self.config.rail,))

    @property
    def repeats(self) -> Repeats:
        return CompleteRepeats(self)

    def low_latency_dispatch(self, request: DispatchRequest) -> DispatchOutput:
        return self._complete(self.low_latency.dispatch(request))

    def low_latency_combine(self, request: CombineRequest) -> CombineOutput:
        return self._complete(self.low_latency.combine(request))

    def _complete(self, output: Any) -> Any:
        hook = output.hook
        if hook is None:
            self.settle()
            return output

        def hook_and_settle() -> None:
            hook()
            self.settle()

        return replace(output, hook=hook_and_settle)

    def settle(self) -> None:
        self.runtime.flush()
        self.low_latency.check()

    def set_rank_mask(self, rank: int, masked: bool) -> None:
        self.low_latency.set_masked(rank, masked)

    def rank_mask(self) -> torch.Tensor:
        return torch.tensor(self.low_latency.rank_mask())

    def close(self) -> None:
        self.low_latency.close()


class LowLatencySession(Session):
    """One emulated rank of a case."""

    def __init__(self, group: Any, case: Case, oracle: Oracle, **options: Any) -> None:
        config = BufferConfig(
            num_experts=case.num_experts,
            hidden=case.hidden,
            max_tokens_per_rank=case.num_tokens,
            ranks_per_node=case.ranks_per_node,
            **{"num_topk": case.num_topk, "timeout_s": TIMEOUT_S, **options},
        )
        config.check(case.num_ranks)
        self.backend = EmulatedBackend(group, config)
        self.buffer = Buffer.__new__(Buffer)
        self.buffer._backend = self.backend  # type: ignore[assignment]
        self.buffer.group = group
        self.case, self.group, self.rank = case, group, group.rank
        self._oracle, self._step = oracle, 0
        self._random = np.random.default_rng(self.rank)


def play(
    case: Case,
    body: Callable[[LowLatencySession], T],
    settings: Settings | None = None,
    **options: Any,
) -> list[T]:
    """Run ``body`` on every rank of an emulated cluster; return the results by rank."""
    oracle = Oracle()
    if options.get("rail") == "nccl":
        settings = replace(settings or Settings(), has_network=True)

    def on_rank(group: Any) -> T:
        with LowLatencySession(group, case, oracle, **options) as session:
            return body(session)

    return run_emulated(on_rank, case.num_ranks, settings)


def outcome_of_rounds(session: LowLatencySession) -> str:
    """Dispatch and combine some times; return how that ended where a rank may be stopped."""
    try:
        for round_idx in range(4):
            session.low_latency_combine(session.low_latency_dispatch(round_idx))
    except CommTimeout:
        return "timeout"
    except RankStopped:
        return "stopped"
    return "done"


def receive_beside(session: LowLatencySession, one: Any) -> Callable[[], None]:
    """Call the hook of a dispatch on a stream of its own; return what waits for it and compares."""
    runtime = session.backend.runtime
    runtime.order_side()
    with runtime.on_side():
        one.actual.hook()
        received = runtime.record_event()

    def finish() -> None:
        runtime.wait_event(received)
        session.backend.settle()
        assert_dispatch_equal(one.actual, one.expected[session.rank], rank=session.rank)

    return finish


def flights(session: LowLatencySession) -> None:
    """More operations than slots, in flight together; ranks may be a slot's turn apart."""
    for round_idx in range(3):
        flying = [session.low_latency_dispatch(round_idx, return_hook=True) for _ in range(3)]
        for one in flying:
            one.finish()
    one = session.low_latency_dispatch(0, return_hook=True)
    for round_idx in range(1, 5):
        two = session.low_latency_dispatch(round_idx, return_hook=True)
        one.finish()
        back = session.low_latency_combine(one, override=round_idx % 2 == 0, return_hook=True)
        two.finish()
        back.finish()
        session.low_latency_combine(two, carried=True, apply_weights=False)
        session.low_latency_combine(two, override=True)
        one = session.low_latency_dispatch(round_idx, return_hook=True)
    one.finish()


def refusal(session: LowLatencySession) -> None:
    """Refuse operations, by the device and by the host; the next ones are right."""
    inputs = session.inputs(0)
    x, ids = inputs.xs[session.rank], inputs.ids[session.rank].clone()
    if session.rank == 0:
        ids[0] = 99
    with pytest.raises((InvalidArgument, CommError)):
        session.buffer.low_latency_dispatch(x, ids)
    if session.rank == 0:
        x = x[:, 1:]
    with pytest.raises((InvalidArgument, CommError)):
        session.buffer.low_latency_dispatch(x, inputs.ids[session.rank])
    session.low_latency_combine(session.low_latency_dispatch(0))


def fly_beside(session: LowLatencySession) -> None:
    """Receive on one stream what later operations, on another one, need the slot of."""
    num_slots = session.backend.config.num_low_latency_slots
    one = session.low_latency_dispatch(0, return_hook=True)
    for round_idx in range(4):
        finish = receive_beside(session, one)
        for _ in range(num_slots):
            session.low_latency_dispatch(round_idx + 1)
        finish()
        session.low_latency_combine(one)
        one = session.low_latency_dispatch(round_idx, return_hook=True)
    one.finish()


def leave_unread(session: LowLatencySession, cut: int, num_apart: int, loses_sums: bool) -> None:
    """Mask a rank that does not know of it and sends, until it finds nobody there; take it back.

    Args:
        session: Of a rank.
        cut: The rank.
        num_apart: Operations until it is taken back, at least one.
        loses_sums: Whether what it sends in vain are sums of a combine, else rows of a dispatch.
    """
    one = session.low_latency_dispatch(0)
    others = other_side(session, cut)
    if session.rank != cut:
        session.buffer.set_rank_mask(cut, True)
    buffer, inputs = session.buffer, session.inputs(1)
    x, ids = inputs.xs[session.rank], inputs.ids[session.rank]
    if loses_sums:
        y = torch.ones(one.actual.x.shape, dtype=torch.bfloat16)
        buffer.low_latency_combine(y, one.actual.handle, on_timeout="mask")
    else:
        buffer.low_latency_dispatch(x, ids, on_timeout="mask")
    masked = session.buffer.rank_mask().tolist()
    assert [rank for rank, is_masked in enumerate(masked) if is_masked] == others
    for _ in range(num_apart - 1):
        buffer.low_latency_dispatch(x, ids)
    take_back(session, others, range(2, 6))


def refuse_in_flight(session: LowLatencySession, cut: int | None) -> None:
    """Call off an operation, with all slots in flight, and use its slot next.

    Args:
        session: Of a rank.
        cut: A rank that the others have masked meanwhile, as it has them.
    """
    session.low_latency_combine(session.low_latency_dispatch(0))
    others = [] if cut is None else other_side(session, cut)
    for rank in others:
        session.buffer.set_rank_mask(rank, True)
    buffer, inputs = session.buffer, session.inputs(1)
    x, ids = inputs.xs[session.rank], inputs.ids[session.rank]
    wrong = ids.clone()
    wrong[0] = 99 if session.rank in (0, cut) else wrong[0]
    flying = [buffer.low_latency_dispatch(x, wrong, return_hook=True)]
    for _ in range(1, session.backend.config.num_low_latency_slots):
        flying.append(buffer.low_latency_dispatch(x, ids, return_hook=True))
    with pytest.raises((InvalidArgument, CommError)):
        flying[0].hook()
    flying.append(buffer.low_latency_dispatch(x, ids, return_hook=True))
    for output in flying[1:]:
        output.hook()
        session.backend.settle()
    take_back(session, others, range(2, 6))


def take_back_beside(session: LowLatencySession, cut: int) -> None:
    """Receive on one stream while a later operation is sent on another, both without a rank."""
    session.low_latency_combine(session.low_latency_dispatch(0))
    buffer, runtime, inputs = session.buffer, session.backend.runtime, session.inputs(1)
    x, ids = inputs.xs[session.rank], inputs.ids[session.rank]
    if session.rank != cut:
        buffer.set_rank_mask(cut, True)
    one = buffer.low_latency_dispatch(x, ids, on_timeout="mask", return_hook=True)
    runtime.order_side()
    with runtime.on_side():
        one.hook()
    for _ in range(session.backend.config.num_low_latency_slots + 1):
        buffer.low_latency_dispatch(x, ids, on_timeout="mask")
    session.backend.settle()
    take_back(session, range(session.group.size), range(2, 8))


CANCELLING = torch.tensor([1.0, -1.0, 2.0**-10, -(2.0**-10), 2.0**25, -(2.0**25)])


def combine_what_cancels(session: LowLatencySession) -> None:
    """Give back numbers whose sums depend on the order of terms and on what is rounded when."""
    one = session.low_latency_dispatch(0)
    ys, expected = session._oracle.get("cancelling", lambda: cancelling_outputs(one.expected))
    back = session.buffer.low_latency_combine(
        ys[session.rank], one.actual.handle, apply_weights=False
    )
    assert_combine_equal(back, expected[session.rank], rank=session.rank)


def cancelling_outputs(received: list[Any]) -> tuple[list[torch.Tensor], list[Any]]:
    random = torch.Generator().manual_seed(0)
    choices = [
        torch.randint(len(CANCELLING), output.x.shape, generator=random) for output in received
    ]
    ys = [CANCELLING[choice].bfloat16() for choice in choices]
    handles = [output.handle for output in received]
    return ys, list(reference.low_latency_combine(ys, handles, apply_weights=False))


def use_small_blocks(monkeypatch: Any) -> None:
    """Launch blocks of few threads."""
    monkeypatch.setattr(functions, "NUM_THREADS", NUM_THREADS)
