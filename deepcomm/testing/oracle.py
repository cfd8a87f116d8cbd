# SPDX-License-Identifier: Apache-2.0
"""What tests of every backend share: payloads, routings, poison, and comparison with the reference.

Payloads and routings are pure functions of their arguments, so that any rank can compute what any
other one sent and run ``deepcomm.reference`` on it. Comparison is bitwise, except that all NaNs are
equal; it covers every field whose value is specified and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import torch

from deepcomm.errors import InvalidArgument
from deepcomm.testing.routing import RoutedTokens, RoutingShape, make_routing
from deepcomm.types import RecvLayout

if TYPE_CHECKING:
    from deepcomm.slots import ReferenceConfig
    from deepcomm.types import CombineOutput, DispatchOutput, Handle

__all__ = [
    "ROUTING_KINDS",
    "RoutingKind",
    "assert_combine_equal",
    "assert_dispatch_equal",
    "encoded_payload",
    "poison",
    "random_payload",
    "routed_tokens",
]

RoutingKind = Literal["uniform", "sparse", "one_expert", "one_node", "none"]

ROUTING_KINDS: tuple[RoutingKind, ...] = get_args(RoutingKind)
"""What ``routed_tokens`` makes, to parametrize tests with."""

POISON_BYTE = 0xEE
SPARSE_SHARE = 0.4
UNUSED_WEIGHT = 7.0

_TensorT = TypeVar("_TensorT", bound=torch.Tensor)


# ---- Inputs ---------------------------------------------------------------------------------


def encoded_payload(
    rank: int,
    num_tokens: int,
    hidden: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    round_idx: int = 0,
) -> torch.Tensor:
    """Return rows [T, H] whose every 8 elements name their source, token, place and round.

    The 8 elements are bytes, which bfloat16 holds exactly: rank (2, low first), token (3), index of
    the 8 elements in the row (2), round (1).

    Args:
        rank: Source rank, < 2 ** 16.
        num_tokens: T, at most 2 ** 24.
        hidden: H.
        dtype: Type of the elements.
        round_idx: Tells the rows of repeated operations apart, modulo 256.
    """
    num_groups = -(-hidden // 8)
    token_t = torch.arange(num_tokens)[:, None].expand(num_tokens, num_groups)
    group_c = torch.arange(num_groups).expand(num_tokens, num_groups)
    rank_tc, round_tc = torch.full_like(token_t, rank), torch.full_like(token_t, round_idx)
    words = ((rank_tc, 2), (token_t, 3), (group_c, 2), (round_tc, 1))
    columns = [word >> (8 * i) & 0xFF for word, num_bytes in words for i in range(num_bytes)]
    return torch.stack(columns, dim=-1).flatten(1)[:, :hidden].to(dtype)


def random_payload(
    rank: int, num_tokens: int, hidden: int, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> torch.Tensor:
    """Return normal rows [T, H] of magnitudes 2^-6 to 2^6 a row, with some zeros of either sign."""
    generator = torch.Generator().manual_seed(seed * 100_003 + rank)
    x = torch.randn(num_tokens, hidden, generator=generator)
    x *= torch.randint(-6, 7, (num_tokens, 1), generator=generator).float().exp2()
    is_zero = torch.rand(num_tokens, hidden, generator=generator) < 0.02
    return torch.where(is_zero, torch.zeros_like(x).copysign(x), x).to(dtype)


def routed_tokens(
    kind: RoutingKind,
    config: ReferenceConfig,
    rank: int,
    num_tokens: int,
    num_topk: int,
    *,
    seed: int = 0,
) -> RoutedTokens:
    """Return what ``rank``'s tokens choose.

    Args:
        kind: "uniform": experts at random. "sparse": the same with many -1, in any column.
            "one_expert": all tokens of all ranks to one expert alone. "one_node": each rank's
            tokens to experts of the node after its own. "none": -1 only.
        config: Sizes.
        rank: Source rank.
        num_tokens: T.
        num_topk: K.
        seed: Seed of everything random.

    Returns:
        Ids int64 [T, K] and weights float32 [T, K], a number to be ignored where the id is -1.

    Raises:
        InvalidArgument: ``kind`` is unknown.
    """
    if kind not in ROUTING_KINDS:
        raise InvalidArgument(f"kind: expected one of {ROUTING_KINDS}, got {kind!r}")
    shape = RoutingShape(config.num_ranks, config.num_experts, num_topk)
    tokens = make_routing("uniform", shape, seed)(rank, num_tokens)
    ids, weights = tokens.topk_idx, tokens.topk_weights
    generator = torch.Generator().manual_seed(seed * 100_003 + rank)
    if kind == "sparse":
        ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < SPARSE_SHARE, -1)
    elif kind == "one_expert":
        ids = torch.full_like(ids, -1)
        ids[:, -1] = config.num_experts // 2
    elif kind == "one_node":
        ids = _experts_of_next_node(config, rank, ids, generator)
    elif kind == "none":
        ids = torch.full_like(ids, -1)
    return RoutedTokens(ids, weights.masked_fill(ids < 0, UNUSED_WEIGHT))


def _experts_of_next_node(
    config: ReferenceConfig, rank: int, ids: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Return as many distinct experts of that node as it has and K allows; -1 in the rest."""
    num_nodes = config.num_ranks // config.ranks_per_node
    node_experts = config.num_experts // num_nodes
    node = (rank // config.ranks_per_node + 1) % num_nodes
    order = torch.rand(len(ids), node_experts, generator=generator).argsort(1)
    chosen = torch.full_like(ids, -1)
    num_chosen = min(ids.shape[1], node_experts)
    chosen[:, :num_chosen] = order[:, :num_chosen] + node * node_experts
    return chosen


def poison(tensor: _TensorT) -> _TensorT:
    """Set every byte of ``tensor``, of any strides, to 0xEE (bool: to True); return it."""
    if tensor.dtype == torch.bool:
        tensor.fill_(True)
        return tensor
    as_int = _bits(tensor)
    num_bits = 8 * as_int.element_size()
    pattern = int.from_bytes(bytes([POISON_BYTE]) * as_int.element_size(), "little")
    as_int.fill_(pattern if as_int.dtype == torch.uint8 else pattern - (1 << num_bits))
    return tensor


# ---- Comparison -----------------------------------------------------------------------------


def assert_dispatch_equal(
    actual: DispatchOutput,
    expected: DispatchOutput,
    *,
    zero_padding: bool = False,
    rank: int | None = None,
) -> None:
    """Compare a dispatch with the reference's: values, shapes, dtypes, strides of scales, handle.

    Args:
        actual: What the backend gave, on any device.
        expected: What ``deepcomm.reference`` gave for the same rank.
        zero_padding: Compare rows that hold no token as well; both sides were asked for zeros.
        rank: For the message.

    Raises:
        AssertionError: They differ; names the field, the rank, the first index and both values.
    """
    where = "dispatch" if rank is None else f"dispatch, rank {rank}"
    _assert_handle_equal(actual.handle, expected.handle, f"{where}, handle")
    for field in ("num_recv_tokens", "overflow", "num_tokens_per_expert", "expert_offsets"):
        _assert_equal(getattr(actual, field), getattr(expected, field), f"{where}, {field}")
    rows = None if zero_padding else _rows_with_tokens(expected)
    _assert_equal(actual.x, expected.x, f"{where}, x", rows)
    _assert_equal(actual.scales, expected.scales, f"{where}, scales", rows)
    _assert_strides_equal(actual.scales, expected.scales, f"{where}, scales")
    for field in ("topk_idx", "topk_weights"):
        _assert_equal(getattr(actual, field), getattr(expected, field), f"{where}, {field}")


def assert_combine_equal(
    actual: CombineOutput, expected: CombineOutput, *, rank: int | None = None
) -> None:
    """Compare a combine with the reference's, bit for bit.

    Raises:
        AssertionError: They differ; names the field, the rank, the first index and both values.
    """
    where = "combine" if rank is None else f"combine, rank {rank}"
    _assert_equal(actual.x, expected.x, f"{where}, x")
    _assert_equal(actual.topk_weights, expected.topk_weights, f"{where}, topk_weights")


def _rows_with_tokens(expected: DispatchOutput) -> torch.Tensor:
    """Return bool [N], or [L, M] for ``EXPERT_PADDED``: the rows that are specified."""
    shape = expected.x.shape[:-1]
    counts = expected.num_tokens_per_expert
    if expected.handle.recv_layout is RecvLayout.EXPERT_PADDED:
        return torch.arange(shape[1]) < counts[:, None]
    row_n = torch.arange(shape[0])
    if expected.expert_offsets is None:
        return row_n < expected.num_recv_tokens
    first_l = expected.expert_offsets[:-1, None]
    return ((row_n >= first_l) & (row_n < first_l + counts[:, None])).any(0)


def _assert_handle_equal(actual: Handle, expected: Handle, where: str) -> None:
    names = ("recv_layout", "expert_alignment", "capacity", "num_tokens", "num_rows", "low_latency")
    for name in names:
        got, want = getattr(actual, name), getattr(expected, name)
        if got != want:
            raise AssertionError(f"{where}.{name}: expected {want}, got {got}")
    _assert_equal(actual.topk_idx, expected.topk_idx, f"{where}.topk_idx")
    _assert_equal(actual.topk_weights, expected.topk_weights, f"{where}.topk_weights")


def _assert_equal(
    actual: torch.Tensor | None,
    expected: torch.Tensor | None,
    where: str,
    rows: torch.Tensor | None = None,
) -> None:
    """Compare tensors; ``rows`` masks the leading axes."""
    if actual is None or expected is None:
        if actual is not expected:
            raise AssertionError(f"{where}: expected {_kind(expected)}, got {_kind(actual)}")
        return
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        raise AssertionError(f"{where}: expected {_kind(expected)}, got {_kind(actual)}")
    actual = _to_host(actual.detach())
    differs = (_bits(actual) != _bits(expected)) & ~(_is_nan(actual) & _is_nan(expected))
    if rows is not None:
        differs &= rows[..., None]
    if not differs.any():
        return
    index = tuple(int(i) for i in differs.nonzero()[0])
    got, want = (_value(tensor, index) for tensor in (actual, expected))
    raise AssertionError(
        f"{where}: {int(differs.sum())} of {differs.numel()} elements differ, first at "
        f"{list(index)}: expected {want}, got {got}"
    )


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a result to the host, without the driver's lock while it is not there yet.

    A copy to pageable memory holds it for as long as the stream waits: for other ranks of this
    process, it may be, and these for the lock.
    """
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    return tensor.cpu()


def _assert_strides_equal(
    actual: torch.Tensor | None, expected: torch.Tensor | None, where: str
) -> None:
    """Compare the strides that matter: those of axes longer than 1."""
    if actual is None or expected is None or expected.numel() == 0:
        return
    long_axes = [axis for axis, size in enumerate(expected.shape) if size > 1]
    if any(actual.stride(axis) != expected.stride(axis) for axis in long_axes):
        raise AssertionError(
            f"{where}: expected strides {expected.stride()}, got {actual.stride()} "
            f"for shape {list(expected.shape)}"
        )


def _kind(tensor: torch.Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """View the elements as integers of their size; keeps the strides."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()])


def _is_nan(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=torch.bool)
    return tensor.float().isnan()


def _value(tensor: torch.Tensor, index: tuple[int, ...]) -> str:
    """Return an element as number and bits."""
    element = tensor[index]
    num_digits = 2 * tensor.element_size()
    bits = int(_bits(element)) % (1 << 4 * num_digits)
    return f"{element.item()} (0x{bits:0{num_digits}x})"
