# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of a combine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from deepcomm.checks.common import (
    check_on_timeout,
    check_statistic,
    check_tensor,
    check_weights,
    contiguous_rows,
    describe,
    row_dtypes,
)
from deepcomm.errors import InvalidArgument
from deepcomm.types import Handle, RecvLayout

if TYPE_CHECKING:
    from deepcomm.backends.base import CombineRequest
    from deepcomm.config import BufferConfig


@dataclass(slots=True, eq=False, kw_only=True)
class CheckedCombine:
    """Arguments of a combine in the one form that backends take.

    Attributes:
        rows: [num_rows, H], last dimension contiguous.
        carried: Contiguous float32 weights to bring back, or None.
        source_weights: Contiguous float32 [T, K] that replace the recorded ones, or None.
        apply_weights: Whether rows are multiplied.
        bias: [T, H], last dimension contiguous, or None.
    """

    rows: torch.Tensor
    carried: torch.Tensor | None
    source_weights: torch.Tensor | None
    apply_weights: bool
    bias: torch.Tensor | None = None


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
    check_on_timeout(request.on_timeout)
    check_statistic("wait_us_stats", request.wait_us_stats, (torch.int64,), device)
    checked = check_combine_weights(request, rows, num_local_experts, device)
    if request.bias is None:
        return checked
    return replace(checked, bias=contiguous_rows(request.bias.detach()))


def outputs_shape(handle: Handle, hidden: int, num_local_experts: int) -> tuple[int, ...]:
    """Return the shape of ``y`` for a handle."""
    if handle.recv_layout is RecvLayout.EXPERT_PADDED:
        return (num_local_experts, handle.num_rows // num_local_experts, hidden)
    return (handle.num_rows, hidden)


def check_outputs(
    request: CombineRequest, config: BufferConfig, num_local_experts: int, device: torch.device
) -> torch.Tensor:
    """Check ``y`` and return it as [num_rows, H]."""
    dtypes, names = row_dtypes(device.type)
    shape = outputs_shape(request.handle, config.hidden, num_local_experts)
    expected = f"{names} {list(shape)}"
    y = check_tensor("y", request.y, expected, device)
    if y.dtype not in dtypes or tuple(y.shape) != shape:
        raise InvalidArgument(f"y: expected {expected}, got {describe(y)}")
    rows = y.detach() if y.requires_grad else y
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
