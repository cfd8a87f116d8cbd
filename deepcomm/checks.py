# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the operations, in one place for all backends.

They are in Python because they are about tensors; what is inside ``topk_idx`` (range, repetition)
is checked where the ids are read. Every message states the argument, what was expected and what
came.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deepcomm.errors import InvalidArgument
from deepcomm.types import SCALE_TILE, Handle, RecvLayout, ScaledTensor

if TYPE_CHECKING:
    from deepcomm.backends.base import CombineRequest, DispatchRequest
    from deepcomm.config import BufferConfig

__all__ = ["CheckedCombine", "CheckedDispatch", "check_combine", "check_dispatch"]

FP8_ALIGN = 16
ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ID_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
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


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CheckedCombine:
    """Arguments of a combine in the one form that backends take.

    Attributes:
        rows: [num_rows, H], last dimension contiguous.
        carried: Contiguous float32 weights to bring back, or None.
        source_weights: Contiguous float32 [T, K] that replace the recorded ones, or None.
        apply_weights: Whether rows are multiplied.
    """

    rows: torch.Tensor
    carried: torch.Tensor | None
    source_weights: torch.Tensor | None
    apply_weights: bool


def describe(value: object) -> str:
    """Return dtype and shape of a tensor, or the type of anything else."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def check_tensor(name: str, value: object, expected: str, device: torch.device) -> torch.Tensor:
    """Return ``value`` if it is a tensor on the buffer's device."""
    if not isinstance(value, torch.Tensor):
        raise InvalidArgument(f"{name}: expected {expected}, got {describe(value)}")
    if value.device.type != device.type or (device.index is not None and value.device != device):
        raise InvalidArgument(f"{name}: expected a tensor on {device}, got one on {value.device}")
    if value.layout != torch.strided:
        raise InvalidArgument(f"{name}: expected a strided tensor, got {value.layout}")
    return value


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
    dtypes = ROW_DTYPES if device.type == "cpu" else ROW_DTYPES[:1]
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
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
    tiles = -(-config.hidden // SCALE_TILE)
    words = -(-tiles // 4)
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


def contiguous_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return ``rows``, copied only if the last dimension is not contiguous or rows overlap."""
    if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]:
        return rows
    return rows if rows.is_contiguous() else rows.contiguous()


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


def check_weights(
    weights: object, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor | None:
    """Check optional float32 weights of one shape."""
    if weights is None:
        return None
    expected = f"float32 {list(shape)}"
    weights = check_tensor("topk_weights", weights, expected, device)
    if weights.dtype != torch.float32 or tuple(weights.shape) != shape:
        raise InvalidArgument(f"topk_weights: expected {expected}, got {describe(weights)}")
    return weights.detach().contiguous()


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
    if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 1:
        raise InvalidArgument(f"expert_alignment: expected an int of at least 1, got {alignment!r}")
    if alignment != 1 and layout is not RecvLayout.EXPERT:
        raise InvalidArgument(
            f"expert_alignment: expected 1 for {layout.name}, which has no groups, got {alignment}"
        )
    return alignment


def check_capacity(capacity: int | None, layout: RecvLayout) -> int | None:
    """Return the capacity in rows."""
    if capacity is None:
        return None
    if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 0:
        raise InvalidArgument(f"num_recv_tokens: expected None or an int >= 0, got {capacity!r}")
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
    if request.on_timeout not in ("raise", "mask"):
        raise InvalidArgument(f"on_timeout: expected 'raise' or 'mask', got {request.on_timeout!r}")
    for name, value, dtypes in (
        ("expert_token_stats", request.expert_token_stats, ID_DTYPES),
        ("wait_us_stats", request.wait_us_stats, (torch.int64,)),
    ):
        check_statistic(name, value, dtypes, device)


def check_statistic(
    name: str, value: object, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Check one statistics tensor."""
    if value is None:
        return
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    tensor = check_tensor(name, value, f"{names} [n]", device)
    if tensor.dtype not in dtypes or tensor.ndim != 1:
        raise InvalidArgument(f"{name}: expected {names} [n], got {describe(tensor)}")


def check_length(name: str, value: torch.Tensor | None, length: int) -> None:
    """Check the length of one statistics tensor."""
    if value is not None and value.shape[0] != length:
        raise InvalidArgument(f"{name}: expected {length} elements, got {value.shape[0]}")


def check_combine(
    request: CombineRequest, config: BufferConfig, num_local_experts: int, device: torch.device
) -> CheckedCombine:
    """Check the arguments of a combine of either mode.

    Raises:
        InvalidArgument: The first argument that is wrong.
    """
    handle = request.handle
    if not isinstance(handle, Handle):
        raise InvalidArgument(f"handle: expected a deepcomm.Handle, got {describe(handle)}")
    if handle.low_latency != request.low_latency:
        names = ("dispatch", "low_latency_dispatch")
        raise InvalidArgument(
            f"handle: expected one of {names[request.low_latency]}, "
            f"got one of {names[handle.low_latency]}"
        )
    rows = check_outputs(request, config, num_local_experts, device)
    bias_shape = (handle.num_tokens, config.hidden)
    for name, value in (("bias", request.bias), ("out", request.out)):
        check_like_output(name, value, rows.dtype, bias_shape, device)
    if request.on_timeout not in ("raise", "mask"):
        raise InvalidArgument(f"on_timeout: expected 'raise' or 'mask', got {request.on_timeout!r}")
    check_statistic("wait_us_stats", request.wait_us_stats, (torch.int64,), device)
    return check_combine_weights(request, rows, num_local_experts, device)


def outputs_shape(handle: Handle, hidden: int, num_local_experts: int) -> tuple[int, ...]:
    """Return the shape of ``y`` for a handle."""
    if handle.recv_layout is RecvLayout.EXPERT_PADDED:
        return (num_local_experts, handle.num_rows // num_local_experts, hidden)
    return (handle.num_rows, hidden)


def check_outputs(
    request: CombineRequest, config: BufferConfig, num_local_experts: int, device: torch.device
) -> torch.Tensor:
    """Check ``y`` and return it as [num_rows, H]."""
    dtypes = ROW_DTYPES if device.type == "cpu" else ROW_DTYPES[:1]
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    shape = outputs_shape(request.handle, config.hidden, num_local_experts)
    expected = f"{names} {list(shape)}"
    y = check_tensor("y", request.y, expected, device)
    if y.dtype not in dtypes or tuple(y.shape) != shape:
        raise InvalidArgument(f"y: expected {expected}, got {describe(y)}")
    rows = y.detach()
    if rows.ndim == 3:
        rows = rows.contiguous().view(-1, config.hidden)
    return contiguous_rows(rows)


def check_like_output(
    name: str,
    value: object,
    dtype: torch.dtype,
    shape: tuple[int, int],
    device: torch.device,
) -> None:
    """Check ``bias`` or ``out``: [T, H] in ``y``'s dtype."""
    if value is None:
        return
    expected = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
    tensor = check_tensor(name, value, expected, device)
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise InvalidArgument(f"{name}: expected {expected}, got {describe(tensor)}")
    if name == "out" and not tensor.is_contiguous():
        raise InvalidArgument(f"out: expected it contiguous, got strides {list(tensor.stride())}")


def check_combine_weights(
    request: CombineRequest, rows: torch.Tensor, num_local_experts: int, device: torch.device
) -> CheckedCombine:
    """Tell apart the three uses of ``topk_weights``: carried back, replaced, not given."""
    handle = request.handle
    token = handle.recv_layout is RecvLayout.TOKEN
    num_topk = int(handle.topk_idx.shape[1])
    if request.apply_weights and token and not request.low_latency:
        raise InvalidArgument(
            "apply_weights: expected False for TOKEN rows, which belong to several experts"
        )
    applied = request.apply_weights and not token
    if not applied:
        shape = carried_shape(handle, num_topk, num_local_experts)
        carried = check_weights(request.topk_weights, shape, device)
        return CheckedCombine(rows=rows, carried=carried, source_weights=None, apply_weights=False)
    source: torch.Tensor | None = None
    if request.topk_weights is not None:
        if not request.low_latency:
            raise InvalidArgument(
                "topk_weights: expected None with apply_weights: those given to dispatch apply"
            )
        source = check_weights(request.topk_weights, (handle.num_tokens, num_topk), device)
    elif handle.topk_weights is None:
        raise InvalidArgument(
            "apply_weights: expected weights given to the dispatch of handle, got none"
        )
    return CheckedCombine(rows=rows, carried=None, source_weights=source, apply_weights=True)


def carried_shape(handle: Handle, num_topk: int, num_local_experts: int) -> tuple[int, ...]:
    """Return the shape of weights to carry back."""
    if handle.recv_layout is RecvLayout.TOKEN:
        return (handle.num_rows, num_topk)
    if handle.recv_layout is RecvLayout.EXPERT:
        return (handle.num_rows,)
    return (num_local_experts, handle.num_rows // num_local_experts)
