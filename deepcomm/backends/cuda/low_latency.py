# SPDX-License-Identifier: Apache-2.0
"""The low-latency operations on GPUs: launches of csrc/kernels/low_latency.

The host knows neither counts nor, until later, whether a peer has refused: kernels count the
operations, and what they find wrong is raised by the next call, hook or ``event.synchronize``.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from deepcomm._C import kernels
from deepcomm.backends.cuda.low_latency_slots import BOTH, RECEIVE, SEND, Place, Slots
from deepcomm.backends.cuda.low_latency_status import COMBINE, DISPATCH, pack_signature
from deepcomm.backends.cuda.low_latency_tensors import (
    DispatchTensors,
    Record,
    Sizes,
    address_of,
    aligned,
    row_kind,
    wire_of,
)
from deepcomm.checks import check_combine, check_dispatch, check_length
from deepcomm.errors import Error, InvalidArgument, describe_error
from deepcomm.types import CombineOutput, DispatchOutput, Handle, RecvLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from deepcomm.backends.base import CombineRequest, DispatchRequest
    from deepcomm.backends.cuda.runtime import Function
    from deepcomm.checks import CheckedCombine, CheckedDispatch
    from deepcomm.config import BufferConfig
    from deepcomm.types import Event

__all__ = ["LowLatency", "Place"]


class LowLatency:
    """Low-latency operations of one buffer on one rank.

    Attributes:
        num_dispatches: Calls so far; replays of a graph are not seen.
        num_combines: Likewise.
        tokens_sent: Tokens given to these dispatches.
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
        self._num_local = config.num_experts // self._num_ranks
        self._sizes = Sizes(
            self._num_local,
            self._num_ranks * config.max_tokens_per_rank,
            config.hidden,
            place.runtime.device,
        )
        self._slots: Slots | None = None
        self._mask = place.runtime.memory(4 * self._num_ranks)
        self._late_memory = place.runtime.host_memory(4 * self._num_ranks)
        self._late = (ctypes.c_uint32 * self._num_ranks).from_address(self._late_memory.address)
        self._masked = [False] * self._num_ranks
        self._no_overflow = torch.zeros((), dtype=torch.bool, device=place.runtime.device)
        self.num_dispatches = self.num_combines = self.tokens_sent = 0
        for rank, masked in enumerate(previous.rank_mask() if previous else ()):
            if masked:
                self.set_masked(rank, True)

    @property
    def num_bytes(self) -> int:
        """Bytes of symmetric memory reserved on this rank."""
        return 0 if self._slots is None else self._slots.memory.num_bytes

    def close(self) -> None:
        """Give the symmetric memory back; idempotent."""
        if self._slots is not None:
            self._slots.close()

    def check(self) -> None:
        """Raise what kernels have found to be wrong, unless it was raised before."""
        self._place.failure.check_usable(DISPATCH)
        if self._slots is not None:
            self._slots.status.raise_pending()

    # ---- rank mask

    def set_masked(self, rank: int, masked: bool) -> None:
        """Mark a peer dead or alive, after the operations launched so far on this stream."""
        params = kernels.LowLatencyMaskParams()
        params.rank_mask = self._mask.address
        params.peer = rank
        params.value = int(masked)
        runtime = self._place.runtime
        runtime.launch(runtime.load("low_latency_mask", {}), 1, params)
        self._masked[rank] = masked
        self._late[rank] = 0

    def rank_mask(self) -> list[bool]:
        """Return who is masked, by hand or because it was late."""
        return [mine or late != 0 for mine, late in zip(self._masked, self._late, strict=True)]

    # ---- what both operations share

    def _open_slots(self, operation: str) -> Slots:
        """Return the slots; reserves them at the first operation, which is collective."""
        self._place.failure.check_usable(operation)
        if self._config.num_low_latency_slots == 0:
            raise InvalidArgument(
                f"{operation}: the buffer was created with num_low_latency_slots = 0"
            )
        if self._slots is None:
            if self._place.runtime.is_capturing():
                raise InvalidArgument(
                    f"{operation}: expected a first call before the graph's capture, to reserve "
                    "memory"
                )
            self._slots = Slots(self._place, self._config)
        self._slots.status.raise_pending()
        return self._slots

    def _refuse_if_open(self, slots: Slots, operation: str, request: Any, error: Exception) -> None:
        """Tell every rank that this one refuses, unless there is no free slot to do so in."""
        if self._place.failure.failed or self._place.runtime.is_capturing():
            return
        try:
            slots.check_free(operation)
        except Error:
            return
        params = slots.fill(kernels.LowLatencyRefuseParams(), self._mask, self._late_address)
        params.is_combine = operation == COMBINE
        params.set_message(describe_error(error))
        if operation == COMBINE and isinstance(request.handle, Handle):
            record = request.handle.records
            if isinstance(record, Record) and record.is_complete:
                params.base.record = record.words.data_ptr()
                params.base.record_map = record.map
        runtime = self._place.runtime
        runtime.launch(runtime.load("low_latency_refuse", {}), 1, params)
        slots.open()

    @property
    def _late_address(self) -> int:
        return self._late_memory.device_address

    @contextmanager
    def _stream_of(
        self, request: DispatchRequest | CombineRequest, tensors: Sequence[torch.Tensor | None]
    ) -> Iterator[None]:
        """Make current the stream that an operation runs on; ``tensors`` live until it is done."""
        runtime = self._place.runtime
        if not request.async_op:
            if request.previous_event is not None:
                runtime.wait_event(request.previous_event)
            yield
            return
        with runtime.on_stream(request.previous_event):
            yield
            for tensor in tensors:
                if tensor is not None:
                    runtime.keep_alive(tensor)

    def _event(self, request: DispatchRequest | CombineRequest) -> Event | None:
        """Return the completion of what the current stream does, if that is asked for."""
        return self._place.runtime.record_event(self.check) if request.async_op else None

    def _make_hook(
        self, slots: Slots, operation: str, receive: Callable[[], None], sent: Event | None
    ) -> Callable[[], None]:
        """Return a hook that launches the receive phase, once."""
        number = slots.open()
        slots.leave_in_flight(number)
        done = False

        def hook() -> None:
            nonlocal done
            if done:
                raise InvalidArgument(f"{operation}: expected one call of its hook, got a second")
            self._place.failure.check_usable(operation)
            done = True
            slots.settle(number)
            if sent is not None:
                self._place.runtime.wait_event(sent)
            receive()
            slots.status.raise_pending()

        return hook

    # ---- dispatch

    def dispatch(self, request: DispatchRequest) -> DispatchOutput:
        """Send and receive in one launch; or send, and leave the rest to the hook."""
        slots = self._open_slots(DISPATCH)
        try:
            slots.check_free(DISPATCH)
            checked = self._check_dispatch(request)
            tensors = DispatchTensors.allocate(request, checked, self._sizes)
            record = self._make_record(checked)
            kind = row_kind(checked)
            kinds = {SEND: kind, RECEIVE: wire_of(kind), BOTH: kind}
            functions = {
                phase: slots.function(DISPATCH, phase, rows) for phase, rows in kinds.items()
            }
        except Exception as error:
            self._refuse_if_open(slots, DISPATCH, request, error)
            raise
        params = self._dispatch_params(slots, request, checked, tensors, record)
        return self._launch_dispatch(slots, request, checked, (tensors, record), functions, params)

    def _check_dispatch(self, request: DispatchRequest) -> CheckedDispatch:
        checked = check_dispatch(request, self._config, self._sizes.device)
        if checked.scale_format == "none" and checked.rows.dtype != torch.bfloat16:
            raise InvalidArgument(
                f"x: expected bfloat16 [T, {self._config.hidden}] or a ScaledTensor, "
                f"got {str(checked.rows.dtype).removeprefix('torch.')}"
            )
        if checked.num_tokens > self._config.max_tokens_per_rank:
            raise InvalidArgument(
                f"x: expected at most max_tokens_per_rank = {self._config.max_tokens_per_rank} "
                f"tokens, got {checked.num_tokens}"
            )
        check_length("expert_token_stats", request.expert_token_stats, self._num_local)
        check_length("wait_us_stats", request.wait_us_stats, self._num_ranks)
        return checked

    def _make_record(self, checked: CheckedDispatch) -> Record:
        record_map = kernels.LowLatencyRecordLayout.make(
            self._num_ranks, self._config.max_tokens_per_rank, checked.num_topk
        )
        words = torch.empty(record_map.num_words, dtype=torch.int32, device=self._sizes.device)
        return Record(self._place.buffer_id, words, record_map)

    def _dispatch_params(
        self,
        slots: Slots,
        request: DispatchRequest,
        checked: CheckedDispatch,
        tensors: DispatchTensors,
        record: Record,
    ) -> kernels.LowLatencyDispatchParams:
        """Return the kernel's arguments; ``x`` and ``scales`` are filled in by the launch."""
        params = slots.fill(kernels.LowLatencyDispatchParams(), self._mask, self._late_address)
        base = params.base
        is_token = checked.recv_layout is RecvLayout.TOKEN
        base.signature = pack_signature(
            recv_layout=int(is_token),
            rows=wire_of(row_kind(checked)),
            topk_weights=int(checked.topk_weights is not None),
            K=checked.num_topk,
        )
        base.num_topk = checked.num_topk
        base.num_tokens = checked.num_tokens
        base.mask_late = int(request.on_timeout == "mask")
        base.wait_us = address_of(request.wait_us_stats)
        base.record = record.words.data_ptr()
        base.record_map = record.map
        base.turn = record.words.data_ptr() + 4 * record.map.turn
        params.num_experts = self._config.num_experts
        params.topk_idx = address_of(checked.topk_idx)
        params.topk_idx_is_int64 = int(checked.id_dtype == torch.int64)
        params.topk_weights = address_of(checked.topk_weights)
        params.is_token_layout = int(is_token)
        if request.expert_token_stats is not None:
            params.expert_token_stats = address_of(request.expert_token_stats)
            params.stats_is_int64 = int(request.expert_token_stats.dtype == torch.int64)
        tensors.fill(params)
        return params

    def _launch_dispatch(
        self,
        slots: Slots,
        request: DispatchRequest,
        checked: CheckedDispatch,
        made: tuple[DispatchTensors, Record],
        functions: dict[int, Function],
        params: kernels.LowLatencyDispatchParams,
    ) -> DispatchOutput:
        tensors, record = made
        runtime, num_tokens = self._place.runtime, checked.num_tokens
        rows = aligned(checked.rows)
        params.x = address_of(rows)
        params.x_stride = rows.stride(0) * rows.element_size()
        if checked.scales is not None:
            params.scales = address_of(checked.scales)
            params.scale_stride = checked.scales.stride(0)
        self.num_dispatches += 1
        self.tokens_sent += num_tokens
        num_rows = self._sizes.block_rows
        hook: Callable[[], None] | None = None
        used = (rows, checked.scales, checked.topk_idx, checked.topk_weights, record.words)
        made_here = (
            tensors.x,
            tensors.scales,
            tensors.topk_idx,
            tensors.topk_weights,
            tensors.ints,
        )
        with self._stream_of(request, (*used, *made_here, tensors.topk_idx_copy)):
            if request.return_hook:
                send = functions[SEND]
                runtime.launch(send, slots.grid(send, num_tokens + 1), params)
            else:
                both = functions[BOTH]
                wanted = max(num_tokens + 1, num_rows)
                runtime.launch(both, slots.grid(both, wanted), params)
                slots.open()
                record.is_complete = True
            runtime.flush()
            event = self._event(request)
        if request.return_hook:
            receive = functions[RECEIVE]

            def finish() -> None:
                held = keep_alive.pop()
                runtime.launch(receive, slots.grid(receive, num_rows), params)
                runtime.flush()
                record.is_complete = True
                del held

            keep_alive = [(tensors, request)]  # their addresses are in params
            hook = self._make_hook(slots, DISPATCH, finish, event)
        return self._dispatch_output(checked, tensors, record, event, hook)

    def _dispatch_output(
        self,
        checked: CheckedDispatch,
        tensors: DispatchTensors,
        record: Record,
        event: Event | None,
        hook: Callable[[], None] | None,
    ) -> DispatchOutput:
        is_token = checked.recv_layout is RecvLayout.TOKEN
        num_rows = self._sizes.block_rows * (1 if is_token else self._num_local)
        return DispatchOutput(
            x=tensors.x,
            scales=tensors.scales,
            topk_idx=tensors.topk_idx,
            topk_weights=tensors.topk_weights,
            num_tokens_per_expert=tensors.ints[:-1],
            expert_offsets=None,
            num_recv_tokens=tensors.ints[-1],
            overflow=self._no_overflow,
            handle=Handle(
                recv_layout=checked.recv_layout,
                expert_alignment=1,
                capacity=None,
                num_tokens=checked.num_tokens,
                num_rows=num_rows,
                topk_idx=tensors.topk_idx_copy,
                topk_weights=tensors.topk_weights_copy,
                low_latency=True,
                records=record,
            ),
            event=event,
            hook=hook,
        )

    # ---- combine

    def combine(self, request: CombineRequest) -> CombineOutput:
        """Send and receive in one launch; or send, and leave the rest to the hook."""
        slots = self._open_slots(COMBINE)
        try:
            slots.check_free(COMBINE)
            checked = self._check_combine(request)
            record = Record.of(request.handle, self._place.buffer_id)
            functions = {phase: slots.function(COMBINE, phase) for phase in (SEND, RECEIVE, BOTH)}
            params = slots.fill(kernels.LowLatencyCombineParams(), self._mask, self._late_address)
            turn = torch.empty(4, dtype=torch.int32, device=self._sizes.device)
            params.base.turn = turn.data_ptr()
            output = self._combine_output(request, checked, record, params)
        except Exception as error:
            self._refuse_if_open(slots, COMBINE, request, error)
            raise
        return self._launch_combine(
            slots, request, (checked, record, turn), functions, (params, output)
        )

    def _check_combine(self, request: CombineRequest) -> CheckedCombine:
        checked = check_combine(request, self._config, self._num_local, self._sizes.device)
        check_length("wait_us_stats", request.wait_us_stats, self._num_ranks)
        if checked.rows.dtype != torch.bfloat16:
            dtype = str(checked.rows.dtype).removeprefix("torch.")
            raise InvalidArgument(f"y: expected bfloat16, got {dtype}")
        if request.out is not None and request.out.data_ptr() % 4:
            raise InvalidArgument("out: expected it to begin at a multiple of 4 bytes")
        return checked

    def _combine_output(
        self,
        request: CombineRequest,
        checked: CheckedCombine,
        record: Record,
        params: kernels.LowLatencyCombineParams,
    ) -> CombineOutput:
        """Allocate, and fill the kernel's arguments but for ``y`` and ``bias``."""
        handle, device = request.handle, self._sizes.device
        num_topk = int(handle.topk_idx.shape[1])
        x = request.out
        if x is None:
            x = torch.empty(
                handle.num_tokens, self._config.hidden, dtype=torch.bfloat16, device=device
            )
        weights: torch.Tensor | None = None
        if checked.carried is not None:
            weights = torch.empty(handle.num_tokens, num_topk, device=device)
        base = params.base
        is_token = handle.recv_layout is RecvLayout.TOKEN
        given = checked.source_weights is not None or checked.carried is not None
        base.signature = pack_signature(
            operation=1,
            recv_layout=int(is_token),
            topk_weights=int(given),
            apply_weights=int(checked.apply_weights),
            K=num_topk,
        )
        base.num_topk = num_topk
        base.num_tokens = handle.num_tokens
        base.mask_late = int(request.on_timeout == "mask")
        base.wait_us = address_of(request.wait_us_stats)
        base.record = record.words.data_ptr()
        base.record_map = record.map
        params.topk_idx = address_of(handle.topk_idx)
        params.source_weights = address_of(checked.source_weights)
        params.carried = address_of(checked.carried)
        params.out_topk_weights = address_of(weights)
        params.apply_weights = int(checked.apply_weights)
        params.is_token_layout = int(is_token)
        params.out = address_of(x)
        return CombineOutput(x, weights)

    def _launch_combine(
        self,
        slots: Slots,
        request: CombineRequest,
        used: tuple[CheckedCombine, Record, torch.Tensor],
        functions: dict[int, Function],
        made: tuple[kernels.LowLatencyCombineParams, CombineOutput],
    ) -> CombineOutput:
        checked, record, turn = used
        params, output = made
        runtime, num_tokens = self._place.runtime, request.handle.num_tokens
        rows = aligned(checked.rows)
        params.y = address_of(rows)
        params.y_stride = rows.stride(0) * rows.element_size()
        bias = None if checked.bias is None else aligned(checked.bias)
        params.bias = address_of(bias)
        params.bias_stride = 0 if bias is None else bias.stride(0) * bias.element_size()
        self.num_combines += 1
        inputs = (rows, checked.carried, checked.source_weights, bias, record.words)
        outputs = (output.x, output.topk_weights, turn)
        num_rows = self._sizes.block_rows
        hook: Callable[[], None] | None = None
        with self._stream_of(request, (*inputs, *outputs)):
            if request.return_hook:
                send = functions[SEND]
                runtime.launch(send, slots.grid(send, num_rows), params)
            else:
                both = functions[BOTH]
                runtime.launch(both, slots.grid(both, num_rows), params)
                slots.open()
            runtime.flush()
            event = self._event(request)
        if request.return_hook:
            receive = functions[RECEIVE]

            def finish() -> None:
                held = keep_alive.pop()
                runtime.launch(receive, slots.grid(receive, num_tokens), params)
                runtime.flush()
                del held

            keep_alive = [(inputs, outputs, request)]  # their addresses are in params
            hook = self._make_hook(slots, COMBINE, finish, event)
        return CombineOutput(output.x, output.topk_weights, event, hook)
