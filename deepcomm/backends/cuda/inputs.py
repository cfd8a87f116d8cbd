# SPDX-License-Identifier: Apache-2.0
"""Inputs of the CUDA operations: copied only where kernels need it, and what all ranks ask for.

Arguments are checked when an operation is made, but copied when it runs: on the stream of its
kernels, which waits for whoever writes the inputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from deepcomm.backends.cuda.functions import WIRES
from deepcomm.backends.cuda.routing import Asked
from deepcomm.backends.cuda.tensors import aligned_rows, row_format
from deepcomm.checks import check_combine, check_dispatch
from deepcomm.types import ScaledTensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from deepcomm.backends.base import CombineRequest, DispatchRequest
    from deepcomm.backends.cuda.domain import Domain
    from deepcomm.checks import CheckedCombine, CheckedDispatch
    from deepcomm.config import BufferConfig

__all__ = [
    "asked_of_combine",
    "asked_of_dispatch",
    "bring_combine_inputs",
    "bring_dispatch_inputs",
    "host_waits",
]

SCALE_ALIGN = 16


def host_waits(request: DispatchRequest, checked: CheckedDispatch, config: BufferConfig) -> bool:
    """Return whether the host waits: for counts, or because it might have to grow."""
    return request.handle is None and (checked.is_exact or config.growable)


def asked_of_dispatch(checked: CheckedDispatch) -> Asked:
    """Return what all ranks of a dispatch ask for alike."""
    wire = WIRES[row_format(checked).wire]
    return Asked(checked.recv_layout, checked.expert_alignment, wire)


def asked_of_combine(request: CombineRequest, checked: CheckedCombine) -> Asked:
    """Return what all ranks of a combine ask for alike."""
    handle = request.handle
    return Asked(handle.recv_layout, handle.expert_alignment, apply_weights=checked.apply_weights)


def bring_dispatch_inputs(
    request: DispatchRequest, checked: CheckedDispatch, domain: Domain
) -> CheckedDispatch:
    """Return a dispatch's inputs as kernels take them."""
    x = request.x
    data, given_scales = (x.data, x.scales) if isinstance(x, ScaledTensor) else (x, None)
    pairs = [
        (data, checked.rows),
        (given_scales, checked.scales),
        (request.topk_idx, checked.topk_idx),
        (request.topk_weights, checked.topk_weights),
    ]
    if request.previous_event is not None and are_copied(pairs):
        again = check_dispatch(request, domain.config, domain.device)
        checked = replace(again, id_dtype=checked.id_dtype)
    scales = checked.scales
    if scales is not None and scales.data_ptr() % SCALE_ALIGN:
        scales = scales.clone()
    return replace(checked, rows=aligned_rows(checked.rows), scales=scales)


def bring_combine_inputs(
    request: CombineRequest, checked: CheckedCombine, domain: Domain
) -> CheckedCombine:
    """Return a combine's inputs as its kernel takes them."""
    pairs = [
        (request.y, checked.rows),
        (request.topk_weights, checked.carried),
        (request.bias, checked.bias),
    ]
    if request.previous_event is not None and are_copied(pairs):
        checked = check_combine(request, domain.config, domain.num_local_experts, domain.device)
    bias = checked.bias
    return replace(
        checked,
        rows=aligned_rows(checked.rows),
        bias=None if bias is None else aligned_rows(bias),
    )


def are_copied(pairs: Iterable[tuple[torch.Tensor | None, torch.Tensor | None]]) -> bool:
    """Return whether some tensor, as given and as taken, is no longer the same memory."""
    return any(
        given is not None and taken is not None and given.data_ptr() != taken.data_ptr()
        for given, taken in pairs
    )
