# SPDX-License-Identifier: Apache-2.0
"""The low-latency operations of the CPU backend: send phase, and the hook's receive phase.

With several nodes the hook also takes what came over the rail and passes it on inside the node, so
it is collective over the node and called in the same order on its ranks.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch

from deepcomm._C import cpu
from deepcomm.backends.cpu_results import combine_output
from deepcomm.backends.cpu_tensors import (
    CpuRecord,
    DispatchTensors,
    dispatch_args,
    dispatch_output,
    fill_combine_args,
    make_handle,
    native_record,
)
from deepcomm.backends.rail_operation import RailOperation
from deepcomm.backends.relay import LL_ROWS, LL_WEIGHTS, Settled
from deepcomm.checks import check_combine, check_dispatch, check_length
from deepcomm.errors import CommError, ConfigMismatch, Error, InvalidArgument, describe_error
from deepcomm.types import CombineOutput, DispatchOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from deepcomm.backends.base import CombineRequest, DispatchRequest
    from deepcomm.backends.relay import Relay
    from deepcomm.checks import CheckedCombine, CheckedDispatch
    from deepcomm.config import BufferConfig
    from deepcomm.topology import Topology

__all__ = ["LowLatency"]

T = TypeVar("T")

DISPATCH, COMBINE = cpu.OpKind.LOW_LATENCY_DISPATCH, cpu.OpKind.LOW_LATENCY_COMBINE
NAMES = {DISPATCH: "low_latency_dispatch", COMBINE: "low_latency_combine"}
FIRST_PHASE = {DISPATCH: LL_ROWS, COMBINE: LL_WEIGHTS}


@dataclass(frozen=True, slots=True)
class Place:
    """Where the operations of one buffer take place."""

    endpoint: cpu.Endpoint
    relay: Relay
    topology: Topology
    buffer_id: bytes


def masks_late(request: DispatchRequest | CombineRequest) -> bool:
    """Return whether a peer that is late is masked, instead of an error."""
    return request.on_timeout == "mask"


class LowLatency:
    """Low-latency operations of one endpoint."""

    device = torch.device("cpu")

    def __init__(
        self,
        place: Place,
        config: BufferConfig,
        previous: LowLatency | None,
    ) -> None:
        """Open the slots; ``previous`` hands over its rank mask."""
        self._endpoint = place.endpoint
        self._relay = place.relay
        self._topology = place.topology
        self._buffer_id = place.buffer_id
        self._config = config
        self._num_local = config.num_experts // place.topology.num_ranks
        self.ring = cpu.SlotRing(place.endpoint)
        if previous is not None:
            self.ring.continue_from(previous.ring)

    def _refuse(self, kind: cpu.OpKind, error: Exception) -> None:
        """Tell every rank that this one refuses the operation, and drop what they send."""
        epoch, phase = self.ring.open(), FIRST_PHASE[kind]
        rail = RailOperation(self._relay, self.ring, NAMES[kind], epoch)
        for node in rail.nodes:
            rail.refuse(node, phase, error)
        self.ring.abort(self._endpoint, epoch, kind, describe_error(error))
        self.ring.close(epoch)
        for node in rail.nodes:
            rail.receive(node, phase)
        rail.finish()

    def _open(
        self,
        kind: cpu.OpKind,
        request: DispatchRequest | CombineRequest,
        prepare: Callable[[], T],
    ) -> T:
        """Check an operation and reserve what it needs; what fails here is refused on all ranks."""
        if request.previous_event is not None:
            request.previous_event.synchronize()
        self._endpoint.check_usable(kind)
        try:
            self.ring.check_free(kind)
            return prepare()
        except Exception as error:
            self._refuse_if_open(kind, error)
            raise

    def _rail_operation(
        self,
        kind: cpu.OpKind,
        request: DispatchRequest | CombineRequest,
        op: cpu.LowLatencyDispatchOp | cpu.LowLatencyCombineOp,
    ) -> RailOperation:
        return RailOperation(
            self._relay,
            self.ring,
            NAMES[kind],
            op.epoch,
            signature=op.signature,
            mask_late=masks_late(request),
        )

    def _hook(self, kind: cpu.OpKind, finish: Callable[[], None]) -> Callable[[], None]:
        """Return a hook that runs ``finish``, and refuses to run it again."""
        done = False

        def hook() -> None:
            nonlocal done
            if done:
                raise InvalidArgument(f"{NAMES[kind]}: expected one call of its hook, got a second")
            self._endpoint.check_usable(kind)
            done = True
            with self._settled(kind):
                finish()

        return hook

    def _settled(self, kind: cpu.OpKind) -> Settled:
        """Part of an operation that the peers count on."""
        return Settled(self._relay, NAMES[kind])

    def _waits_added_to(self, stats: torch.Tensor | None) -> AbstractContextManager[None]:
        """Add the microseconds that a phase waits for each rank to ``stats``, if it succeeds."""
        return contextlib.nullcontext() if stats is None else self._waits_measured(stats)

    @contextlib.contextmanager
    def _waits_measured(self, stats: torch.Tensor) -> Iterator[None]:
        before = torch.tensor(self._endpoint.counters.wait_us)
        yield
        stats.add_(torch.tensor(self._endpoint.counters.wait_us) - before)

    # ---- dispatch --------------------------------------------------------------------------------

    def dispatch(self, request: DispatchRequest) -> DispatchOutput:
        """Send; then receive, or leave that to the hook."""
        checked, tensors, op = self._open(
            DISPATCH, request, lambda: self._prepare_dispatch(request)
        )
        with self._settled(DISPATCH):
            with self._waits_added_to(request.wait_us_stats):
                op.send(self._endpoint)
            rail = self._rail_operation(DISPATCH, request, op)
            for node in rail.nodes:
                num_rows = op.num_rows_to(node)
                data = torch.empty(num_rows * op.record_bytes, dtype=torch.uint8)
                op.pack(node, data.data_ptr())
                rail.send(node, LL_ROWS, data, num_rows)
            output = self._dispatch_output(request, checked, tensors, op)

            def finish() -> None:
                with self._waits_added_to(request.wait_us_stats):
                    self._receive_dispatch(request, checked, tensors, op, rail)

            if request.return_hook:
                return replace(output, hook=self._hook(DISPATCH, finish))
            finish()
            return output

    def _refuse_if_open(self, kind: cpu.OpKind, error: Exception) -> None:
        """Refuse an operation on all ranks, unless there is no free slot here to do so."""
        if self._endpoint.failed:
            return
        try:
            self.ring.check_free(kind)
        except Error:
            return
        self._refuse(kind, error)

    def _prepare_dispatch(
        self, request: DispatchRequest
    ) -> tuple[CheckedDispatch, DispatchTensors, cpu.LowLatencyDispatchOp]:
        checked = check_dispatch(request, self._config, self.device)
        check_length("expert_token_stats", request.expert_token_stats, self._num_local)
        check_length("wait_us_stats", request.wait_us_stats, self._topology.num_ranks)
        args = dispatch_args(checked, self._config.hidden)
        op = cpu.LowLatencyDispatchOp(self._endpoint, self.ring, args, masks_late(request))
        tensors = DispatchTensors.of_low_latency(op, request, checked, self._endpoint)
        return checked, tensors, op

    def _dispatch_output(
        self,
        request: DispatchRequest,
        checked: CheckedDispatch,
        tensors: DispatchTensors,
        op: cpu.LowLatencyDispatchOp,
    ) -> DispatchOutput:
        num_rows = tensors.x.numel() // self._config.hidden
        record = CpuRecord(op.record, checked.id_dtype, self._buffer_id)
        handle = make_handle(request, checked, tensors, num_rows, record)
        return dispatch_output(tensors, handle, request)

    def _receive_dispatch(
        self,
        request: DispatchRequest,
        checked: CheckedDispatch,
        tensors: DispatchTensors,
        op: cpu.LowLatencyDispatchOp,
        rail: RailOperation,
    ) -> None:
        problem: Error | None = None
        passed_on = set()
        for node in rail.nodes:
            source = self._relay.peer(node)
            header, data = rail.receive(node, LL_ROWS)
            found = rail.problem(node, header)
            problem = problem or found
            if not self.ring.is_masked(source):
                passed_on.add(source)
            if header.refusal:
                op.forward_abort(self._endpoint, source, header.refused_by, header.refusal)
            elif found is not None:
                op.forward_mismatch(self._endpoint, source, header.signature)
            elif not self.ring.is_masked(source):
                address = 0 if data is None else data.data_ptr()
                op.forward(self._endpoint, source, header.num_rows, address)
        rail.finish()
        for source in map(self._relay.peer, self._relay.other_nodes):
            if source not in passed_on:
                op.forward_absence(self._endpoint, source)
        try:
            op.receive(self._endpoint)
        except CommError as error:
            raise problem or error from None
        op.deliver_to(self._endpoint, tensors.target(request.zero_padding))
        if request.expert_token_stats is not None:
            request.expert_token_stats.add_(tensors.rest.counts)
        del checked  # kept its tensors alive for the native code

    # ---- combine ---------------------------------------------------------------------------------

    def combine(self, request: CombineRequest) -> CombineOutput:
        """Send; then receive and sum, or leave that to the hook."""
        checked, output, op = self._open(COMBINE, request, lambda: self._prepare_combine(request))
        with self._settled(COMBINE):
            op.open(self._endpoint)
            rail = self._rail_operation(COMBINE, request, op)
            with self._waits_added_to(request.wait_us_stats):
                problem = self._send_combine(request, checked, op, rail)

            keep_alive = [output]  # the native code holds its addresses until the hook is done

            def finish() -> None:
                with self._waits_added_to(request.wait_us_stats):
                    self._receive_combine(checked, op, rail, problem)
                    del keep_alive[:]

            if request.return_hook:
                return replace(output, hook=self._hook(COMBINE, finish))
            finish()
            return output

    def _prepare_combine(
        self, request: CombineRequest
    ) -> tuple[CheckedCombine, CombineOutput, cpu.LowLatencyCombineOp]:
        checked = check_combine(request, self._config, self._num_local, self.device)
        check_length("wait_us_stats", request.wait_us_stats, self._topology.num_ranks)
        native_record(request.handle, self._buffer_id)
        output = combine_output(self._endpoint, request, checked)
        args = cpu.LowLatencyCombineArgs()
        fill_combine_args(args.combine, request, checked, output)
        if checked.source_weights is not None:
            args.source_weights = checked.source_weights.data_ptr() or 1
        args.mask_late = masks_late(request)
        return checked, output, cpu.LowLatencyCombineOp(self._endpoint, self.ring, args)

    def _send_combine(
        self,
        request: CombineRequest,
        checked: CheckedCombine,
        op: cpu.LowLatencyCombineOp,
        rail: RailOperation,
    ) -> Error | None:
        """Send weights given here, then rows; return what a rail peer did wrong."""
        num_topk = int(request.handle.topk_idx.shape[1])
        given = checked.source_weights is not None
        for node in rail.nodes:
            num_rows = op.num_weights_to(node) if given else 0
            data = torch.empty(num_rows * num_topk * 4, dtype=torch.uint8)
            if num_rows:
                op.pack_weights(node, data.data_ptr())
            rail.send(node, LL_WEIGHTS, data, num_rows)
        problem = self._take_weights(op, rail, given) if given else None
        try:
            op.wait_weights(self._endpoint)
        except (CommError, ConfigMismatch) as error:
            if self._endpoint.failed:
                raise
            problem = problem or error  # the hook raises it: the peers need this rank till then
        op.send(self._endpoint)
        return problem

    def _take_weights(
        self, op: cpu.LowLatencyCombineOp, rail: RailOperation, given: bool
    ) -> Error | None:
        """Receive the rail peers' weights and pass them on; return what a peer did wrong.

        Where none are given, the peers' word that they have none either, and the hook takes it.
        """
        problem: Error | None = None
        for node in tuple(rail.nodes):
            header, data = rail.receive(node, LL_WEIGHTS)
            found = rail.problem(node, header)
            problem = problem or found
            if header.refusal:  # nothing else comes from there
                rail.nodes.remove(node)
            if given:
                address = 0 if data is None or found is not None else data.data_ptr()
                op.forward_weights(self._endpoint, self._relay.peer(node), address)
        return problem

    def _receive_combine(
        self,
        checked: CheckedCombine,
        op: cpu.LowLatencyCombineOp,
        rail: RailOperation,
        problem: Error | None,
    ) -> None:
        if checked.source_weights is None:
            problem = self._take_weights(op, rail, False)
        for node in rail.nodes:
            source = self._relay.peer(node)
            num_rows = op.num_rows_to(source)
            data = torch.empty(num_rows * op.record_bytes, dtype=torch.uint8)
            try:
                op.pack(self._endpoint, source, data.data_ptr())
            except (CommError, ConfigMismatch) as error:
                if self._endpoint.failed:
                    raise
                problem = problem or error
                rail.refuse(node, LL_ROWS, error)
                continue
            rail.send(node, LL_ROWS, data, num_rows)
        partials = [0] * self._topology.num_nodes
        received: list[torch.Tensor] = []  # alive until the sums are done
        for node in rail.nodes:
            # The peer may have waited for a rail peer, then for a rank of its node.
            header, rows = rail.receive(node, LL_ROWS, patience=3)
            found = rail.problem(node, header)
            problem = problem or found
            if rows is not None and found is None:
                received.append(rows)
                partials[node] = rows.data_ptr()
        rail.finish()
        op.finish(self._endpoint, partials)
        if problem is not None:
            raise problem
        del checked  # kept its tensors alive for the native code
