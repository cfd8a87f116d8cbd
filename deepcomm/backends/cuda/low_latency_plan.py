# SPDX-License-Identifier: Apache-2.0
"""What low-latency operations with arguments alike share: found out once, then looked up.

Checks, sizes and kernels depend on what arguments are, not on what is in them: dtypes, shapes,
strides. Arguments that are seen for the first time are checked, and a plan is kept for those alike.
Arguments that had to be copied for the kernels are planned each time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from deepcomm._C import kernels
from deepcomm.backends.cuda.low_latency_slots import (
    ANNOUNCE,
    BOTH,
    BOTH_KEEPING,
    MAX_BLOCKS_PER_SM,
    PASS_ON,
    RECEIVE,
    SEND,
    Launches,
    Slots,
)
from deepcomm.backends.cuda.low_latency_status import pack_signature
from deepcomm.backends.cuda.low_latency_tensors import (
    ALIGN,
    Outputs,
    address_of,
    aligned,
    empty,
    row_kind,
    wire_of,
)
from deepcomm.backends.cuda.low_latency_words import Record, Sizes, Words
from deepcomm.checks import check_combine, check_dispatch, check_length
from deepcomm.errors import InvalidArgument
from deepcomm.types import RecvLayout, ScaledTensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from deepcomm.backends.base import CombineRequest, DispatchRequest
    from deepcomm.backends.cuda.functions import LowLatencyFunctions
    from deepcomm.backends.cuda.low_latency_carrier import SlotCarrier
    from deepcomm.backends.cuda.runtime import Runtime
    from deepcomm.checks import CheckedCombine, CheckedDispatch
    from deepcomm.config import BufferConfig

__all__ = ["CombinePlan", "Context", "DispatchPlan", "Inputs", "prepare_repeat"]

MAX_PLANS = 1024
"""Kept by a buffer: all numbers of tokens of a decoding step, in a few variants."""

TURN_WORDS = 4  # layout::LowLatencyTurn

Inputs: TypeAlias = tuple[Any, ...]
"""Tensors, None for those not given."""


def no_plans() -> kernels.LowLatencyPlans:
    """Return a table for those of one operation."""
    return kernels.LowLatencyPlans(MAX_PLANS)


@dataclass(frozen=True, slots=True)
class Context:
    """What operations of one buffer share.

    Attributes:
        carrier: Where a network is between the nodes.
        num_sms: SMs that kernels may count on.
        no_overflow: False, for outputs that never overflow.
        dispatches: Plans of those seen so far.
        combines: Likewise.
    """

    slots: Slots
    carrier: SlotCarrier | None
    functions: LowLatencyFunctions
    config: BufferConfig
    sizes: Sizes
    buffer_id: bytes
    num_sms: int
    no_overflow: torch.Tensor
    dispatches: kernels.LowLatencyPlans = field(default_factory=no_plans)
    combines: kernels.LowLatencyPlans = field(default_factory=no_plans)


def prepare_repeat(plan: DispatchPlan | CombinePlan, runtime: Runtime) -> None:
    """Let native code repeat an operation that has been launched as a whole."""
    if plan.repeat.launch is None:
        plan.repeat.launch = runtime.prepare_launch(*plan.launches[BOTH], plan.params)


def check_on_timeout(context: Context, on_timeout: str) -> None:
    """Raise InvalidArgument where a late peer cannot be masked."""
    if context.carrier is not None and on_timeout == "mask":
        raise InvalidArgument(
            "on_timeout: expected 'raise' where a network carries the rails, got 'mask': it waits "
            "for all of its ranks"
        )


def are_same(given: Inputs, used: Inputs) -> bool:
    """Return whether nothing had to be copied."""
    return [address_of(tensor) for tensor in given] == [address_of(tensor) for tensor in used]


# ---- dispatch


@dataclass(frozen=True, slots=True, eq=False)
class DispatchPlan:
    """A dispatch, but for its addresses.

    Attributes:
        params: Of the kernels.
        launches: Function and grid by phase.
        repeat: What native code repeats it by.
    """

    params: kernels.LowLatencyDispatchParams
    launches: Launches
    outputs: Outputs
    num_tokens: int
    repeat: kernels.LowLatencyDispatchRepeat

    @staticmethod
    def of(context: Context, request: DispatchRequest) -> tuple[DispatchPlan, Inputs]:
        """Return the plan of a request, and rows, scales, ids and weights as kernels take them.

        The plan's params hold the addresses of these.

        Raises:
            InvalidArgument: The first argument that is wrong.
        """
        given = given_inputs(request)
        others = (request.out, request.expert_token_stats, request.wait_us_stats)
        options = (
            isinstance(request.x, ScaledTensor),
            request.recv_layout,
            request.quantize,
            request.scale_format,
            bool(request.zero_padding),
            request.on_timeout,
        )
        plan: DispatchPlan | None = context.dispatches.find(given, others, options)
        if plan is not None:
            return plan, given
        checked = _check_dispatch(context, request)
        rows = aligned(checked.rows)
        inputs = (rows, checked.scales, checked.topk_idx, checked.topk_weights)
        plan = _plan_dispatch(context, request, checked, rows)
        plan.params.set_inputs(*inputs)
        if are_same(given, inputs):
            context.dispatches.keep(plan, plan.params, given, others, options)
        return plan, inputs


def given_inputs(request: DispatchRequest) -> Inputs:
    """Return rows, scales, ids and weights as the user gave them."""
    x = request.x
    if isinstance(x, ScaledTensor):
        return x.data, x.scales, request.topk_idx, request.topk_weights
    return x, None, request.topk_idx, request.topk_weights


def _check_dispatch(context: Context, request: DispatchRequest) -> CheckedDispatch:
    config = context.config
    checked = check_dispatch(request, config, context.sizes.device)
    check_on_timeout(context, request.on_timeout)
    if checked.scale_format == "none" and checked.rows.dtype != torch.bfloat16:
        raise InvalidArgument(
            f"x: expected bfloat16 [T, {config.hidden}] or a ScaledTensor, "
            f"got {str(checked.rows.dtype).removeprefix('torch.')}"
        )
    if checked.num_tokens > config.max_tokens_per_rank:
        raise InvalidArgument(
            f"x: expected at most max_tokens_per_rank = {config.max_tokens_per_rank} "
            f"tokens, got {checked.num_tokens}"
        )
    check_length("expert_token_stats", request.expert_token_stats, context.sizes.num_local_experts)
    check_length("wait_us_stats", request.wait_us_stats, context.sizes.num_ranks)
    return checked


def _plan_dispatch(
    context: Context, request: DispatchRequest, checked: CheckedDispatch, rows: torch.Tensor
) -> DispatchPlan:
    sizes, num_tokens = context.sizes, checked.num_tokens
    words = Words.of(checked, sizes)
    # Rows if all ranks have as many tokens, in whole waves: further blocks would hold up those
    # that have rows, and the last one, which sends the header, has an SM without many of them.
    num_rows = max(1, num_tokens * sizes.num_ranks)
    num_receiving = -(-num_rows // context.num_sms) * context.num_sms
    num_wanted = {SEND: num_tokens + 1, RECEIVE: num_receiving, BOTH: num_receiving}
    functions = context.functions.dispatch[row_kind(checked)]
    outputs = Outputs.of(request, checked, sizes, words)
    params = _fill_dispatch(context, request, checked, rows)
    params.base.record_map = words.record
    # Of several blocks an SM that come as room is made for them, those with a token to send would
    # lie together.
    params.admits_next = num_receiving <= context.num_sms
    strides = outputs.scale_strides
    params.scale_block_stride, params.scale_row_stride, params.scale_word_stride = strides
    return DispatchPlan(
        params=params,
        launches=Launches(functions, num_wanted, context.num_sms),
        outputs=outputs,
        num_tokens=num_tokens,
        repeat=kernels.LowLatencyDispatchRepeat(
            params=params,
            allocate=outputs.allocate,
            offsets=words.offsets,
            map=words,
            num_tokens=num_tokens,
        ),
    )


def _fill_dispatch(
    context: Context, request: DispatchRequest, checked: CheckedDispatch, rows: torch.Tensor
) -> kernels.LowLatencyDispatchParams:
    params = context.slots.dispatch_params.copy()
    base = params.base
    if checked.scale_format != "none":
        base.map = context.slots.fp8_map
    is_token = checked.recv_layout is RecvLayout.TOKEN
    base.signature = pack_signature(
        recv_layout=is_token,
        rows=wire_of(row_kind(checked)),
        topk_weights=checked.topk_weights is not None,
        K=checked.num_topk,
    )
    base.num_topk = checked.num_topk
    base.num_tokens = checked.num_tokens
    base.mask_late = request.on_timeout == "mask"
    params.topk_idx_is_int64 = checked.id_dtype == torch.int64
    params.is_token_layout = is_token
    params.x_stride = rows.stride(0) * rows.element_size()
    if checked.scales is not None:
        params.scale_stride = checked.scales.stride(0)
    if request.expert_token_stats is not None:
        params.stats_is_int64 = request.expert_token_stats.dtype == torch.int64
    return params


# ---- combine


@dataclass(frozen=True, slots=True, eq=False)
class CombinePlan:
    """A combine, but for its addresses.

    Attributes:
        params: Of the kernels.
        launches: Function and grid by phase.
        x: Allocates the output.
        topk_weights: Allocates the weights that come back, None where none do.
        turn: Allocates what the send phase tells the receive phase.
        has_extras: Whether there is more to read or write than rows.
        repeat: What native code repeats it by, where there is not.
    """

    params: kernels.LowLatencyCombineParams
    launches: Launches
    x: Callable[[], torch.Tensor]
    topk_weights: Callable[[], torch.Tensor] | None
    turn: Callable[[], torch.Tensor]
    has_extras: bool
    repeat: kernels.LowLatencyCombineRepeat

    @staticmethod
    def of(context: Context, request: CombineRequest) -> tuple[CombinePlan, Inputs]:
        """Return the plan of a request, and rows, weights and bias as kernels take them.

        The plan's params hold the address of the rows.

        Raises:
            InvalidArgument: The first argument that is wrong.
        """
        given = (request.y, request.topk_weights, request.bias)
        others = (request.out, request.wait_us_stats)
        options = (words_of(request.handle), bool(request.apply_weights), request.on_timeout)
        plan: CombinePlan | None = context.combines.find(given, others, options)
        if plan is not None:
            return plan, given
        checked = _check_combine(context, request)
        bias = None if checked.bias is None else aligned(checked.bias)
        weights = checked.carried if checked.source_weights is None else checked.source_weights
        inputs = (aligned(checked.rows), weights, bias)
        plan = _plan_combine(context, request, checked, inputs)
        plan.params.set_inputs(inputs[0])
        if are_same(given, inputs):
            context.combines.keep(plan, plan.params, given, others, options)
        return plan, inputs


def words_of(handle: Any) -> Words | None:
    """Return what handles alike share; None for what is no handle of this mode."""
    try:
        words: Words = handle.records.map
    except AttributeError:
        return None
    return words


def _check_combine(context: Context, request: CombineRequest) -> CheckedCombine:
    sizes = context.sizes
    checked = check_combine(request, context.config, sizes.num_local_experts, sizes.device)
    check_on_timeout(context, request.on_timeout)
    check_length("wait_us_stats", request.wait_us_stats, context.sizes.num_ranks)
    if checked.rows.dtype != torch.bfloat16:
        dtype = str(checked.rows.dtype).removeprefix("torch.")
        raise InvalidArgument(f"y: expected bfloat16, got {dtype}")
    if request.out is not None and request.out.data_ptr() % ALIGN:
        raise InvalidArgument(f"out: expected it to begin at a multiple of {ALIGN} bytes")
    Record.of(request.handle, context.buffer_id)
    return checked


def _plan_combine(
    context: Context, request: CombineRequest, checked: CheckedCombine, inputs: Inputs
) -> CombinePlan:
    handle, sizes = request.handle, context.sizes
    words: Words = handle.records.map
    num_tokens = handle.num_tokens
    num_parts = sizes.row_parts  # a block each
    num_passed_on = (sizes.num_nodes - 1) * sizes.max_tokens * num_parts
    num_wanted = {
        SEND: sizes.block_rows * num_parts,
        RECEIVE: max(num_tokens * num_parts, num_passed_on),
        BOTH: sizes.block_rows * num_parts,
        ANNOUNCE: num_tokens,
        PASS_ON: num_passed_on,
    }
    functions = context.functions.combine
    if BOTH in functions:
        num_blocks = context.num_sms * min(functions[BOTH].blocks_per_sm, MAX_BLOCKS_PER_SM)
        has_many = num_tokens * num_parts * sizes.num_ranks > num_blocks
        functions = {**functions, BOTH: functions[BOTH_KEEPING if has_many else BOTH]}
    device = sizes.device
    carried = None
    if checked.carried is not None:
        carried = empty((num_tokens, words.num_topk), torch.float32, device)
    params = _fill_combine(context, request, checked, inputs)
    x = empty((num_tokens, sizes.hidden), torch.bfloat16, device)
    return CombinePlan(
        params=params,
        launches=Launches(functions, num_wanted, context.num_sms),
        x=x,
        topk_weights=carried,
        turn=empty((TURN_WORDS,), torch.int32, device),
        has_extras=any(tensor is not None for tensor in (*inputs[1:], request.wait_us_stats)),
        repeat=kernels.LowLatencyCombineRepeat(params=params, allocate=x, offsets=words.offsets),
    )


def _fill_combine(
    context: Context, request: CombineRequest, checked: CheckedCombine, inputs: Inputs
) -> kernels.LowLatencyCombineParams:
    rows, weights, bias = inputs
    words: Words = request.handle.records.map
    params = context.slots.combine_params.copy()
    base = params.base
    is_token = request.handle.recv_layout is RecvLayout.TOKEN
    base.signature = pack_signature(
        operation=1,
        recv_layout=is_token,
        topk_weights=weights is not None,
        apply_weights=checked.apply_weights,
        K=words.num_topk,
    )
    base.num_topk = words.num_topk
    base.num_tokens = request.handle.num_tokens
    base.mask_late = request.on_timeout == "mask"
    base.record_map = words.record
    params.apply_weights = checked.apply_weights
    params.is_token_layout = is_token
    params.y_stride = rows.stride(0) * rows.element_size()
    if bias is not None:
        params.bias_stride = bias.stride(0) * bias.element_size()
    return params
