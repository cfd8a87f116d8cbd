# SPDX-License-Identifier: Apache-2.0
"""Checks that dispatch and combine share."""

from __future__ import annotations

import functools

import torch

from deepcomm.errors import InvalidArgument

ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ID_DTYPES = (torch.int32, torch.int64)


def describe(value: object) -> str:
    """Return dtype and shape of a tensor, or the type of anything else."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def check_tensor(name: str, value: object, expected: str, device: torch.device) -> torch.Tensor:
    """Return ``value`` if it is a tensor on the buffer's device."""
    if not isinstance(value, torch.Tensor):
        raise InvalidArgument(f"{name}: expected {expected}, got {describe(value)}")
    differs = value.device != device
    if differs and (value.device.type != device.type or device.index is not None):
        raise InvalidArgument(f"{name}: expected a tensor on {device}, got one on {value.device}")
    if value.layout != torch.strided:
        raise InvalidArgument(f"{name}: expected a strided tensor, got {value.layout}")
    return value


@functools.cache
def row_dtypes(device_type: str) -> tuple[tuple[torch.dtype, ...], str]:
    """Return the dtypes of unquantised rows on a kind of device, and their names."""
    dtypes = ROW_DTYPES if device_type == "cpu" else ROW_DTYPES[:1]
    return dtypes, ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def contiguous_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return ``rows``, copied only if the last dimension is not contiguous or rows overlap."""
    if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]:
        return rows
    return rows if rows.is_contiguous() else rows.contiguous()


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
    return (weights.detach() if weights.requires_grad else weights).contiguous()


def check_on_timeout(on_timeout: object) -> None:
    """Check what a late peer means to a low-latency operation."""
    if on_timeout not in ("raise", "mask"):
        raise InvalidArgument(f"on_timeout: expected 'raise' or 'mask', got {on_timeout!r}")


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
