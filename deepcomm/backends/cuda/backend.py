# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: construction, growth, the order of operations, and what ends them."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from deepcomm.backends.base import NO_REPEATS
from deepcomm.backends.cuda.domain import Machine
from deepcomm.backends.cuda.engine import DispatchOperation, Engine, FlatEngine, waits_by_rank
from deepcomm.backends.cuda.failure import Failure, FailureMemory
from deepcomm.backends.cuda.functions import LowLatencyFunctions
from deepcomm.backends.cuda.low_latency import LowLatency, Place
from deepcomm.backends.cuda.nodes import NodesEngine
from deepcomm.backends.cuda.routing import RoutingId
from deepcomm.backends.cuda.sms import DEFAULT_NUM_SMS, share_sms
from deepcomm.checks import check_peer
from deepcomm.errors import CommError, InvalidArgument
from deepcomm.group import Group, agree, agree_on, as_group, check_equal
from deepcomm.topology import find_nodes
from deepcomm.types import BufferStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from deepcomm.backends.base import CombineRequest, DispatchRequest, Repeats
    from deepcomm.backends.cuda.runtime import Runtime
    from deepcomm.config import BufferConfig
    from deepcomm.types import CombineOutput, DispatchOutput, Event

__all__ = ["CudaBackend"]

T = TypeVar("T")
Request = TypeVar("Request", "DispatchRequest", "CombineRequest")
Output = TypeVar("Output", "DispatchOutput", "CombineOutput")

LOG = logging.getLogger("deepcomm")
PROTOCOL_VERSION = 1
RAILS = ("auto", "lsa", "gin", "nccl")
NETWORKS = {"auto": ("gin", "nccl"), "gin": ("gin",), "nccl": ("nccl",), "lsa": ()}
"""What may be between ranks that are out of each other's reach, the best one first."""
GROWTH = 1.5


def choose_rail(asked: str, labels: Sequence[str]) -> tuple[str, str]:
    """Return how ranks of a rail reach each other, and why so; "auto" leaves open which network."""
    if asked != "auto":
        return asked, "as asked"
    if len(set(labels)) == 1:
        return "lsa", "all ranks reach each other"
    return "auto", "out of each other's reach"


class CudaBackend:
    """One rank's buffer on a GPU: symmetric memory, kernels, and one order of operations."""

    def __init__(self, group: Any, config: BufferConfig, runtime: Runtime) -> None:
        """Meet the peers, reserve memory, load kernels; collective."""
        self._group: Group = as_group(group)
        self.runtime = runtime
        self.device = runtime.device
        agree(self._group, "Buffer", lambda: self._check_config(config))
        entry = {"protocol": PROTOCOL_VERSION, **config.shared_fields()}
        check_equal("Buffer", self._group.all_gather(entry))
        labels = self._group.all_gather(runtime.reach)
        self.topology = find_nodes(self._group.rank, labels, config.ranks_per_node)
        rail, self._why_rail = choose_rail(config.rail, labels)
        per_node = self.topology.ranks_per_node
        # Which network it is shows when it is opened; it makes no other difference.
        rail_of_config = "nccl" if rail == "auto" else rail
        self.config = replace(config, ranks_per_node=per_node, rail=rail_of_config)
        self._networks = NETWORKS[rail]
        self.buffer_id: bytes = self._group.all_gather(os.urandom(8))[0]
        self._sms = share_sms(self._group, runtime, config.num_sms)
        self.num_sms = self._sms.high_throughput
        self.failure, self._low_latency_functions = agree_on(
            self._group, "Buffer", self._prepare_device
        )
        self.engine: Engine = self._open_engine()
        self.serial = 0
        self._num_dispatches = self._num_combines = self._tokens_sent = 0
        self._low_latency = self._open_low_latency(None)
        self.repeats: Repeats = NO_REPEATS
        self._last_event: Event | None = None
        self._is_last_captured = False
        self._closed = False

    def _check_config(self, config: BufferConfig) -> None:
        config.check(self._group.size)
        if config.rail not in RAILS:
            expected = ", ".join(map(repr, RAILS))
            raise InvalidArgument(f"rail: expected one of {expected} on CUDA, got {config.rail!r}")

    def _prepare_device(self) -> tuple[Failure, LowLatencyFunctions]:
        """Reserve and load what is needed before any domain."""
        runtime, topology, config = self.runtime, self.topology, self.config
        return (
            Failure(topology.rank, config.num_experts, FailureMemory.reserve(runtime)),
            LowLatencyFunctions.load(runtime, config, topology),
        )

    def _open_engine(self) -> Engine:
        machine = Machine(self.runtime, self.num_sms, self.failure)
        if self.topology.num_nodes == 1:
            return FlatEngine(self._group, self.config, machine)
        engine = NodesEngine(self._group, self.config, machine, self.topology, self._networks)
        self.config = replace(self.config, rail=engine.rail_name)
        return engine

    @property
    def num_bytes(self) -> int:
        """Bytes of symmetric memory reserved on this rank."""
        return self.engine.num_bytes + self._low_latency.num_bytes

    def _open_low_latency(self, previous: LowLatency | None) -> LowLatency:
        place = Place(
            self._group,
            self.runtime,
            self.topology,
            self.buffer_id + self.config.max_tokens_per_rank.to_bytes(4, "little"),
            self.failure,
            self._low_latency_functions,
            self._sms.low_latency,
            self.engine.network,
        )
        return agree_on(self._group, "Buffer", lambda: LowLatency(place, self.config, previous))

    # ---- operations

    def _prepare(self, operation: str, prepare: Callable[[], T], refuse: Callable[[], None]) -> T:
        """Check an operation's arguments; the peers hear of an error."""
        self._check_open(operation)
        self.failure.check_usable(operation)
        self.serial += 1  # whatever becomes of it, and whatever peers do meanwhile
        try:
            return prepare()
        except Exception:
            if not self.runtime.is_capturing():
                self._order_on_current_stream(None)
                refuse()
            raise

    def _raise_earlier(self) -> None:
        """Raise what an earlier operation has left, now that this one has taken its turn.

        Ranks see it at different calls, and yet all of them must enter the same operations. What is
        launched into a graph takes its turn at replays: the next call outside raises.
        """
        if self.failure.has_trouble and not self.runtime.is_capturing():
            self.failure.raise_trouble()

    def _check_open(self, operation: str) -> None:
        if self._closed:
            raise CommError(f"{operation}: the buffer is closed")

    def dispatch(self, request: DispatchRequest) -> DispatchOutput:
        """High-throughput dispatch."""
        self.runtime.push_range("deepcomm.dispatch")
        try:
            output = self._dispatch(request)
            self._raise_earlier()
        finally:
            self.runtime.pop_range()
        return output

    def _dispatch(self, request: DispatchRequest) -> DispatchOutput:
        routing = RoutingId(self.buffer_id, self.serial + 1)

        def prepare() -> DispatchOperation:
            operation = self.engine.dispatch(request, routing)
            self._check_room(operation.num_tokens)
            return operation

        operation = self._prepare(
            "dispatch", prepare, lambda: self.engine.refuse_dispatch(request, self.buffer_id)
        )
        event: Event | None = None
        if request.async_op:
            with self._own_stream(request.previous_event):
                output = operation.run()
                event = self._end_async(operation.inputs())
        else:
            self._order_on_current_stream(request.previous_event)
            output = operation.run()
        if output is None:
            return self._repeat_larger(request)
        self._num_dispatches += 1
        self._tokens_sent += operation.num_tokens
        if event is None:
            return output
        for tensor in operation.owned_outputs(output):
            self.runtime.keep_alive(tensor)
        return replace(output, event=event)

    def combine(self, request: CombineRequest) -> CombineOutput:
        """High-throughput combine."""
        self.runtime.push_range("deepcomm.combine")
        try:
            output = self._combine(request)
            self._raise_earlier()
        finally:
            self.runtime.pop_range()
        return output

    def _combine(self, request: CombineRequest) -> CombineOutput:
        operation = self._prepare(
            "combine",
            lambda: self.engine.combine(request, self.buffer_id),
            lambda: self.engine.refuse_combine(request, self.buffer_id),
        )
        self._num_combines += 1
        if not request.async_op:
            self._order_on_current_stream(request.previous_event)
            return operation.run()
        with self._own_stream(request.previous_event):
            output = operation.run()
            event = self._end_async(operation.inputs())
        for result in (output.x, output.topk_weights):
            if result is not None:
                self.runtime.keep_alive(result)
        return replace(output, event=event)

    def _order_on_current_stream(self, previous_event: Event | None = None) -> None:
        """Make the current stream wait for an event, and for operations on the own stream."""
        if previous_event is not None:
            self.runtime.wait_event(previous_event)
        if self._last_event is not None and (event := self._take_last_event()) is not None:
            self.runtime.wait_event(event)

    def _take_last_event(self) -> Event | None:
        """Return the end of what runs on the own stream, if the current stream can wait for it.

        Inside a graph that is only what was recorded into it, and outside nothing of that.
        """
        event, self._last_event = self._last_event, None
        if event is None or self._is_last_captured != self.runtime.is_capturing():
            return None
        return event

    def _keep_last_event(self, event: Event) -> None:
        self._last_event = event
        self.repeats = NO_REPEATS  # until a call has waited for it
        self._is_last_captured = self.runtime.is_capturing()

    def _order_on_own_stream(self, previous_event: Event | None) -> Event | None:
        """Return what the communication stream waits for; None: for the caller's stream so far.

        Operations on that stream have left no event: then its work is awaited beside the event.
        """
        if previous_event is not None and self._last_event is None:
            self.runtime.wait_event(previous_event)
            return None
        return previous_event

    @contextlib.contextmanager
    def _own_stream(self, previous_event: Event | None) -> Iterator[None]:
        """Work on the communication stream, after the operations before this one."""
        with self.runtime.on_stream(self._order_on_own_stream(previous_event)):
            try:
                yield
            except BaseException:  # what was launched is still to be waited for
                self._keep_last_event(self.runtime.record_event())
                raise

    def _end_async(self, inputs: list[torch.Tensor]) -> Event:
        """Keep what kernels use, and return the operation's end."""
        for tensor in inputs:
            self.runtime.keep_alive(tensor)
        # Kept here, it must not keep this buffer, whose streams would wait for the collector.
        event = self.runtime.record_event(self.failure.check_complete)
        self._keep_last_event(event)
        return event

    def _check_room(self, num_tokens: int) -> None:
        """Check that a buffer that must not grow need not."""
        most = self.config.max_tokens_per_rank
        if num_tokens > most and not self.config.growable:
            raise InvalidArgument(
                f"x: expected at most max_tokens_per_rank = {most} tokens, got {num_tokens}"
            )

    def _repeat_larger(self, request: DispatchRequest) -> DispatchOutput:
        """Grow the buffer, collectively, and repeat; views keep the old memory."""
        before = self.config.max_tokens_per_rank
        wanted = max(self.failure.must_grow, int(before * GROWTH))
        self.failure.clear_trouble()
        LOG.info("growing max_tokens_per_rank from %d to %d", before, wanted)
        self.engine.grow(wanted)
        self.config = replace(self.config, max_tokens_per_rank=wanted)
        previous, self._low_latency = self._low_latency, self._open_low_latency(self._low_latency)
        self.repeats = NO_REPEATS
        previous.close()
        return self._dispatch(request)

    def low_latency_dispatch(self, request: DispatchRequest) -> DispatchOutput:
        """Low-latency dispatch, both phases or the first."""
        return self._run_low_latency("low_latency_dispatch", request, self._low_latency.dispatch)

    def low_latency_combine(self, request: CombineRequest) -> CombineOutput:
        """Low-latency combine, both phases or the first."""
        return self._run_low_latency("low_latency_combine", request, self._low_latency.combine)

    def _run_low_latency(
        self, name: str, request: Request, run: Callable[[Request, Callable[[], None]], Output]
    ) -> Output:
        """Run an operation behind those before it; it is told what it still waits for."""
        self._check_open(name)
        self._low_latency.check_capture()
        previous_event: Event | None = None
        if request.async_op:
            previous_event = self._order_on_own_stream(request.previous_event)
        else:
            self._order_on_current_stream(request.previous_event)
        if previous_event is not request.previous_event:
            request = replace(request, previous_event=previous_event)
        self.runtime.push_range(f"deepcomm.{name}")
        try:
            output = run(request, self._order_on_current_stream)
        finally:
            self.runtime.pop_range()
        self.repeats = self._low_latency.repeats
        if output.event is not None:
            self._keep_last_event(output.event)
        return output

    # ---- the rest

    def set_rank_mask(self, rank: int, masked: bool) -> None:
        """Mark a peer dead or alive."""
        check_peer("rank", rank, self.topology.rank, self.topology.num_ranks)
        self._order_on_current_stream()
        self._low_latency.set_masked(rank, masked)

    def rank_mask(self) -> torch.Tensor:
        """Return bool [R]."""
        return torch.tensor(self._low_latency.rank_mask())

    def stats(self) -> BufferStats:
        """Return the counters; waits for the operations so far.

        Bytes, rows and waits are those of high-throughput operations; a network's bytes of both.
        """
        self.runtime.flush()
        node, rail = self.engine.traffic()
        counts = self._low_latency.counts
        return BufferStats(
            num_dispatches=self._num_dispatches + counts.num_dispatches,
            num_combines=self._num_combines + counts.num_combines,
            tokens_sent=self._tokens_sent + counts.tokens_sent,
            tokens_received=node.tokens_received,
            bytes_local=node.bytes_local + (rail.bytes_local if rail else 0),
            bytes_node=node.bytes_peers,
            bytes_network=self._low_latency.bytes_carried + (rail.bytes_peers if rail else 0),
            wait_us=waits_by_rank(self.topology, node, rail),
        )

    def explain(self) -> str:
        """Return what was chosen and why."""
        config, topology = self.config, self.topology
        sms = "as asked" if config.num_sms else f"{DEFAULT_NUM_SMS} fill the link, or what there is"
        growable = " (growable)" if config.growable else ""
        lines = [
            f"backend    cuda on {self.device}: kernels on symmetric memory",
            f"topology   rank {topology.rank} of {topology.num_ranks}, nodes of "
            f"{topology.ranks_per_node}: {topology.num_nodes}",
            *self._explain_rail(),
            f"sms        {self.num_sms} of {self.runtime.num_sms} an operation ({sms}); low "
            f"latency {self._low_latency.num_sms}; {self._sms.num_sharing} rank(s) on the device",
            f"ring       {config.num_generations} generations, {config.num_generations - 1} of "
            f"which can be leased to views, {self.engine.num_reserved} reserved for graphs",
            f"slots      {config.num_low_latency_slots} low-latency operations in flight",
            f"memory     {self.num_bytes / 2**20:.1f} MiB reserved for "
            f"{config.max_tokens_per_rank} tokens a rank{growable}",
            f"timeout    {config.timeout_s:g} s on the device; the host logs counts that are late "
            f"after {config.late_warning_s:g} s",
        ]
        return "\n".join(lines)

    def _explain_rail(self) -> list[str]:
        topology = self.topology
        if topology.num_nodes == 1:
            return ["rail       none: one NVLink domain"]
        return [
            f"rail       ranks {topology.rail_ranks}, once a node; then inside the node",
            f"           {self.engine.describe_rail()} ({self._why_rail})",
        ]

    def close(self) -> None:
        """Release everything; idempotent."""
        if not self._closed:
            self._closed = True
            self.repeats = NO_REPEATS
            self.engine.close()
            self._low_latency.close()
