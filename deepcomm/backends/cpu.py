# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: construction, growth, and the high-throughput operations.

Steps of an operation are native (``csrc/cpu``); what crosses nodes goes through ``relay``. An
argument error is announced like any other opening, so that the peers learn of it and nobody is left
waiting.
"""

from __future__ import annotations

import ctypes
import logging
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from deepcomm._C import cpu
from deepcomm.backends.base import NO_REPEATS
from deepcomm.backends.cpu_explain import Choices, explain
from deepcomm.backends.cpu_low_latency import LowLatency, Place
from deepcomm.backends.cpu_results import combine_output
from deepcomm.backends.cpu_tensors import (
    CpuRecord,
    DispatchTensors,
    combine_args,
    dispatch_args,
    dispatch_output,
    make_handle,
    native_record,
)
from deepcomm.backends.rail import GlooRail, RailPolicy
from deepcomm.backends.relay import Leg, Relay
from deepcomm.checks import check_combine, check_dispatch, check_peer, check_taken_back
from deepcomm.errors import InvalidArgument, describe_error
from deepcomm.group import Group, agree, as_group, check_equal
from deepcomm.sizing import native_config
from deepcomm.topology import Topology, discover
from deepcomm.types import BufferStats, CombineOutput, DispatchOutput

if TYPE_CHECKING:
    from collections.abc import Callable

    from deepcomm.backends.base import CombineRequest, DispatchRequest
    from deepcomm.checks import CheckedCombine, CheckedDispatch
    from deepcomm.config import BufferConfig

__all__ = ["CpuBackend"]

S = TypeVar("S")
T = TypeVar("T")

LOG = logging.getLogger("deepcomm")
PROTOCOL_VERSION = 1
GROWTH = 1.5


def late_after_s(config: BufferConfig) -> float:
    """Return when a late peer is logged: in any case before it is fatal."""
    return min(config.late_warning_s, config.timeout_s / 2)


class CpuBackend:
    """One rank's buffer in shared memory, with gloo rails between nodes."""

    device = torch.device("cpu")
    repeats = NO_REPEATS

    def __init__(self, group: Any, config: BufferConfig) -> None:
        """Meet the peers, find the nodes, reserve memory; collective."""
        self._group: Group = as_group(group)
        agree(self._group, "Buffer", lambda: self._check_config(config))
        entry = {"protocol": PROTOCOL_VERSION, **config.shared_fields()}
        check_equal("Buffer", self._group.all_gather(entry))
        self.topology: Topology = discover(self._group, config.ranks_per_node)
        self.config = replace(config, ranks_per_node=self.topology.ranks_per_node)
        self._num_local_experts = config.num_experts // self.topology.num_ranks
        self._num_cores = len(os.sched_getaffinity(0))
        self._num_threads = config.num_threads or max(
            1, self._num_cores // self.topology.ranks_per_node
        )
        self._buffer_id = self._group.all_gather(os.urandom(8))[0]
        self._endpoint = self._open_endpoint(self.config)
        self._rail = self._open_rail()
        self._adopt_endpoint(None)
        self._closed = False

    def _check_config(self, config: BufferConfig) -> None:
        config.check(self._group.size)
        if config.rail not in ("auto", "gloo"):
            raise InvalidArgument(f"rail: expected 'auto' or 'gloo' on CPUs, got {config.rail!r}")
        if config.traffic_class is not None:
            raise InvalidArgument(
                f"traffic_class: expected None on CPUs (gloo has none), got {config.traffic_class}"
            )

    def _open_endpoint(self, config: BufferConfig) -> cpu.Endpoint:
        """Create this rank's segment and map those of its node."""
        topology = self.topology
        native = native_config(
            config,
            rank=topology.rank,
            num_ranks=topology.num_ranks,
            num_threads=self._num_threads,
        )
        may_spin = topology.ranks_per_node * self._num_threads <= self._num_cores
        created: list[cpu.Endpoint] = []

        def create() -> tuple[str, str, int]:
            created.append(
                cpu.Endpoint(native, config.timeout_s, late_after_s(config), may_spin, LOG.warning)
            )
            return created[0].segment_name, str(Path("/proc/self/ns/pid").readlink()), os.getpid()

        try:
            entries = agree(self._group, "Buffer", create)
            own_namespace = entries[topology.rank][1]
            local = [entries[rank] for rank in topology.node_ranks]
            names = [name for name, _, _ in local]
            pids = [pid if namespace == own_namespace else 0 for _, namespace, pid in local]
            agree(self._group, "Buffer", lambda: created[0].connect(names, pids))
        except BaseException:
            cpu.remove_stale_segments()  # of a peer that was killed
            raise
        finally:  # the name is needed no longer, even where the group itself fails
            for endpoint in created:
                endpoint.unlink()
        return created[0]

    def _open_rail(self) -> GlooRail | None:
        if self.topology.num_nodes == 1:
            return None
        policy = RailPolicy(self.config.timeout_s, late_after_s(self.config))
        name = self._group.all_gather(f"deepcomm/{os.urandom(8).hex()}")[0]
        rails: list[GlooRail] = []
        agree(
            self._group,
            "Buffer",
            lambda: rails.append(GlooRail(self._group, self.topology, policy, name)),
        )
        return rails[0]

    def _adopt_endpoint(self, previous: LowLatency | None) -> None:
        self._relay = Relay(self._rail, self.topology, self._endpoint)
        self._low_latency = LowLatency(
            Place(self._endpoint, self._relay, self.topology, self._buffer_id),
            self.config,
            previous,
        )

    def _grow(self, num_tokens: int) -> None:
        """Re-allocate for a rank that brings more tokens; collective. Views keep the old memory."""
        wanted = max(num_tokens, int(self.config.max_tokens_per_rank * GROWTH))
        LOG.info(
            "growing max_tokens_per_rank from %d to %d", self.config.max_tokens_per_rank, wanted
        )
        config = replace(self.config, max_tokens_per_rank=wanted)
        endpoint = self._open_endpoint(config)  # where this fails, the old one stays in use
        endpoint.continue_from(self._endpoint)
        self.config, self._endpoint = config, endpoint
        self._adopt_endpoint(self._low_latency)

    @property
    def num_bytes(self) -> int:
        """Bytes of shared memory reserved by this rank."""
        return self._endpoint.reserved_bytes

    # ---- operations ------------------------------------------------------------------------------

    def _prepare(self, kind: cpu.OpKind, prepare: Callable[[], T]) -> T:
        """Check and open an operation on this rank; an error is announced to the peers first."""
        self._endpoint.check_usable(kind)
        try:
            return prepare()
        except Exception as error:
            if not self._endpoint.failed and not self._endpoint.epoch_open:
                round_ = cpu.Round.refuse(self._endpoint, kind, describe_error(error))
                self._relay.exchange_announcements(round_, kind.name.lower())
                self._endpoint.finish_epoch(round_.epoch)
            raise

    def _run(self, kind: cpu.OpKind, operation: Callable[[S], T], request: S) -> T:
        try:
            return operation(request)
        except BaseException as error:
            self._relay.settle(error, kind.name.lower(), unfinished=self._endpoint.epoch_open)
            raise

    def dispatch(self, request: DispatchRequest) -> DispatchOutput:
        """High-throughput dispatch."""
        return self._run(cpu.OpKind.DISPATCH, self._dispatch, request)

    def _dispatch(self, request: DispatchRequest) -> DispatchOutput:
        if request.previous_event is not None:
            request.previous_event.synchronize()
        checked, op = self._prepare(cpu.OpKind.DISPATCH, lambda: self._announce_dispatch(request))
        num_tokens = op.round.wait_all(self._endpoint)
        if num_tokens > self.config.max_tokens_per_rank:
            self._endpoint.finish_epoch(op.round.epoch)
            self._grow(num_tokens)
            return self._dispatch(request)
        op.push(self._endpoint)
        if self._rail is not None:
            self._relay_dispatch(op)
        op.receive(self._endpoint)
        try:
            tensors = DispatchTensors.of_dispatch(op, request, checked, self._endpoint)
        except Exception:  # no memory, say; the peers are done with this rank
            op.finish(None)
            raise
        record = op.finish(tensors.target(request.zero_padding))
        tensors.check_out()
        native = CpuRecord(record, checked.id_dtype, self._buffer_id)
        handle = make_handle(request, checked, tensors, op.received.out_rows, native)
        return dispatch_output(tensors, handle, request)

    def _announce_dispatch(
        self, request: DispatchRequest
    ) -> tuple[CheckedDispatch, cpu.DispatchOp]:
        checked = check_dispatch(request, self.config, self.device)
        args = dispatch_args(checked, self.config.hidden)
        args.growable = self.config.growable
        if request.handle is not None:
            args.cached = native_record(request.handle, self._buffer_id)
        op = cpu.DispatchOp(self._endpoint, args)
        op.announce(self._endpoint)
        self._relay.exchange_announcements(op.round, "dispatch")
        return checked, op

    def _relay_records(
        self,
        op: cpu.DispatchOp | cpu.CombineOp,
        name: str,
        packed_for: Callable[[int], int],
        take: Callable[[int], Leg],
    ) -> None:
        """Exchange records with the rail peer on each node: ``op.pack`` knows it as packed_for."""
        nodes = self._relay.other_nodes
        packers = [
            Leg(node, op.num_rows_to(packed_for(node)), partial(op.pack, packed_for(node)))
            for node in nodes
        ]
        takers = [take(node) for node in nodes]
        self._relay.exchange_records(packers, takers, op.record_bytes, op.round.epoch, name)

    def _relay_dispatch(self, op: cpu.DispatchOp) -> None:
        def forwarder(node: int) -> Leg:
            source = self._relay.peer(node)
            return Leg(
                node,
                op.num_rows_from(source),
                lambda begin, end, address: op.forward(source, end - begin, address),
            )

        self._relay_records(op, "dispatch", lambda node: node, forwarder)
        for node in self._relay.other_nodes:
            op.publish(self._relay.peer(node))

    def combine(self, request: CombineRequest) -> CombineOutput:
        """High-throughput combine."""
        return self._run(cpu.OpKind.COMBINE, self._combine, request)

    def _combine(self, request: CombineRequest) -> CombineOutput:
        if request.previous_event is not None:
            request.previous_event.synchronize()
        checked, output, op = self._prepare(
            cpu.OpKind.COMBINE, lambda: self._announce_combine(request)
        )
        op.round.wait_all(self._endpoint)
        partials = self._relay_combine(op) if self._rail is not None else [None]
        addresses = [0 if data is None else data.data_ptr() for data in partials]
        op.finish(self._endpoint, addresses)
        del checked  # kept its tensors alive for the native code
        return output

    def _announce_combine(
        self, request: CombineRequest
    ) -> tuple[CheckedCombine, CombineOutput, cpu.CombineOp]:
        checked = check_combine(request, self.config, self._num_local_experts, self.device)
        native_record(request.handle, self._buffer_id)
        output = combine_output(self._endpoint, request, checked)
        op = cpu.CombineOp(self._endpoint, combine_args(request, checked, output))
        op.stage(self._endpoint)
        self._relay.exchange_announcements(op.round, "combine")
        return checked, output, op

    def _relay_combine(self, op: cpu.CombineOp) -> list[torch.Tensor | None]:
        """Exchange the nodes' partial sums; returns those for this rank's tokens, by node."""
        partials: list[torch.Tensor | None] = [None] * self.topology.num_nodes

        def collector(node: int) -> Leg:
            num_rows = op.num_rows_from(node)
            data = torch.empty(num_rows * op.record_bytes, dtype=torch.uint8)
            partials[node] = data

            def collect(begin: int, end: int, address: int) -> None:
                size = (end - begin) * op.record_bytes
                ctypes.memmove(data.data_ptr() + begin * op.record_bytes, address, size)

            return Leg(node, num_rows, collect)

        self._relay_records(op, "combine", self._relay.peer, collector)
        return partials

    def low_latency_dispatch(self, request: DispatchRequest) -> DispatchOutput:
        """Low-latency dispatch, both phases or the first."""
        return self._run(cpu.OpKind.LOW_LATENCY_DISPATCH, self._low_latency.dispatch, request)

    def low_latency_combine(self, request: CombineRequest) -> CombineOutput:
        """Low-latency combine, both phases or the first."""
        return self._run(cpu.OpKind.LOW_LATENCY_COMBINE, self._low_latency.combine, request)

    # ---- the rest --------------------------------------------------------------------------------

    def set_rank_mask(self, rank: int, masked: bool) -> None:
        """Mark a peer dead or alive."""
        check_peer("rank", rank, self.topology.rank, self.topology.num_ranks)
        ring = self._low_latency.ring
        if ring.is_masked(rank) and not masked:
            check_taken_back(rank, ring.num_in_flight)
        ring.set_masked(rank, masked)

    def rank_mask(self) -> torch.Tensor:
        """Return bool [R]."""
        ring = self._low_latency.ring
        return torch.tensor([ring.is_masked(rank) for rank in range(self.topology.num_ranks)])

    def stats(self) -> BufferStats:
        """Return the counters."""
        counters = self._endpoint.counters
        return BufferStats(
            num_dispatches=counters.num_dispatches,
            num_combines=counters.num_combines,
            tokens_sent=counters.tokens_sent,
            tokens_received=counters.tokens_received,
            bytes_local=counters.bytes_local,
            bytes_node=counters.bytes_node,
            bytes_network=counters.bytes_network,
            wait_us=tuple(counters.wait_us),
        )

    def explain(self) -> str:
        """Return what was chosen and why."""
        return explain(
            Choices(
                config=self.config,
                topology=self.topology,
                rail=self._rail,
                isa=self._endpoint.isa,
                num_threads=self._num_threads,
                num_cores=self._num_cores,
                num_bytes=self.num_bytes,
                max_idle_result_bytes=self._endpoint.max_idle_result_bytes,
            )
        )

    def close(self) -> None:
        """Release everything; idempotent."""
        if not self._closed:
            self._closed = True
            self._endpoint.close()
            self._relay.close()
