# SPDX-License-Identifier: Apache-2.0
"""``Buffer``: the V1 interface of DeepEP over deepcomm, high throughput."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from deepcomm.compat.config import DEFAULT_NUM_SMS, Config
from deepcomm.compat.events import EventHandle, EventOverlap, wait_for
from deepcomm.compat.handles import DispatchHandle, aligned, routing_of
from deepcomm.compat.keys import Routing
from deepcomm.compat.layout import dispatch_layout
from deepcomm.compat.low_latency import LowLatencyOperations
from deepcomm.compat.native import NativeBuffers, Shape
from deepcomm.compat.rows import as_rows, bias_of, received_rows, row_tensor
from deepcomm.compat.streams import Streams, ownership
from deepcomm.errors import InvalidArgument
from deepcomm.group import as_group
from deepcomm.types import RecvLayout

if TYPE_CHECKING:
    from typing import TypeAlias

    from deepcomm.compat.rows import Rows
    from deepcomm.types import DispatchOutput

__all__ = ["Buffer"]

if TYPE_CHECKING:
    Dispatched: TypeAlias = tuple[
        Rows,
        torch.Tensor | None,
        torch.Tensor | None,
        list[int] | None,
        DispatchHandle | None,
        EventOverlap,
    ]


class Buffer(LowLatencyOperations):
    """Exchange of tokens in one group, with DeepEP V1's calls.

    Memory is reserved by the first operation of a shape, which is collective anyway, and grows with
    what arrives: the byte counts given are kept for clients to compare, and otherwise ignored. So
    are the arguments about queue pairs, NVLink, MNNVL and fabric handles.
    """

    num_sms: int = DEFAULT_NUM_SMS
    """Streaming multiprocessors of an operation; results do not depend on it."""

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: float = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        use_fabric: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        num_nvl_peers: int = 0,
    ) -> None:
        """Remember the group; nothing is allocated.

        Args:
            group: A ``torch.distributed`` group of any backend, or None with ``comm``.
            num_nvl_bytes: Kept as an attribute.
            num_rdma_bytes: Kept as an attribute.
            low_latency_mode: Kept as an attribute; both regimes work in any case.
            num_qps_per_rank: Ignored.
            allow_nvlink_for_low_latency_mode: Ignored.
            allow_mnnvl: Ignored.
            use_fabric: Ignored.
            explicitly_destroy: Ignored: ``destroy`` may always be called, and need not be.
            enable_shrink: A rank that is late in a low-latency operation is masked instead of
                failing the operation.
            comm: An mpi4py communicator instead of ``group``.
            num_nvl_peers: Ignored: which ranks share memory is found out.

        Raises:
            InvalidArgument: Neither a group nor a communicator was given.
        """
        del num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric
        del num_nvl_peers
        control = as_group(comm if group is None else group)
        self.group = group
        self.rank = control.rank
        self.group_size = control.size
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self._native = NativeBuffers(comm if group is None else group)
        self._streams = Streams()

    # ---- settings --------------------------------------------------------------------------------

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Return True: FP8 and groups of several nodes are there in any case."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Set ``Buffer.num_sms`` for the buffers to come.

        Raises:
            InvalidArgument: It is no positive even number.
        """
        if new_num_sms < 2 or new_num_sms % 2:
            raise InvalidArgument(f"num_sms: expected a positive even number, got {new_num_sms}")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """Return an event on the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """Return a configuration for any number of ranks."""
        return _config(num_ranks)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """Return a configuration for any number of ranks."""
        return _config(num_ranks)

    def get_comm_stream(self) -> Any:
        """Return a stream that every operation waits for, and that waits for every operation."""
        return self._streams.get()

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """Return an empty tensor: there is nothing to clear, so clearing all of it does nothing.

        Raises:
            NotImplementedError: A part is asked for, which would be read or written.
        """
        del use_rdma_buffer
        if size is not None or offset:
            raise NotImplementedError(
                "get_local_buffer_tensor of a part: symmetric memory is not exposed; keep data of "
                "your own in a tensor, and ask for all of it only to clear it"
            )
        return torch.empty(0, dtype=dtype)

    def destroy(self) -> None:
        """Release everything; idempotent."""
        self._native.close()

    # ---- operations ------------------------------------------------------------------------------

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Count where this rank's tokens go.

        Args:
            topk_idx: [T, K] expert ids, -1 = none.
            num_experts: E.
            previous_event: Wait for it first.
            async_finish: Return an event.
            allocate_on_comm_stream: Ignored.

        Returns:
            Tokens per rank, per node (None for one node), per expert, bool [T, R], and an event.
        """
        del allocate_on_comm_stream
        wait_for(previous_event)
        layout = dispatch_layout(topk_idx, num_experts, self.group_size)
        event = EventOverlap(EventHandle() if async_finish else None)
        return (
            layout.num_tokens_per_rank,
            layout.num_tokens_per_rdma_rank,
            layout.num_tokens_per_expert,
            layout.is_token_in_rank,
            event,
        )

    def dispatch(
        self,
        x: Rows,
        handle: Any = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Dispatched:
        """Send each token once to every rank that owns one of its experts.

        Args:
            x: [T, H], or FP8 rows with their scales.
            handle: Repeat a routing; ids, weights, alignment and capacity are then not given.
            num_tokens_per_rank: Ignored: counted again on the way.
            num_tokens_per_rdma_rank: Likewise.
            is_token_in_rank: Likewise; kept in the handle.
            num_tokens_per_expert: [E]; its length says how many experts there are.
            topk_idx: [T, K] expert ids, -1 = none.
            topk_weights: float32 [T, K] or None.
            expert_alignment: The counts in the list are rounded up to it.
            num_worst_tokens: Rows to return whatever arrives, without a host sync; ids of the rows
                that hold no token are -1, and the list is empty.
            config: Ignored.
            previous_event: Wait for it first.
            async_finish: Return an event.
            allocate_on_comm_stream: Ignored.

        Returns:
            Received rows (with scales for FP8), local ids [N, K], weights [N, K], rows per local
            expert as a list, a handle and an event; with ``handle`` rows and event alone, the
            others None.
        """
        del num_tokens_per_rank, num_tokens_per_rdma_rank, config, allocate_on_comm_stream
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise InvalidArgument("topk_idx, topk_weights: expected None beside handle")
            routing = routing_of(handle)
            output = routing.buffer.dispatch(
                as_rows(x),
                handle=routing.handle,
                async_op=async_finish,
                **ownership(routing.buffer, async_finish, self._streams.before(previous_event)),
            )
            event = self._streams.after(output.event)
            return received_rows(output), None, None, None, None, event
        topk_idx, num_experts = _needed(topk_idx, num_tokens_per_expert)
        buffer = self._buffer_for(row_tensor(x), num_experts, topk_idx)
        output = buffer.dispatch(
            as_rows(x),
            topk_idx,
            topk_weights,
            recv_layout=RecvLayout.TOKEN,
            num_recv_tokens=num_worst_tokens or None,
            async_op=async_finish,
            **ownership(buffer, async_finish, self._streams.before(previous_event)),
        )
        routing = Routing(buffer, output.handle, row_tensor(x).dtype)
        return (
            received_rows(output),
            output.topk_idx,
            output.topk_weights,
            [] if num_worst_tokens else _counts_on_host(output, expert_alignment),
            DispatchHandle.of(routing, output, is_token_in_rank),
            self._streams.after(output.event),
        )

    def _buffer_for(self, rows: torch.Tensor, num_experts: int, topk_idx: torch.Tensor) -> Any:
        if Buffer.num_sms != DEFAULT_NUM_SMS:
            self._native.num_sms = Buffer.num_sms
        shape = Shape(rows.device, num_experts, rows.shape[-1], None)
        return self._native.get(shape, topk_idx.shape[-1], rows.shape[0])

    def combine(
        self,
        x: torch.Tensor,
        handle: Any,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Sum the rows of each token over the ranks, without weights.

        Args:
            x: [N, H], the rows that ``dispatch`` returned.
            handle: Of the dispatch, or its tensors.
            topk_weights: float32 [N, K], carried back: the gradient path.
            bias: [T, H], or two of them.
            config: Ignored.
            previous_event: Wait for it first.
            async_finish: Return an event.
            allocate_on_comm_stream: Ignored.

        Returns:
            Sums [T, H], carried weights [T, K] or None, and an event.
        """
        del config, allocate_on_comm_stream
        routing = routing_of(handle)
        output = routing.buffer.combine(
            x,
            routing.handle,
            topk_weights=topk_weights,
            bias=bias_of(bias),
            async_op=async_finish,
            previous_event=self._streams.before(previous_event),
        )
        return output.x, output.topk_weights, self._streams.after(output.event)


def _config(num_ranks: int) -> Config:
    if num_ranks < 1:
        raise InvalidArgument(f"num_ranks: expected at least 1, got {num_ranks}")
    return Config(Buffer.num_sms)


def _needed(
    topk_idx: torch.Tensor | None, num_tokens_per_expert: torch.Tensor | None
) -> tuple[torch.Tensor, int]:
    """Return the ids and E, without which a routing cannot be known."""
    if topk_idx is None:
        raise NotImplementedError(
            "dispatch without topk_idx: a routing by ranks alone; pass the ids, or for a routing "
            "known already its handle"
        )
    if num_tokens_per_expert is None:
        raise InvalidArgument(
            "num_tokens_per_expert: expected what get_dispatch_layout returned, got None"
        )
    return topk_idx, num_tokens_per_expert.numel()


def _counts_on_host(output: DispatchOutput, alignment: int) -> list[int]:
    """Return rows per local expert, rounded up; waits for an asynchronous dispatch."""
    if output.event is not None:
        output.event.synchronize()
    return aligned(output.num_tokens_per_expert, alignment).tolist()
