# SPDX-License-Identifier: Apache-2.0
"""``Buffer``: the public operations. Checks nothing and moves nothing itself: backends do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from deepcomm.backends.base import (
    CombineRequest,
    DispatchRequest,
    low_latency_combine_request,
    low_latency_dispatch_request,
    open_backend,
)
from deepcomm.config import DEFAULT_LATE_WARNING_S, DEFAULT_TIMEOUT_S, BufferConfig
from deepcomm.types import RecvLayout

if TYPE_CHECKING:
    from types import TracebackType

    from deepcomm.types import (
        BufferStats,
        CombineOutput,
        DispatchOutput,
        Event,
        Handle,
        ScaledTensor,
    )

__all__ = ["Buffer"]


class Buffer:
    """Symmetric memory of one rank in a group, and the operations that exchange tokens through it.

    Constructing and growing a buffer is collective, and all ranks call the operations of one buffer
    in the same order. Two buffers, of the same or of different groups, are independent. One thread
    at a time calls one buffer.
    """

    def __init__(
        self,
        group: Any,
        *,
        num_experts: int,
        num_topk: int,
        hidden: int,
        max_tokens_per_rank: int,
        device: torch.device | str | None = None,
        ranks_per_node: int | None = None,
        growable: bool = False,
        num_sms: int | None = None,
        num_threads: int | None = None,
        num_generations: int = 3,
        num_low_latency_slots: int = 4,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        late_warning_s: float = DEFAULT_LATE_WARNING_S,
        rail: str = "auto",
        traffic_class: int | None = None,
    ) -> None:
        """Reserve symmetric memory and meet the peers; collective over ``group``.

        Args:
            group: A ``torch.distributed`` process group of any backend (also a subgroup, or
                ``dist.group.WORLD``), an mpi4py communicator, or the group that
                ``deepcomm.testing.LocalCluster`` hands to each of its ranks.
            num_experts: E, a multiple of the number of ranks. Rank r owns experts
                [r * E / R, (r + 1) * E / R).
            num_topk: Largest K of any operation, 1..32.
            hidden: H, elements of a row; a row is a multiple of 16 bytes.
            max_tokens_per_rank: Largest T of any operation on any rank.
            device: Where tensors live; None is CUDA if available, else CPU.
            ranks_per_node: Ranks that share memory, instead of finding out; one host can so play
                several nodes.
            growable: Re-allocate, collectively, when a rank brings more tokens than
                ``max_tokens_per_rank`` to a high-throughput dispatch, instead of raising.
            num_sms: Streaming multiprocessors an operation may use (CUDA); None chooses.
            num_threads: Threads a rank may use for copies, casts and sums (CPU); None chooses.
            num_generations: Landing areas of the ring, 2 or more; views can lease all but one.
            num_low_latency_slots: Low-latency operations in flight, 3 or more, or 0 for none.
            timeout_s: Seconds any wait for a peer may take before ``CommTimeout``. The default is
                above the skew that compiling or autotuning causes between ranks.
            late_warning_s: Seconds of waiting after which a late peer is logged.
            rail: Transport between nodes: "auto"; "gloo" on CPUs; on CUDA "lsa", loads and stores,
                "gin" or "nccl" (docs/cuda.md, Nodes).
            traffic_class: Of what crosses a network, as that counts classes (a service level on
                InfiniBand, a traffic class on RoCE); None leaves it to the network. Loads and
                stores have no classes; gloo cannot choose one.

        Raises:
            InvalidArgument: An argument is out of range, or the group's ranks are not node-major or
                its nodes uneven.
            ConfigMismatch: Ranks disagree on an argument; raised on every rank.
            CommError: A peer failed to construct; names it.
        """
        self._backend = open_backend(
            group,
            BufferConfig(
                num_experts=num_experts,
                num_topk=num_topk,
                hidden=hidden,
                max_tokens_per_rank=max_tokens_per_rank,
                ranks_per_node=ranks_per_node,
                growable=growable,
                num_sms=num_sms,
                num_threads=num_threads,
                num_generations=num_generations,
                num_low_latency_slots=num_low_latency_slots,
                timeout_s=timeout_s,
                late_warning_s=late_warning_s,
                rail=rail,
                traffic_class=traffic_class,
            ),
            device,
        )
        self.group = group

    @property
    def rank(self) -> int:
        """This rank's index in the group."""
        return self._backend.topology.rank

    @property
    def num_ranks(self) -> int:
        """R, ranks of the group."""
        return self._backend.topology.num_ranks

    @property
    def ranks_per_node(self) -> int:
        """G, ranks that reach each other by load and store."""
        return self._backend.topology.ranks_per_node

    @property
    def config(self) -> BufferConfig:
        """The configuration in force; ``max_tokens_per_rank`` grows with a growable buffer."""
        return self._backend.config

    @property
    def device(self) -> torch.device:
        """Device of the tensors that go in and come out."""
        return self._backend.device

    @property
    def num_bytes(self) -> int:
        """Bytes of symmetric memory this rank has reserved."""
        return self._backend.num_bytes

    def dispatch(
        self,
        x: torch.Tensor | ScaledTensor,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        handle: Handle | None = None,
        recv_layout: RecvLayout | None = None,
        expert_alignment: int | None = None,
        quantize: Literal["fp8_e4m3"] | None = None,
        scale_format: Literal["fp32", "ue8m0"] = "fp32",
        num_recv_tokens: int | None = None,
        zero_padding: bool = False,
        out: torch.Tensor | None = None,
        owned: bool = False,
        async_op: bool = False,
        previous_event: Event | None = None,
    ) -> DispatchOutput:
        """Send each token's row once to every rank that owns one of its experts.

        Args:
            x: [T, H] bfloat16 (on CPU also float16, float32) or ``ScaledTensor``. Rows may be
                strided; the last dimension is contiguous.
            topk_idx: [T, K] int32 or int64 expert ids, distinct in a row, -1 = none; None with
                ``handle``.
            topk_weights: float32 [T, K], delivered with the rows; optional.
            handle: Repeat this routing (cached dispatch): no count exchange; layout, alignment and
                capacity come from it and must not be given.
            recv_layout: Order of the received rows; None is ``RecvLayout.TOKEN``.
            expert_alignment: Multiple at which the groups of ``EXPERT`` start; None is 1.
            quantize: Cast the rows to FP8 E4M3 with one scale per 128 channels on the way.
            scale_format: "fp32", or "ue8m0" (powers of two, packed four to an int32).
            num_recv_tokens: Capacity in rows of the receive tensor: ``x`` then has exactly that
                many rows, nothing is learnt by the host, and rows that do not fit are dropped and
                flagged in ``overflow``. None: exact counts.
            zero_padding: Fill the rows that hold no token with zeros (else unspecified).
            out: Receive into this tensor instead (at least as many rows as arrive; if they do not
                fit, InvalidArgument is raised here alone, when all ranks are done).
            owned: Return an owned tensor, never a view of symmetric memory.
            async_op: Return an event. On CPUs the work is complete when the call returns.
            previous_event: Wait for it first.

        Raises:
            InvalidArgument: An argument is wrong; peers get CommError; the buffer stays usable.
            ConfigMismatch: Ranks disagree on layout, dtype or another argument that must be equal.
            CommError: A peer had an argument error (usable afterwards) or died.
            CommTimeout: A peer did not come within ``timeout_s``.
        """
        return self._backend.dispatch(
            DispatchRequest(
                x=x,
                topk_idx=topk_idx,
                topk_weights=topk_weights,
                handle=handle,
                recv_layout=recv_layout,
                expert_alignment=expert_alignment,
                quantize=quantize,
                scale_format=scale_format,
                capacity=num_recv_tokens,
                zero_padding=zero_padding,
                out=out,
                owned=owned,
                async_op=async_op,
                previous_event=previous_event,
            )
        )

    def combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        *,
        topk_weights: torch.Tensor | None = None,
        apply_weights: bool = False,
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        async_op: bool = False,
        previous_event: Event | None = None,
    ) -> CombineOutput:
        """Bring the expert outputs back to the tokens' ranks and sum them in FP32, in fixed order.

        Args:
            y: Expert outputs in the rows of ``handle``'s layout, [num_rows, H] ([L, M, H] for
                ``EXPERT_PADDED``); bfloat16 (on CPU also float16, float32). The tensor that
                ``dispatch`` returned, changed in place, is not copied on its way.
            handle: The routing, from ``dispatch``.
            topk_weights: float32, carried back to the tokens' ranks (the gradient path): [N, K]
                for ``TOKEN``, one a row for the expert layouts. Not beside ``apply_weights``.
            apply_weights: Multiply each row by its weight of the dispatch (expert layouts only).
            bias: [T, H] in ``y``'s dtype, added last.
            out: [T, H] to receive into.
            async_op: Return an event. On CPUs the work is complete when the call returns.
            previous_event: Wait for it first.

        Raises:
            InvalidArgument: An argument is wrong; peers get CommError; the buffer stays usable.
            ConfigMismatch: Ranks disagree on dtype, weights or handle.
            CommError: A peer had an argument error (usable afterwards) or died.
            CommTimeout: A peer did not come within ``timeout_s``.
        """
        return self._backend.combine(
            CombineRequest(
                y=y,
                handle=handle,
                topk_weights=topk_weights,
                apply_weights=apply_weights,
                bias=bias,
                out=out,
                async_op=async_op,
                previous_event=previous_event,
            )
        )

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        *,
        quantize: Literal["fp8_e4m3"] | None = None,
        scale_format: Literal["fp32", "ue8m0"] = "fp32",
        recv_layout: RecvLayout = RecvLayout.EXPERT_PADDED,
        zero_padding: bool = False,
        out: torch.Tensor | None = None,
        return_hook: bool = False,
        async_op: bool = False,
        previous_event: Event | None = None,
        on_timeout: Literal["raise", "mask"] = "raise",
        expert_token_stats: torch.Tensor | None = None,
        wait_us_stats: torch.Tensor | None = None,
    ) -> DispatchOutput:
        """Dispatch without a count exchange, in two phases: send now, receive in the hook.

        Rows arrive bit for bit, but for NaN: on GPUs one may arrive with other bits.

        Args:
            x: [T, H] as for ``dispatch``, or ``ScaledTensor``.
            topk_idx: [T, K] as for ``dispatch``.
            topk_weights: float32 [T, K]; recorded for the combine, optional.
            quantize: As for ``dispatch``.
            scale_format: As for ``dispatch``.
            recv_layout: ``EXPERT_PADDED``, or ``TOKEN``: then ``x`` has R * max_tokens_per_rank
                rows, of which the first ``num_recv_tokens`` are valid.
            zero_padding: Fill the rows that hold no token with zeros (else unspecified).
            out: Receive into this tensor, of exactly the output's shape.
            return_hook: Return after the send phase; ``output.hook()`` receives. Hooks of one
                buffer are called in the order of their operations, of which at most
                ``num_low_latency_slots`` are in flight.
            async_op: Return an event. On CPUs the work is complete when the call returns.
            previous_event: Wait for it first.
            on_timeout: "mask" marks a late peer dead in the rank mask instead of raising.
            expert_token_stats: int32 or int64 [L]; the rows received per local expert are added.
            wait_us_stats: int64 [R]; the microseconds waited for each source are added.

        Raises:
            InvalidArgument: An argument is wrong, or too many operations are in flight.
            CommError: A peer had an argument error (usable afterwards) or died; from the hook.
            CommTimeout: A peer did not come within ``timeout_s``; from the hook.
        """
        arguments = (
            x,
            topk_idx,
            topk_weights,
            quantize,
            scale_format,
            recv_layout,
            zero_padding,
            out,
            return_hook,
            async_op,
            previous_event,
            on_timeout,
            expert_token_stats,
            wait_us_stats,
        )
        output = self._backend.repeats.dispatch(arguments)
        if output is not None:
            return output
        return self._backend.low_latency_dispatch(low_latency_dispatch_request(*arguments))

    def low_latency_combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        *,
        topk_weights: torch.Tensor | None = None,
        apply_weights: bool = True,
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        return_hook: bool = False,
        async_op: bool = False,
        previous_event: Event | None = None,
        on_timeout: Literal["raise", "mask"] = "raise",
        wait_us_stats: torch.Tensor | None = None,
    ) -> CombineOutput:
        """Combine in two phases: send now, receive and sum in the hook.

        Args:
            y: Expert outputs, [L, M, H] for ``EXPERT_PADDED`` or [R * max_tokens_per_rank, H] for
                ``TOKEN``.
            handle: The routing, from ``low_latency_dispatch``.
            topk_weights: ``EXPERT_PADDED`` with ``apply_weights``: float32 [T, K] at the tokens'
                rank, instead of those recorded at dispatch; sent to the expert ranks first.
                Otherwise carried back as in ``combine``.
            apply_weights: Multiply each expert's row by its weight, given here or at dispatch
                (``EXPERT_PADDED``; rows of ``TOKEN`` are always summed plainly).
            bias: [T, H] in ``y``'s dtype, added last.
            out: [T, H] to receive into; on GPUs it begins at a multiple of 16 bytes.
            return_hook: As for ``low_latency_dispatch``.
            async_op: Return an event. On CPUs the work is complete when the call returns.
            previous_event: Wait for it first.
            on_timeout: As for ``low_latency_dispatch``.
            wait_us_stats: As for ``low_latency_dispatch``.

        Raises:
            InvalidArgument: An argument is wrong, or too many operations are in flight.
            CommError: A peer had an argument error (usable afterwards) or died; from the hook.
            CommTimeout: A peer did not come within ``timeout_s``; from the hook.
        """
        arguments = (
            y,
            handle,
            topk_weights,
            apply_weights,
            bias,
            out,
            return_hook,
            async_op,
            previous_event,
            on_timeout,
            wait_us_stats,
        )
        output = self._backend.repeats.combine(arguments)
        if output is not None:
            return output
        return self._backend.low_latency_combine(low_latency_combine_request(*arguments))

    def set_rank_mask(self, rank: int, masked: bool) -> None:
        """Mark a peer dead (or alive again) for this rank's low-latency operations.

        Both phases skip a masked peer: nothing is sent to it or awaited from it, and its tokens and
        expert outputs count as absent. With several nodes the pairs of ranks whose tokens it
        forwards are cut with it. On GPUs the mask changes on the current stream, after asynchronous
        operations: a hook that runs on another one has to come before or after it. Replays of CUDA
        graphs are not seen: take no rank back between the replay of a send and that of its hook.

        Raises:
            InvalidArgument: It is no peer; or it would be taken back while operations, sent without
                it, wait for their hooks.
        """
        self._backend.set_rank_mask(rank, masked)

    def rank_mask(self) -> torch.Tensor:
        """Return bool [R], true where a peer is masked."""
        return self._backend.rank_mask()

    def stats(self) -> BufferStats:
        """Return the counters of this rank since construction."""
        return self._backend.stats()

    def explain(self) -> str:
        """Return what was chosen for this buffer, and why, as readable lines."""
        return self._backend.explain()

    def close(self) -> None:
        """Give the symmetric memory back; idempotent. Views handed out earlier stay valid."""
        self._backend.close()

    def __enter__(self) -> Buffer:
        """Return the buffer itself."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the buffer."""
        self.close()
