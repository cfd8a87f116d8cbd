# SPDX-License-Identifier: Apache-2.0
"""``ElasticBuffer``: the V2 interface of DeepEP over deepcomm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from deepcomm.compat.config import DEFAULT_NUM_SMS
from deepcomm.compat.elastic_plan import (
    Asked,
    Plan,
    plan_first,
    plan_repeat,
    routing_arguments,
)
from deepcomm.compat.events import (
    EventHandle,
    EventOverlap,
    uses_cuda,
)
from deepcomm.compat.handles import EPHandle, routing_of
from deepcomm.compat.native import NativeBuffers, Shape
from deepcomm.compat.rows import as_rows, bias_of, received_rows, row_tensor
from deepcomm.compat.streams import Streams, ownership
from deepcomm.config import DEFAULT_TIMEOUT_S, MAX_TOPK
from deepcomm.group import as_group
from deepcomm.sizing import buffer_bytes

if TYPE_CHECKING:
    from typing import TypeAlias

    from deepcomm.compat.rows import Rows
    from deepcomm.types import DispatchOutput

    Point: TypeAlias = EventOverlap | EventHandle | None
    Dispatched: TypeAlias = tuple[
        Rows, torch.Tensor | None, torch.Tensor | None, EPHandle, EventOverlap
    ]

__all__ = ["ElasticBuffer"]


class ElasticBuffer:
    """Exchange of tokens in one group, with DeepEP V2's calls.

    Memory is reserved by the first dispatch, which is collective anyway. What chooses transports,
    queue pairs or kernels is accepted and ignored: results do not depend on it, and are
    deterministic in any case.
    """

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: float = DEFAULT_TIMEOUT_S,
        num_gpu_timeout_secs: float = DEFAULT_TIMEOUT_S,
        explicitly_destroy: bool = False,
    ) -> None:
        """Remember the group and the limits; nothing is allocated.

        Args:
            group: A ``torch.distributed`` group of any backend, or an mpi4py communicator.
            num_bytes: Kept as an attribute; None computes it.
            num_cpu_bytes: Not supported.
            num_max_tokens_per_rank: Largest T of any rank; 0 lets the buffer grow with what comes.
            hidden: For ``num_bytes``; a dispatch brings its own.
            num_topk: For ``num_bytes``; a dispatch brings its own.
            use_fp8_dispatch: Kept as an attribute.
            deterministic: Kept as an attribute.
            allow_hybrid_mode: Kept as an attribute.
            allow_multiple_reduction: Ignored.
            prefer_overlap_with_compute: Ignored.
            sl_idx: Ignored.
            num_allocated_qps: Kept as an attribute.
            num_cpu_timeout_secs: Seconds any wait for a peer may take: the larger of the two.
            num_gpu_timeout_secs: Likewise.
            explicitly_destroy: Ignored: ``destroy`` may always be called, and need not be.

        Raises:
            NotImplementedError: ``num_cpu_bytes``.
        """
        del allow_multiple_reduction, prefer_overlap_with_compute, sl_idx
        if num_cpu_bytes:
            raise NotImplementedError(
                "num_cpu_bytes: storage in host memory (Engram) is no part of deepcomm; keep the "
                "table in tensors of your own"
            )
        control = as_group(group)
        self.group = group
        self.rank_idx = control.rank
        self.num_ranks = control.size
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.hidden = hidden
        self.num_topk = num_topk
        self.use_fp8_dispatch = use_fp8_dispatch
        self.deterministic = deterministic
        self.allow_hybrid_mode = allow_hybrid_mode
        self.num_allocated_qps = num_allocated_qps
        self.explicitly_destroy = explicitly_destroy
        if num_bytes is None and num_max_tokens_per_rank and hidden:
            num_bytes = _size_hint(control.size, num_max_tokens_per_rank, hidden, num_topk)
        self.num_bytes = num_bytes or 0
        timeout_s = max(num_cpu_timeout_secs, num_gpu_timeout_secs)
        self._native = NativeBuffers(group, timeout_s)
        self._streams = Streams()

    @staticmethod
    def get_buffer_size_hint(
        group: Any,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Return the bytes that a buffer of these limits reserves on a rank.

        Args:
            group: As for the constructor.
            num_max_tokens_per_rank: Largest T of any rank.
            hidden: H.
            num_topk: K; 0 is the largest there is.
            use_fp8_dispatch: Ignored: BF16 rows must fit as well.
            allow_hybrid_mode: Ignored.
            allow_multiple_reduction: Ignored.
        """
        del use_fp8_dispatch, allow_hybrid_mode, allow_multiple_reduction
        return _size_hint(as_group(group).size, num_max_tokens_per_rank, hidden, num_topk)

    def get_theoretical_num_sms(
        self,
        num_experts: int | None = None,
        num_topk: int | None = None,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 0,
        sm_write_gbs: float = 0,
    ) -> int:
        """Return a number to pass as ``num_sms``: deepcomm chooses by itself.

        Args:
            num_experts: Ignored, like the others.
            num_topk: See above.
            num_scaleout_topk: See above.
            rdma_gbs: See above.
            nvlink_gbs: See above.
            sm_read_gbs: See above.
            sm_write_gbs: See above.
        """
        del num_experts, num_topk, num_scaleout_topk
        del rdma_gbs, nvlink_gbs, sm_read_gbs, sm_write_gbs
        return DEFAULT_NUM_SMS

    @staticmethod
    def capture() -> EventHandle:
        """Return an event on the current stream."""
        return EventHandle()

    def get_comm_stream(self) -> Any:
        """Return a stream that every operation waits for, and that waits for every operation."""
        return self._streams.get()

    def barrier(
        self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True
    ) -> None:
        """Wait, on the host, until all ranks of the group are here and their devices are idle.

        Args:
            use_comm_stream: Ignored.
            with_cpu_sync: Ignored: the host waits in any case.
            sequential: Ignored.
        """
        del use_comm_stream, with_cpu_sync, sequential
        if uses_cuda():
            torch.cuda.synchronize()
        as_group(self.group).all_gather(None)

    def destroy(self) -> None:
        """Release everything; idempotent."""
        self._native.close()

    # ---- operations ------------------------------------------------------------------------------

    def dispatch(
        self,
        x: Rows,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Point = None,
        previous_event_before_epilogue: Point = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool | None = None,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> Dispatched:
        """Send each token once to every rank that owns one of its experts.

        Args:
            x: [T, H], or FP8 rows with their scales.
            topk_idx: [T, K] expert ids, -1 = none.
            topk_weights: float32 [T, K] or None.
            cumulative_local_expert_recv_stats: int32 [L]; rows received are added.
            num_experts: E.
            num_max_tokens_per_rank: Largest T of any rank now, by which rows are laid out without
                a host sync; None is the buffer's.
            expert_alignment: Multiple at which expanded groups start; None is 1.
            num_sms: Kept in the handle.
            num_qps: Ignored.
            previous_event: Wait for it first.
            previous_event_before_epilogue: Wait for it first.
            async_with_compute_stream: Return an event that holds something.
            allocate_on_comm_stream: Ignored.
            handle: Repeat its routing: what is not given comes from it.
            do_handle_copy: Ignored.
            do_cpu_sync: Return exactly the rows that arrived; False returns as many as can arrive.
            do_expand: One row per token and local expert, grouped by expert; None is the handle's,
                or False.
            do_zero_padding: Zeros in the rows without a token. Those between aligned groups of
                exact counts are zeros anyway.
            use_tma_aligned_col_major_sf: Return scales column-major, else row-major.

        Returns:
            Received rows (with scales for FP8), local ids [N, K] (None if expanded), weights [N, K]
            or [N], a handle and an event.
        """
        del num_qps, allocate_on_comm_stream, do_handle_copy
        asked = Asked(
            topk_idx=topk_idx,
            num_experts=num_experts,
            num_max_tokens_per_rank=num_max_tokens_per_rank,
            expert_alignment=expert_alignment,
            num_sms=num_sms,
            do_cpu_sync=do_cpu_sync,
            do_expand=do_expand,
        )
        plan = self._plan(row_tensor(x), asked) if handle is None else plan_repeat(handle, asked)
        output = plan.buffer.dispatch(
            as_rows(x),
            topk_weights=topk_weights,
            zero_padding=do_zero_padding or plan.has_gaps,
            async_op=async_with_compute_stream,
            **ownership(
                plan.buffer,
                async_with_compute_stream,
                self._streams.before(previous_event, previous_event_before_epilogue),
            ),
            **plan.arguments,
        )
        if cumulative_local_expert_recv_stats is not None:
            _add_counts(cumulative_local_expert_recv_stats, output)
        return (
            received_rows(output, column_major=use_tma_aligned_col_major_sf),
            output.topk_idx,
            output.topk_weights,
            plan.handle(output, row_tensor(x).dtype) if handle is None else handle,
            self._streams.after(output.event),
        )

    def _plan(self, rows: torch.Tensor, asked: Asked) -> Plan:
        """Plan the dispatch of a new routing, in a buffer that fits it."""
        topk_idx, num_experts = routing_arguments(asked)
        limit = self.num_max_tokens_per_rank
        shape = Shape(rows.device, num_experts, rows.shape[-1], limit or None)
        buffer = self._native.get(shape, topk_idx.shape[-1], rows.shape[0])
        return plan_first(buffer, asked, limit)

    def combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Point = None,
        previous_event_before_epilogue: Point = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Sum the rows of each token, without weights.

        Args:
            x: [N, H], the rows that ``dispatch`` returned; rows at the end that hold no token may
                be left out.
            handle: Of the dispatch.
            topk_weights: float32, [N, K] or, expanded, [N]; carried back, not multiplied with.
            bias: [T, H], or two of them.
            num_sms: Ignored.
            num_qps: Ignored.
            previous_event: Wait for it first.
            previous_event_before_epilogue: Wait for it first.
            async_with_compute_stream: Return an event that holds something.
            allocate_on_comm_stream: Ignored.

        Returns:
            Sums [T, H], carried weights [T, K] or None, and an event.
        """
        del num_sms, num_qps, allocate_on_comm_stream
        routing = routing_of(handle)
        num_rows = routing.handle.num_rows
        output = routing.buffer.combine(
            _all_rows(x, num_rows),
            routing.handle,
            topk_weights=None if topk_weights is None else _all_rows(topk_weights, num_rows),
            bias=bias_of(bias),
            async_op=async_with_compute_stream,
            previous_event=self._streams.before(previous_event, previous_event_before_epilogue),
        )
        return output.x, output.topk_weights, self._streams.after(output.event)


def _size_hint(num_ranks: int, max_tokens: int, hidden: int, num_topk: int) -> int:
    topk = num_topk or MAX_TOPK
    return buffer_bytes(
        num_ranks=num_ranks,
        num_experts=num_ranks * topk,
        num_topk=topk,
        hidden=hidden,
        max_tokens_per_rank=max_tokens,
        num_low_latency_slots=0,
    ).high_throughput


def _add_counts(stats: torch.Tensor, output: DispatchOutput) -> None:
    """Add the rows received; the current stream waits for an asynchronous dispatch."""
    if output.event is not None:
        output.event.current_stream_wait()
    stats.add_(output.num_tokens_per_expert)


def _all_rows(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return as many rows as the handle has; those left out are NaN, should one hold a token."""
    given = rows.shape[0]
    if given == num_rows:
        return rows
    if given > num_rows:
        return rows[:num_rows]
    padded = rows.new_empty((num_rows, *rows.shape[1:]))
    padded[:given] = rows
    padded[given:] = torch.nan
    return padded
