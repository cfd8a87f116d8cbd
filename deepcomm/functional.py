# SPDX-License-Identifier: Apache-2.0
"""Differentiable dispatch and combine: the backward of one is the other, through the handle.

Both are linear maps between the tokens [T, H] of a rank and the rows it receives, and each is the
other's transpose. Their backward is an exchange too, hence collective:

- Every rank that runs backward runs it for every operation, also with T = 0 and also where neither
  the rows nor the weights require a gradient on this rank (the operations always enter the graph
  while gradients are enabled). What each rank must do is derive its loss from the results, if only
  by summing an empty tensor: autograd never reaches a result that is left unused.
- Autograd runs them in the reverse order of the forward, the same on all ranks.

Rows that hold no token (alignment padding, free rows of a block or of a capacity) are zeros in both
directions: what is unspecified would turn into NaN in the gradients of the weights that meet it.
A view of symmetric memory that autograd keeps for backward stays leased as long as it is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from deepcomm.errors import InternalError, InvalidArgument
from deepcomm.fp8 import dequantize_fp8
from deepcomm.types import CombineOutput, DispatchOutput, ScaledTensor

if TYPE_CHECKING:
    from deepcomm.buffer import Buffer
    from deepcomm.types import Handle, RecvLayout

__all__ = ["combine", "dispatch"]


def dispatch(
    buffer: Buffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    *,
    handle: Handle | None = None,
    recv_layout: RecvLayout | None = None,
    expert_alignment: int | None = None,
    quantize: Literal["fp8_e4m3"] | None = None,
    scale_format: Literal["fp32", "ue8m0"] = "fp32",
    num_recv_tokens: int | None = None,
    owned: bool = False,
) -> DispatchOutput:
    """Dispatch whose ``x`` and ``topk_weights`` carry gradients back to the tokens.

    Args:
        buffer: The buffer to exchange through.
        x: [T, H] in a dtype that the buffer takes. FP8 given as ``ScaledTensor`` has no gradient:
            use ``Buffer.dispatch`` for it.
        topk_idx: [T, K] expert ids, -1 = none; None with ``handle``.
        topk_weights: [T, K] router weights of any floating dtype; all ranks give them or none does.
        handle: Repeat this routing; layout, alignment and capacity come from it.
        recv_layout: As for ``Buffer.dispatch``.
        expert_alignment: As for ``Buffer.dispatch``.
        quantize: Send the rows as FP8; they are delivered in ``x``'s dtype again, and the gradient
            passes straight through the cast, unquantised.
        scale_format: As for ``Buffer.dispatch``.
        num_recv_tokens: Capacity, as for ``Buffer.dispatch``. The gradient of a token whose rows
            overflowed is NaN.
        owned: As for ``Buffer.dispatch``.

    Returns:
        What ``Buffer.dispatch`` returns, padding rows zeroed and ``scales`` always None.

    Raises:
        InvalidArgument: ``x`` is not a plain tensor; otherwise as ``Buffer.dispatch``. The errors
            of ``Buffer.combine`` may surface in backward.
    """
    if not isinstance(x, torch.Tensor):
        raise InvalidArgument(f"x: expected a Tensor (FP8 has no gradient), got {type(x).__name__}")
    call = _DispatchCall(
        buffer,
        handle,
        topk_idx,
        {
            "recv_layout": recv_layout,
            "expert_alignment": expert_alignment,
            "quantize": quantize,
            "scale_format": scale_format,
            "num_recv_tokens": num_recv_tokens,
            "owned": owned,
        },
    )
    return _run_dispatch(call, x, topk_weights)


def combine(
    buffer: Buffer,
    y: torch.Tensor,
    handle: Handle,
    *,
    row_weights: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> CombineOutput:
    """Combine whose results carry gradients back to the rows, the weights and the bias.

    Args:
        buffer: The buffer that dispatched.
        y: Expert outputs in the rows of ``handle``'s layout.
        handle: The routing, from ``dispatch``.
        row_weights: One factor a row, of ``y``'s shape without the last dimension: for the expert
            layouts the ``topk_weights`` that ``dispatch`` delivered, which is how the router
            learns. The products are FP32, rounded to ``y``'s dtype.
        topk_weights: float32, carried back to the tokens' ranks as by ``Buffer.combine``.
        bias: [T, H] in ``y``'s dtype, added last.

    Returns:
        What ``Buffer.combine`` returns.

    Raises:
        InvalidArgument: As ``Buffer.combine``. The errors of ``Buffer.dispatch`` may surface in
            backward.
    """
    if row_weights is not None:
        y = (y.float() * row_weights.unsqueeze(-1)).to(y.dtype)
    return _run_combine(buffer, handle, y, topk_weights, bias)


@dataclass(slots=True, eq=False)
class _DispatchCall:
    """One dispatch on its way through autograd: what is not differentiable, and what came out."""

    buffer: Buffer
    handle: Handle | None
    topk_idx: torch.Tensor | None
    options: dict[str, Any]
    output: DispatchOutput | None = None


def _run_dispatch(
    call: _DispatchCall, x: torch.Tensor, topk_weights: torch.Tensor | None
) -> DispatchOutput:
    """Run ``call`` as a node of the graph."""
    if topk_weights is not None:
        topk_weights = topk_weights.float()
    rows, row_weights = cast(
        "tuple[torch.Tensor, torch.Tensor | None]",
        _Dispatch.apply(_anchor(), call, x, topk_weights),  # type: ignore[no-untyped-call]
    )
    if call.output is None:
        raise InternalError("dispatch: autograd returned without running it")
    return replace(call.output, x=rows, topk_weights=row_weights, scales=None)


def _run_combine(
    buffer: Buffer,
    handle: Handle,
    y: torch.Tensor,
    topk_weights: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> CombineOutput:
    """Run a combine as a node of the graph."""
    x, carried = cast(
        "tuple[torch.Tensor, torch.Tensor | None]",
        _Combine.apply(  # type: ignore[no-untyped-call]
            _anchor(), (buffer, handle), y, topk_weights, bias
        ),
    )
    return CombineOutput(x, carried)


def _anchor() -> torch.Tensor | None:
    """Return an input that requires a gradient, so that no rank leaves the node out."""
    return torch.empty(0, requires_grad=True) if torch.is_grad_enabled() else None


class _Dispatch(torch.autograd.Function):
    """Tokens to rows; transposed: rows to tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor | None,
        call: _DispatchCall,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Dispatch, and remember only the handle."""
        del anchor
        output = call.buffer.dispatch(
            x.detach(),
            call.topk_idx,
            None if topk_weights is None else topk_weights.detach(),
            handle=call.handle,
            zero_padding=True,
            **call.options,
        )
        call.output = output
        ctx.buffer, ctx.handle = call.buffer, output.handle
        return _dequantize(output, x.dtype), output.topk_weights

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor | None
    ) -> tuple[None, None, torch.Tensor, torch.Tensor | None]:
        """Combine the gradients of the rows, and carry back those of their weights."""
        grad_rows, grad_weights = grads
        output = _run_combine(
            ctx.buffer, ctx.handle, _dense(grad_rows), _dense_or_none(grad_weights), None
        )
        return None, None, output.x, output.topk_weights


class _Combine(torch.autograd.Function):
    """Rows to tokens; transposed: tokens to rows."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor | None,
        route: tuple[Buffer, Handle],
        y: torch.Tensor,
        topk_weights: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Combine, and remember only the handle."""
        del anchor
        buffer, handle = route
        output = buffer.combine(
            _dense(y.detach()),
            handle,
            topk_weights=None if topk_weights is None else _dense(topk_weights.detach()),
            bias=None if bias is None else _dense(bias.detach()),
        )
        ctx.route, ctx.has_bias = route, bias is not None
        return output.x, output.topk_weights

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor | None
    ) -> tuple[None, None, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Dispatch the gradients of the tokens along the same routing."""
        grad_x, grad_weights = grads
        buffer, handle = ctx.route
        call = _DispatchCall(buffer, handle, None, {})
        output = _run_dispatch(call, _dense(grad_x), _dense_or_none(grad_weights))
        return None, None, output.x, output.topk_weights, grad_x if ctx.has_bias else None


def _dense(tensor: torch.Tensor | None) -> torch.Tensor:
    """Return ``tensor`` contiguous: gradients often come expanded, with strides of 0."""
    if tensor is None:
        raise InternalError("autograd: expected a gradient, got None")
    return tensor.contiguous()


def _dense_or_none(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _dequantize(output: DispatchOutput, dtype: torch.dtype) -> torch.Tensor:
    """Return the rows in ``dtype``, whatever they travelled in."""
    if output.scales is None:
        return output.x
    return dequantize_fp8(ScaledTensor(output.x, output.scales)).to(dtype)
