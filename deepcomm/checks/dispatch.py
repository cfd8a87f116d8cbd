# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of a dispatch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deepcomm.checks.common import (
    ID_DTYPES,
    check_on_timeout,
    check_statistic,
    check_tensor,
    check_weights,
    contiguous_rows,
    describe,
    row_dtypes,
)
from deepcomm.errors import InvalidArgument
from deepcomm.fp8 import num_scale_words
from deepcomm.types import Handle, RecvLayout, ScaledTensor

if TYPE_CHECKING:
    from deepcomm.backends.base import DispatchRequest
    from deepcomm.config import BufferConfig

FP8_ALIGN = 16
INT32_MAX = 2**31 - 1


@dataclass(slots=True, eq=False, kw_only=True)
class CheckedDispatch:
    """Arguments of a dispatch in the one form that backends take.

    Attributes:
        rows: [T, H], last dimension contiguous; FP8 where ``scales`` is not None.
        scales: Contiguous rows of scale words, or None.
        scale_format: Of the rows as they travel: "none", "fp32" or "ue8m0".
        quantize: Whether rows are cast to FP8 on the way.
        topk_idx: Contiguous [T, K]; None for a cached dispatch.
        topk_weights: Contiguous float32 [T, K] or None.
        recv_layout: Resolved.
        expert_alignment: Resolved.
        capacity: Resolved, or None.
        id_dtype: Of ``topk_idx`` as given to the first dispatch of the routing.
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    scale_format: str
    quantize: bool
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    num_topk: int
    recv_layout: RecvLayout
    expert_alignment: int
    capacity: int | None
    id_dtype: torch.dtype

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.rows.shape[0])

    @property
    def is_exact(self) -> bool:
        """Whether shapes depend on how many rows arrive."""
        return self.capacity is None and self.recv_layout is not RecvLayout.EXPERT_PADDED


def check_dispatch(
    request: DispatchRequest, config: BufferConfig, device: torch.device
) -> CheckedDispatch:
    """Check the arguments of a dispatch of either mode.

    Raises:
        InvalidArgument: The first argument that is wrong.
    """
    if request.handle is not None:
        check_handle_alone(request, request.handle)
    rows, scales, scale_format = check_rows(request, config, device)
    num_tokens = rows.shape[0]
    topk_idx, num_topk, id_dtype = check_topk_idx(request, config, num_tokens, device)
    layout = resolve_layout(request)
    handle = request.handle
    alignment = request.expert_alignment if handle is None else handle.expert_alignment
    capacity = request.capacity if handle is None else handle.capacity
    checked = CheckedDispatch(
        rows=rows,
        scales=scales,
        scale_format=scale_format,
        quantize=request.quantize is not None,
        topk_idx=topk_idx,
        topk_weights=check_weights(request.topk_weights, (num_tokens, num_topk), device),
        num_topk=num_topk,
        recv_layout=layout,
        expert_alignment=check_alignment(alignment, layout),
        capacity=check_capacity(capacity, layout),
        id_dtype=id_dtype,
    )
    check_out(request.out, config, device)
    check_statistics(request, device)
    return checked


def check_handle_alone(request: DispatchRequest, handle: Handle) -> None:
    """Check that a cached dispatch leaves to its handle what the handle decides."""
    if not isinstance(handle, Handle):
        raise InvalidArgument(f"handle: expected a deepcomm.Handle, got {describe(handle)}")
    if handle.low_latency:
        raise InvalidArgument("handle: expected one of dispatch, got one of low_latency_dispatch")
    given = {
        "topk_idx": request.topk_idx,
        "recv_layout": request.recv_layout,
        "expert_alignment": request.expert_alignment,
        "num_recv_tokens": request.capacity,
    }
    for name, value in given.items():
        if value is not None:
            raise InvalidArgument(f"{name}: expected None beside handle, which decides it")


def check_rows(
    request: DispatchRequest, config: BufferConfig, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None, str]:
    """Check ``x`` and how it is to travel; return rows, scales and scale format."""
    if request.quantize not in (None, "fp8_e4m3"):
        raise InvalidArgument(f"quantize: expected None or 'fp8_e4m3', got {request.quantize!r}")
    if request.scale_format not in ("fp32", "ue8m0"):
        raise InvalidArgument(
            f"scale_format: expected 'fp32' or 'ue8m0', got {request.scale_format!r}"
        )
    if isinstance(request.x, ScaledTensor):
        return check_scaled_rows(request, config, device)
    dtypes, names = row_dtypes(device.type)
    expected = f"{names} [T, {config.hidden}] or a ScaledTensor"
    x = check_tensor("x", request.x, expected, device)
    if x.dtype not in dtypes or x.ndim != 2 or x.shape[1] != config.hidden:
        raise InvalidArgument(f"x: expected {expected}, got {describe(x)}")
    if request.quantize is None:
        return contiguous_rows(x), None, "none"
    check_fp8_hidden(config)
    return contiguous_rows(x), None, request.scale_format


def check_scaled_rows(
    request: DispatchRequest, config: BufferConfig, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Check a ``ScaledTensor``."""
    assert isinstance(request.x, ScaledTensor)
    if request.quantize is not None:
        raise InvalidArgument("quantize: expected None for a ScaledTensor, which is FP8 already")
    check_fp8_hidden(config)
    expected = f"float8_e4m3fn [T, {config.hidden}]"
    data = check_tensor("x.data", request.x.data, expected, device)
    if data.dtype != torch.float8_e4m3fn or data.ndim != 2 or data.shape[1] != config.hidden:
        raise InvalidArgument(f"x.data: expected {expected}, got {describe(data)}")
    tiles = num_scale_words(config.hidden, is_ue8m0=False)
    words = num_scale_words(config.hidden, is_ue8m0=True)
    expected = f"float32 [T, {tiles}] or int32 [T, {words}], T = {data.shape[0]}"
    scales = check_tensor("x.scales", request.x.scales, expected, device)
    widths = {torch.float32: tiles, torch.int32: words}
    if tuple(scales.shape) != (data.shape[0], widths.get(scales.dtype, -1)):
        raise InvalidArgument(f"x.scales: expected {expected}, got {describe(scales)}")
    given = "fp32" if scales.dtype == torch.float32 else "ue8m0"
    if request.scale_format == "ue8m0" and given == "fp32":
        raise InvalidArgument(
            "scale_format: expected 'fp32' for a ScaledTensor with float32 scales, got 'ue8m0'"
        )
    return contiguous_rows(data), contiguous_rows(scales), given


def check_fp8_hidden(config: BufferConfig) -> None:
    """FP8 rows are multiples of 16 bytes."""
    if config.hidden % FP8_ALIGN:
        raise InvalidArgument(
            f"hidden: expected a multiple of {FP8_ALIGN} for FP8 rows, got {config.hidden}"
        )


def check_topk_idx(
    request: DispatchRequest, config: BufferConfig, num_tokens: int, device: torch.device
) -> tuple[torch.Tensor | None, int, torch.dtype]:
    """Check ``topk_idx``, or ``x`` against the handle's; return it, K and the ids' dtype."""
    if request.handle is not None:
        handle = request.handle
        if num_tokens != handle.num_tokens:
            raise InvalidArgument(
                f"x: expected the {handle.num_tokens} tokens of handle, got {num_tokens}"
            )
        return None, int(handle.topk_idx.shape[1]), handle.topk_idx.dtype
    expected = f"int32 or int64 [{num_tokens}, K], 1 <= K <= {config.num_topk}"
    topk_idx = check_tensor("topk_idx", request.topk_idx, expected, device)
    shape = topk_idx.shape
    good = topk_idx.ndim == 2 and shape[0] == num_tokens and 1 <= shape[1] <= config.num_topk
    if topk_idx.dtype not in ID_DTYPES or not good:
        raise InvalidArgument(f"topk_idx: expected {expected}, got {describe(topk_idx)}")
    return topk_idx.contiguous(), int(shape[1]), topk_idx.dtype


def resolve_layout(request: DispatchRequest) -> RecvLayout:
    """Return the layout, checked for the mode."""
    layout = request.recv_layout if request.handle is None else request.handle.recv_layout
    layout = RecvLayout.TOKEN if layout is None else layout
    if not isinstance(layout, RecvLayout):
        raise InvalidArgument(f"recv_layout: expected a RecvLayout, got {layout!r}")
    if request.low_latency and layout is RecvLayout.EXPERT:
        raise InvalidArgument(
            "recv_layout: expected EXPERT_PADDED or TOKEN for low latency, got EXPERT"
        )
    return layout


def check_alignment(alignment: int | None, layout: RecvLayout) -> int:
    """Return the alignment of the groups."""
    if alignment is None:
        return 1
    is_int = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not is_int or not 1 <= alignment <= INT32_MAX:
        raise InvalidArgument(
            f"expert_alignment: expected an int in 1..{INT32_MAX}, got {alignment!r}"
        )
    if alignment != 1 and layout is not RecvLayout.EXPERT:
        raise InvalidArgument(
            f"expert_alignment: expected 1 for {layout.name}, which has no groups, got {alignment}"
        )
    return alignment


def check_capacity(capacity: int | None, layout: RecvLayout) -> int | None:
    """Return the capacity in rows."""
    if capacity is None:
        return None
    is_int = isinstance(capacity, int) and not isinstance(capacity, bool)
    if not is_int or not 0 <= capacity <= INT32_MAX:
        raise InvalidArgument(
            f"num_recv_tokens: expected None or an int in 0..{INT32_MAX}, got {capacity!r}"
        )
    if layout is RecvLayout.EXPERT_PADDED:
        raise InvalidArgument(
            "num_recv_tokens: expected None for EXPERT_PADDED, whose shape is fixed, "
            f"got {capacity}"
        )
    return capacity


def check_out(out: object, config: BufferConfig, device: torch.device) -> None:
    """Check what can be known of ``out`` before the rows are counted."""
    if out is None:
        return
    out = check_tensor("out", out, f"a contiguous tensor [..., {config.hidden}]", device)
    if out.shape[-1:] != (config.hidden,) or not out.is_contiguous():
        raise InvalidArgument(
            f"out: expected a contiguous tensor [..., {config.hidden}], got {describe(out)}, "
            f"strides {list(out.stride())}"
        )


def check_out_shape(out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Check ``out`` once the result is known: exact, but for a longer first dimension of rows."""
    fits = len(out.shape) == len(shape) and (
        out.shape == shape or (len(shape) == 2 and out.shape[0] >= shape[0])
    )
    if out.dtype != dtype or not fits:
        name = str(dtype).removeprefix("torch.")
        raise InvalidArgument(f"out: expected {name} {list(shape)}, got {describe(out)}")


def check_statistics(request: DispatchRequest, device: torch.device) -> None:
    """Check the optional statistics tensors' dtypes; sizes are the backend's to compare."""
    check_on_timeout(request.on_timeout)
    for name, value, dtypes in (
        ("expert_token_stats", request.expert_token_stats, ID_DTYPES),
        ("wait_us_stats", request.wait_us_stats, (torch.int64,)),
    ):
        check_statistic(name, value, dtypes, device)
