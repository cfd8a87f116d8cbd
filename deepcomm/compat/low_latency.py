# SPDX-License-Identifier: Apache-2.0
"""The low-latency half of the V1 ``Buffer``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from deepcomm.checks import check_peer
from deepcomm.compat.events import EventOverlap
from deepcomm.compat.handles import LowLatencyHandle, routing_of
from deepcomm.compat.keys import Routing
from deepcomm.compat.native import NativeBuffers, Shape
from deepcomm.compat.rows import received_rows, round_to_powers
from deepcomm.compat.streams import Streams
from deepcomm.errors import InvalidArgument
from deepcomm.sizing import buffer_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from deepcomm.compat.rows import Rows

    Hook: TypeAlias = Callable[[], None] | None

__all__ = ["LowLatencyOperations"]

HINT_TOPK = 8


class LowLatencyOperations:
    """Low-latency operations, masks and their buffers; ``Buffer`` adds the rest."""

    enable_shrink: bool
    group_size: int
    rank: int
    _native: NativeBuffers
    _streams: Streams

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Return the bytes that low-latency operations of this shape reserve on a rank."""
        return buffer_bytes(
            num_ranks=num_ranks,
            num_experts=num_experts,
            num_topk=min(HINT_TOPK, num_experts),
            hidden=hidden,
            max_tokens_per_rank=num_max_dispatch_tokens_per_rank,
        ).low_latency

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Do nothing: the regimes share no memory, and none needs zeros."""

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        use_nvfp4: bool = False,
        x_global_scale: torch.Tensor | None = None,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Rows, torch.Tensor, LowLatencyHandle, EventOverlap, Hook]:
        """Send tokens without exchanging counts.

        Args:
            x: [T, H].
            topk_idx: [T, K] expert ids, -1 = none.
            num_max_dispatch_tokens_per_rank: Largest T of any rank, alike on all.
            num_experts: E.
            cumulative_local_expert_recv_stats: int32 [L]; rows received are added.
            dispatch_wait_recv_cost_stats: int64 [R]; microseconds waited are added.
            use_fp8: Cast the rows on the way.
            round_scale: Round the scales up to powers of two.
            use_ue8m0: Return the scales as packed exponents, int32; needs ``round_scale``.
            use_nvfp4: Not supported.
            x_global_scale: Not supported.
            async_finish: Return an event.
            return_recv_hook: Return after sending; the hook receives.

        Returns:
            Rows [L, R * tokens, H] (FP8: with scales, column-major), rows per local expert int32
            [L], a handle, an event, and the hook or None.

        Raises:
            NotImplementedError: ``use_nvfp4`` or ``x_global_scale``.
        """
        if use_nvfp4 or x_global_scale is not None:
            raise NotImplementedError("use_nvfp4: rows travel as BF16 or FP8; pass use_fp8=True")
        check_mode(async_finish, return_recv_hook)
        rows, quantize, scale_format = _cast(x, use_fp8, round_scale, use_ue8m0)
        limit = num_max_dispatch_tokens_per_rank
        shape = Shape(x.device, num_experts, x.shape[-1], limit, low_latency=True)
        buffer = self._native.get(shape, topk_idx.shape[-1], x.shape[0])
        output = buffer.low_latency_dispatch(
            rows,
            topk_idx,
            quantize=quantize,
            scale_format=scale_format,
            return_hook=return_recv_hook,
            async_op=async_finish,
            previous_event=self._streams.before(None),
            on_timeout=self._on_timeout,
            expert_token_stats=cumulative_local_expert_recv_stats,
            wait_us_stats=dispatch_wait_recv_cost_stats,
        )
        routing = Routing(buffer, output.handle, x.dtype, topk_idx, version_of(topk_idx))
        facts = (output.num_tokens_per_expert, limit, x.shape[-1], num_experts)
        return (
            received_rows(output),
            output.num_tokens_per_expert,
            LowLatencyHandle(routing, facts),
            self._streams.after(output.event),
            output.hook,
        )

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: Any,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
        overlap: bool = False,
        packed_recv_count: torch.Tensor | None = None,
        comp_signal: torch.Tensor | None = None,
        block_m: int = 64,
        threshold: int = 0,
        num_sms: int = 0,
        src_signals: torch.Tensor | None = None,
        src_signal_expect_value: int = 0,
    ) -> tuple[torch.Tensor, EventOverlap, Hook]:
        """Bring expert outputs back and sum them with weights.

        Args:
            x: [L, R * tokens, H].
            topk_idx: [T, K] as dispatched. An id that is -1 now counts as none; the sum of a token
                with any other id than dispatched is NaN. The very tensor that was dispatched is
                not looked at again unless torch has counted a change of it, which it does not in
                inference mode.
            topk_weights: float32 [T, K].
            handle: Of the dispatch.
            use_logfmt: Not supported.
            zero_copy: Take the rows of ``get_next_low_latency_combine_buffer`` instead of ``x``.
            async_finish: Return an event.
            return_recv_hook: Return after sending; the hook receives.
            out: [T, H] to receive into.
            combine_wait_recv_cost_stats: int64 [R]; microseconds waited are added.
            overlap: Not supported; what follows belongs to it.
            packed_recv_count: See ``overlap``.
            comp_signal: See ``overlap``.
            block_m: See ``overlap``.
            threshold: See ``overlap``.
            num_sms: See ``overlap``.
            src_signals: See ``overlap``.
            src_signal_expect_value: See ``overlap``.

        Returns:
            Sums [T, H], an event, and the hook or None.

        Raises:
            NotImplementedError: ``use_logfmt`` or ``overlap``.
        """
        del packed_recv_count, comp_signal, block_m, threshold, num_sms
        del src_signals, src_signal_expect_value
        if use_logfmt:
            raise NotImplementedError("use_logfmt: combine travels in x's dtype; leave it False")
        if overlap:
            raise NotImplementedError(
                "overlap with the expert's kernel by signals: combine starts when x is complete; "
                "overlap two batches by return_recv_hook instead"
            )
        check_mode(async_finish, return_recv_hook)
        routing = routing_of(handle)
        output = routing.buffer.low_latency_combine(
            _handed_out(routing) if zero_copy else x,
            routing.handle,
            topk_weights=_weights(routing, topk_idx, topk_weights),
            out=out,
            return_hook=return_recv_hook,
            async_op=async_finish,
            previous_event=self._streams.before(None),
            on_timeout=self._on_timeout,
            wait_us_stats=combine_wait_recv_cost_stats,
        )
        return output.x, self._streams.after(output.event), output.hook

    def get_next_low_latency_combine_buffer(self, handle: Any) -> torch.Tensor:
        """Return a tensor [L, R * tokens, H] for expert outputs, to be combined by ``zero_copy``.

        Combine reads any tensor in place: this one saves clients a copy of their own, no more.
        """
        routing = routing_of(handle)
        if routing.outputs is None:
            config, num_ranks = routing.buffer.config, routing.buffer.num_ranks
            num_local = config.num_experts // num_ranks
            routing.outputs = torch.empty(
                (num_local, routing.handle.num_rows // num_local, config.hidden),
                dtype=routing.dtype,
                device=routing.buffer.device,
            )
        return routing.outputs

    # ---- masks -----------------------------------------------------------------------------------

    @property
    def _on_timeout(self) -> Literal["raise", "mask"]:
        return "mask" if self.enable_shrink else "raise"

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Mark a peer dead, or alive again, for low-latency operations.

        Raises:
            InvalidArgument: It is no peer.
        """
        check_peer("rank_to_mask", rank_to_mask, self.rank, self.group_size)
        self._native.set_mask(rank_to_mask, mask)

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Write 1 for every masked rank, 0 for the others, into an int tensor [R].

        Waits for the operations so far, which may find a rank late.
        """
        if mask_status.is_cuda:
            torch.cuda.synchronize(mask_status.device)
        masked = self._native.masked_ranks()
        status = [int(rank in masked) for rank in range(mask_status.numel())]
        mask_status.copy_(torch.tensor(status, dtype=mask_status.dtype))

    def low_latency_clean_mask_buffer(self) -> None:
        """Mark all peers alive."""
        for rank in self._native.masked_ranks():
            self._native.set_mask(rank, False)


def check_mode(async_finish: bool, return_recv_hook: bool) -> None:
    """Check that an operation finishes in one way."""
    if async_finish and return_recv_hook:
        raise InvalidArgument("async_finish: expected False beside return_recv_hook, got True")


def version_of(tensor: torch.Tensor) -> int:
    """Return how often torch has counted a change of a tensor; -1 where it does not count."""
    return -1 if tensor.is_inference() else tensor._version


def _cast(
    x: torch.Tensor, use_fp8: bool, round_scale: bool, use_ue8m0: bool
) -> tuple[Any, Literal["fp8_e4m3"] | None, Literal["fp32", "ue8m0"]]:
    """Return rows, cast and scale format for a dispatch."""
    if not use_fp8:
        return x, None, "fp32"
    if use_ue8m0 and not round_scale:
        raise InvalidArgument("round_scale: expected True with use_ue8m0, got False")
    if round_scale and not use_ue8m0:
        return round_to_powers(x), None, "fp32"
    return x, "fp8_e4m3", "ue8m0" if use_ue8m0 else "fp32"


def _weights(routing: Routing, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """Return the weights to apply, given the ids that the caller now has."""
    sent = routing.handle.topk_idx
    if topk_idx is routing.topk_idx and version_of(topk_idx) == routing.topk_version:
        return topk_weights
    if topk_idx.shape != sent.shape:
        raise InvalidArgument(
            f"topk_idx: expected {list(sent.shape)} as dispatched, got {list(topk_idx.shape)}"
        )
    other = (topk_idx != sent) & (topk_idx >= 0)
    weights = torch.where(topk_idx < 0, 0.0, topk_weights)
    return weights.masked_fill(other.any(-1, keepdim=True), torch.nan)


def _handed_out(routing: Routing) -> torch.Tensor:
    if routing.outputs is None:
        raise InvalidArgument(
            "zero_copy: expected rows in the tensor of get_next_low_latency_combine_buffer, "
            "which was not asked for"
        )
    return routing.outputs
