# SPDX-License-Identifier: Apache-2.0
"""The low-latency operations on GPUs: launches of csrc/kernels/low_latency.

The host knows neither counts nor, until later, whether a peer has refused: kernels count the
operations, and what they find wrong is raised by the next call, hook or ``event.synchronize``. A
call that raises what an earlier operation left has launched its own all the same: ranks learn of a
refusal at different calls, and yet all of them take the same number of turns.
"""

from __future__ import annotations

import ctypes
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from deepcomm._C import kernels
from deepcomm.backends.base import NO_REPEATS
from deepcomm.backends.cuda.low_latency_carrier import SlotCarrier, sms_beside_network
from deepcomm.backends.cuda.low_latency_operation import (
    CombineOperation,
    Context,
    DispatchOperation,
    known_record,
)
from deepcomm.backends.cuda.low_latency_plan import prepare_repeat
from deepcomm.backends.cuda.low_latency_repeats import open_repeats
from deepcomm.backends.cuda.low_latency_slots import (
    BOTH,
    RECEIVE,
    SEND,
    Place,
    Slots,
    has_nodes,
    is_carried,
)
from deepcomm.backends.cuda.low_latency_status import COMBINE, DISPATCH
from deepcomm.backends.cuda.low_latency_words import Sizes
from deepcomm.checks import check_taken_back
from deepcomm.errors import CommError, Error, InvalidArgument, describe_error
from deepcomm.group import agree_on

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deepcomm.backends.base import CombineRequest, DispatchRequest, Repeats
    from deepcomm.config import BufferConfig
    from deepcomm.types import CombineOutput, DispatchOutput, Event

__all__ = ["LowLatency", "Place"]

Operation = DispatchOperation | CombineOperation


def nothing_to_order() -> None:
    """Do nothing: all operations come on one stream."""


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """An operation between its send and its hook.

    Attributes:
        request: Holds tensors that kernels are going to use.
        sent: When the send phase is over, where it is on a stream of its own.
        arrived: When a network has brought what is received, where there is one.
    """

    operation: Operation
    request: DispatchRequest | CombineRequest
    sent: Event | None
    arrived: Event | None


class LowLatency:
    """Low-latency operations of one buffer on one rank.

    Attributes:
        counts: Of calls so far, those of an earlier size among them.
        repeats: What does calls that are like earlier ones.
    """

    def __init__(self, place: Place, config: BufferConfig, previous: LowLatency | None) -> None:
        """Reserve next to nothing: slots come with the first operation.

        Args:
            place: Where operations take place.
            config: Of the buffer.
            previous: Hands over its rank mask, when a buffer has grown.
        """
        self._place = place
        self._config = config
        self._num_ranks = place.topology.num_ranks
        self._sizes = Sizes(
            self._num_ranks,
            config.max_tokens_per_rank,
            config.num_experts // self._num_ranks,
            config.hidden,
            place.runtime.device,
            place.topology.num_nodes if has_nodes(config, place.topology) else 1,
            kernels.low_latency_row_parts(config.hidden),
        )
        self._is_carried = is_carried(config, place.topology)
        self._context: Context | None = None
        self._mask = place.runtime.memory(4 * self._num_ranks)
        self._late_memory = place.runtime.host_memory(4 * self._num_ranks)
        self._late = (ctypes.c_uint32 * self._num_ranks).from_address(self._late_memory.address)
        self._masked = [False] * self._num_ranks
        # Of combines whose hook was called, perhaps on another stream than the call, whose next
        # tensors could lie there. A slot's next send waits until its receive phase is over.
        self._turns: deque[torch.Tensor] = deque(maxlen=config.num_low_latency_slots)
        self.counts: kernels.OperationCounts = (
            previous.counts if previous else kernels.OperationCounts()
        )
        self.repeats: Repeats = NO_REPEATS
        self._bytes_carried_before = previous.bytes_carried if previous else 0
        self._is_closed = False
        for rank, masked in enumerate(previous.rank_mask() if previous else ()):
            if masked:
                self.set_masked(rank, True)

    @property
    def num_bytes(self) -> int:
        """Bytes of symmetric memory reserved on this rank."""
        return 0 if self._context is None else self._context.slots.memory.num_bytes

    @property
    def num_sms(self) -> int:
        """How many SMs kernels may fill."""
        if not self._is_carried:
            return self._place.num_sms
        return min(self._place.num_sms, sms_beside_network(self._place.runtime.num_sms))

    @property
    def bytes_carried(self) -> int:
        """Bytes that a network has been given for other ranks; those of an earlier size count."""
        carrier = None if self._context is None else self._context.carrier
        return self._bytes_carried_before + (0 if carrier is None else carrier.bytes_carried)

    def close(self) -> None:
        """Give the symmetric memory back; idempotent."""
        self._is_closed = True
        if self._context is not None:
            if self._context.carrier is not None:
                self._context.carrier.leave()
            self._context.slots.close()

    def check(self) -> None:
        """Raise what kernels have found to be wrong, unless it was raised before."""
        self._place.failure.check_usable("synchronize")
        if self._context is not None:
            self._context.slots.status.raise_pending()

    # ---- rank mask

    def set_masked(self, rank: int, masked: bool) -> None:
        """Mark a peer dead or alive, after the operations launched so far on this stream.

        Raises:
            InvalidArgument: A network carries the rails: it waits for all of its ranks. Or a rank
                that is masked cannot be taken back now.
        """
        if masked and self._is_carried:
            raise InvalidArgument(
                f"rail: expected 'lsa' to mask ranks, got {self._config.rail!r}: a network waits "
                "for all of them"
            )
        if self.rank_mask()[rank] and not masked and self._context is not None:
            check_taken_back(rank, self._context.slots.turns.num_in_flight)
        params = kernels.LowLatencyMaskParams()
        params.rank_mask = self._mask.address
        params.peer = rank
        params.value = int(masked)
        runtime = self._place.runtime
        runtime.launch(self._place.functions.mask, 1, params)
        self._masked[rank] = masked
        self._late[rank] = 0

    def rank_mask(self) -> list[bool]:
        """Return who is masked, by hand or because it was late."""
        return [mine or late != 0 for mine, late in zip(self._masked, self._late, strict=True)]

    # ---- what both operations share

    def _open(self, operation: str) -> Context:
        """Return what operations need; the first one reserves it, which is collective."""
        self._place.failure.check_usable(operation)
        if self._context is None:
            self._context = self._reserve(operation)
            if self._context.carrier is None and self._sizes.num_nodes == 1:
                self.repeats = open_repeats(self._context, self.counts, self._place)
        return self._context

    def check_capture(self) -> None:
        """Raise InvalidArgument where a graph is being captured that cannot hold these rails."""
        if self._is_carried and self._place.runtime.is_capturing():
            raise InvalidArgument(
                "rail: expected 'lsa' while a CUDA graph is captured, got "
                f"{self._config.rail!r}: the host has to tell the network which slot to carry"
            )

    def _reserve(self, operation: str) -> Context:
        if self._config.num_low_latency_slots == 0:
            raise InvalidArgument(
                f"{operation}: the buffer was created with num_low_latency_slots = 0"
            )
        if self._place.runtime.is_capturing():
            raise InvalidArgument(
                f"{operation}: expected a first call before the graph's capture, to reserve memory"
            )
        late_ranks = self._late_memory.device_address
        slots = Slots(self._place, self._config, self._mask, late_ranks)
        return Context(
            slots,
            self._open_carrier(slots),
            self._place.functions,
            self._config,
            self._sizes,
            self._place.buffer_id,
            self.num_sms,
            torch.zeros((), dtype=torch.bool, device=self._sizes.device),
        )

    def _open_carrier(self, slots: Slots) -> SlotCarrier | None:
        """Reserve what is beside slots that a network carries; collective."""
        if not self._is_carried:
            return None
        timeout_s = self._config.timeout_s
        try:
            carrier = agree_on(
                self._place.group, "network", lambda: SlotCarrier(self._place, slots, timeout_s)
            )
            carrier.join()
        except BaseException:
            slots.close()
            raise
        return carrier

    def _refuse_if_open(
        self, context: Context, operation: str, request: Any, error: Exception
    ) -> None:
        """Tell every rank that this one refuses, unless there is no free slot to do so in."""
        runtime, slots = self._place.runtime, context.slots
        if self._place.failure.failed or runtime.is_capturing():
            return
        try:
            slots.check_free(operation)
        except Error:
            return
        params = slots.refuse_params.copy()
        params.is_combine = operation == COMBINE
        is_masking = getattr(request, "on_timeout", None) == "mask"
        params.base.mask_late = is_masking and context.carrier is None
        params.set_message(describe_error(error))
        record = known_record(request, context.buffer_id) if operation == COMBINE else None
        if record is not None:
            record.fill(params.base)
        if context.carrier is not None:
            context.carrier.refuse(params, request, slots.turns.next_slot)
        else:
            assert self._place.functions.refuse is not None
            runtime.launch(self._place.functions.refuse, 1, params)
        slots.turns.open()

    @contextmanager
    def _stream_of(
        self, request: DispatchRequest | CombineRequest, operation: Operation
    ) -> Iterator[None]:
        """Make current the stream that an operation runs on; its tensors live until it is done."""
        runtime = self._place.runtime
        with runtime.on_stream(request.previous_event):
            yield
            for tensor in operation.tensors:
                if tensor is not None:
                    runtime.keep_alive(tensor)

    def _run(
        self, context: Context, request: DispatchRequest | CombineRequest, operation: Operation
    ) -> tuple[Event | None, Callable[[], None] | None]:
        """Launch both phases, or the first; return the completion and the hook, if asked for."""
        runtime, slots = self._place.runtime, context.slots
        event: Event | None = None
        if request.async_op:
            with self._stream_of(request, operation):
                arrived = self._launch(context, operation, request.return_hook)
                runtime.flush()
                event = runtime.record_event(self.check)
        else:
            arrived = self._launch(context, operation, request.return_hook)
            runtime.flush()
        number = slots.turns.open()
        if not request.return_hook:
            operation.on_received()
            slots.status.raise_earlier(runtime.is_capturing)
            return event, None
        slots.turns.leave_in_flight(number)
        flight = Flight(operation, request, event, arrived)
        return event, self._make_hook(context, number, flight)

    def _launch(self, context: Context, operation: Operation, has_hook: bool) -> Event | None:
        """Launch both phases, or the first; return when a network has brought what is received."""
        launches, runtime = operation.plan.launches, self._place.runtime
        if (carrier := context.carrier) is not None:
            arrived = carrier.send(operation, context.slots.turns.next_slot)
            if not has_hook:
                carrier.receive(operation, arrived)
            return arrived
        if has_hook:
            runtime.launch(*launches[SEND], operation.params)
        elif self._sizes.num_nodes == 1:
            runtime.launch(*launches[BOTH], operation.params)
            prepare_repeat(operation.plan, runtime)
        else:
            runtime.launch(*launches[SEND], operation.params)
            runtime.launch(*launches[RECEIVE], operation.params)
        return None

    def _make_hook(self, context: Context, number: int, flight: Flight) -> Callable[[], None]:
        """Return a hook that launches the receive phase, once."""
        name = flight.operation.name
        in_flight = [flight]  # whose tensors the kernels are going to use

        def hook() -> None:
            if not in_flight:
                raise InvalidArgument(f"{name}: expected one call of its hook, got a second")
            self._place.failure.check_usable(name)
            if self._is_closed:
                raise CommError(f"{name}: the buffer has been closed, or has grown, since the call")
            self.check_capture()
            flight = in_flight.pop()
            context.slots.turns.settle(number)
            self._place.runtime.push_range(f"deepcomm.{name}.hook")
            try:
                self._receive(context, flight)
            finally:
                self._place.runtime.pop_range()

        return hook

    def _receive(self, context: Context, flight: Flight) -> None:
        """Launch the receive phase of an operation that has been sent."""
        runtime, operation = self._place.runtime, flight.operation
        if flight.sent is not None:
            runtime.wait_event(flight.sent)
        if context.carrier is not None and flight.arrived is not None:
            context.carrier.receive(operation, flight.arrived)
        else:
            runtime.launch(*operation.plan.launches[RECEIVE], operation.params)
        if operation.turn is not None:
            self._turns.append(operation.turn)
        runtime.flush()
        operation.on_received()
        context.slots.status.raise_earlier(runtime.is_capturing)

    # ---- the operations

    def dispatch(
        self, request: DispatchRequest, order_refusal: Callable[[], None] = nothing_to_order
    ) -> DispatchOutput:
        """Send and receive in one launch; or send, and leave the rest to the hook.

        ``order_refusal`` lets the current stream wait for operations on others.
        """
        context = self._open(DISPATCH)
        try:
            context.slots.check_free(DISPATCH)
            operation = DispatchOperation.of(context, request)
        except Exception as error:
            order_refusal()
            self._refuse_if_open(context, DISPATCH, request, error)
            raise
        self.counts.num_dispatches += 1
        self.counts.tokens_sent += operation.plan.num_tokens
        event, hook = self._run(context, request, operation)
        return operation.output(event, hook)

    def combine(
        self, request: CombineRequest, order_refusal: Callable[[], None] = nothing_to_order
    ) -> CombineOutput:
        """Send and receive in one launch; or send, and leave the rest to the hook; as dispatch."""
        context = self._open(COMBINE)
        try:
            context.slots.check_free(COMBINE)
            operation = CombineOperation.of(context, request)
        except Exception as error:
            order_refusal()
            self._refuse_if_open(context, COMBINE, request, error)
            raise
        self.counts.num_combines += 1
        event, hook = self._run(context, request, operation)
        return operation.output(event, hook)
