# SPDX-License-Identifier: Apache-2.0
"""The oracle itself: payloads say where they come from, comparisons see what they must, no more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from deepcomm import reference
from deepcomm.errors import InvalidArgument
from deepcomm.reference import ReferenceConfig
from deepcomm.testing.oracle import (
    ROUTING_KINDS,
    assert_combine_equal,
    assert_dispatch_equal,
    encoded_payload,
    poison,
    random_payload,
    routed_tokens,
)
from deepcomm.types import CombineOutput, DispatchOutput, RecvLayout

CONFIG = ReferenceConfig(num_experts=8, num_ranks=4, ranks_per_node=2, max_tokens_per_rank=5)


def ids_of(kind: Any, rank: int = 0, num_topk: int = 3, seed: int = 0) -> torch.Tensor:
    return routed_tokens(kind, CONFIG, rank, 50, num_topk, seed=seed).topk_idx


# ---- Payloads and routings --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_encoded_payload_names_source_token_place_and_round(dtype: torch.dtype) -> None:
    x = encoded_payload(0x0203, 0x0405 + 1, 20, dtype=dtype, round_idx=7)
    assert (x.shape, x.dtype) == ((0x0406, 20), dtype)
    head = [0x03, 0x02, 0x05, 0x04, 0x00]
    assert x[0x0405].tolist() == [*head, 0, 0, 7, *head, 1, 0, 7, *head[:4]]


def test_encoded_payload_rows_are_distinct() -> None:
    rows = torch.cat([encoded_payload(rank, 300, 8) for rank in range(3)])
    assert len(rows.unique(dim=0)) == 900


def test_random_payload_is_a_function_of_rank_and_seed() -> None:
    x = random_payload(1, 40, 64, seed=2)
    assert torch.equal(x, random_payload(1, 40, 64, seed=2))
    assert not torch.equal(x, random_payload(2, 40, 64, seed=2))
    assert not torch.equal(x, random_payload(1, 40, 64, seed=3))
    zeros = x[x == 0]
    assert 0 < zeros.signbit().sum() < len(zeros)


@pytest.mark.parametrize("kind", ROUTING_KINDS)
def test_routed_tokens_are_distinct_and_ignored_weights_are_not_zero(kind: Any) -> None:
    routed = routed_tokens(kind, CONFIG, 1, 50, 3, seed=1)
    assert (routed.topk_idx.dtype, routed.topk_weights.dtype) == (torch.int64, torch.float32)
    for row in routed.topk_idx.tolist():
        chosen = [expert for expert in row if expert >= 0]
        assert len(set(chosen)) == len(chosen)
        assert all(expert < 8 for expert in chosen)
    assert (routed.topk_weights[routed.topk_idx < 0] == 7).all()


def test_routed_tokens_kinds() -> None:
    assert (ids_of("uniform") >= 0).all()
    share = (ids_of("sparse") < 0).float().mean(0)
    assert ((share > 0.1) & (share < 0.8)).all()
    for rank in range(4):
        ids = ids_of("one_expert", rank)
        assert ids[ids >= 0].tolist() == [4] * 50
    # Experts 4..7 belong to node 1, where the tokens of rank 1 (node 0) go, and 0..3 to node 0.
    assert set(ids_of("one_node", 1).flatten().tolist()) == {4, 5, 6, 7}
    assert set(ids_of("one_node", 2, num_topk=6).flatten().tolist()) == {-1, 0, 1, 2, 3}
    assert (ids_of("none") == -1).all()
    with pytest.raises(InvalidArgument, match="got 'random'"):
        ids_of("random")


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint8, torch.int32, torch.int64],
)
def test_poison_sets_every_byte_of_a_strided_view_alone(dtype: torch.dtype) -> None:
    whole = torch.zeros(4, 6, dtype=torch.uint8).repeat_interleave(dtype.itemsize, 1).view(dtype)
    assert poison(whole[1:3, ::2]).shape == (2, 3)
    poisoned = (whole.view(torch.uint8) == 0xEE).view(4, 6, -1).all(-1)
    assert poisoned.sum() == 6
    assert poisoned[1:3, ::2].all()
    assert (whole.view(torch.uint8) == 0).sum() == 18 * dtype.itemsize


def test_poison_bool() -> None:
    assert poison(torch.zeros((), dtype=torch.bool)).item() is True


# ---- Comparison -------------------------------------------------------------------------------


def outputs_of(layout: RecvLayout, **options: Any) -> DispatchOutput:
    """Return what rank 1 receives of a fixed dispatch of FP8 rows."""
    routed = [routed_tokens("sparse", CONFIG, rank, 5, 3) for rank in range(4)]
    return reference.dispatch(
        [random_payload(rank, 5, 272) for rank in range(4)],
        [r.topk_idx for r in routed],
        [r.topk_weights for r in routed],
        config=CONFIG,
        recv_layout=layout,
        expert_alignment=8,
        quantize="fp8_e4m3",
        **options,
    )[1]


@pytest.mark.parametrize("layout", RecvLayout)
@pytest.mark.parametrize("capacity", [None, 9, 40])
def test_assert_dispatch_accepts_any_padding_unless_zeroed(
    layout: RecvLayout, capacity: int | None
) -> None:
    poisoned = outputs_of(layout, capacities=[capacity] * 4)
    zeroed = outputs_of(layout, capacities=[capacity] * 4, zero_padding=True)
    assert_dispatch_equal(poisoned, zeroed)
    assert_dispatch_equal(zeroed, poisoned)
    assert_dispatch_equal(zeroed, zeroed, zero_padding=True)
    has_padding = not torch.equal(poisoned.x.view(torch.uint8), zeroed.x.view(torch.uint8))
    assert has_padding == (layout is not RecvLayout.TOKEN or capacity == 40)
    if has_padding:
        with pytest.raises(AssertionError, match=r"x: .* elements differ"):
            assert_dispatch_equal(poisoned, zeroed, zero_padding=True)


def changed(tensor: torch.Tensor, index: tuple[int, ...] = ()) -> torch.Tensor:
    """Return a copy, strides included, with the lowest bit of one element flipped."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    copy.copy_(tensor)
    bits = copy if copy.dtype == torch.bool else copy.view(getattr(torch, INT[copy.element_size()]))
    bits[index] = ~bits[index] if bits.dtype == torch.bool else bits[index] ^ 1
    return copy


INT = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}
FIELDS = [
    (RecvLayout.TOKEN, "x", (3, 271)),
    (RecvLayout.TOKEN, "scales", (3, 2)),
    (RecvLayout.TOKEN, "topk_idx", (0, 2)),
    (RecvLayout.TOKEN, "topk_weights", (8, 1)),
    (RecvLayout.TOKEN, "topk_weights", (39, 0)),  # padding rows hold 0
    (RecvLayout.TOKEN, "topk_idx", (39, 0)),  # and -1
    (RecvLayout.TOKEN, "num_recv_tokens", ()),
    (RecvLayout.TOKEN, "overflow", ()),
    (RecvLayout.EXPERT, "x", (8, 0)),
    (RecvLayout.EXPERT, "scales", (0, 1)),
    (RecvLayout.EXPERT, "topk_weights", (7,)),
    (RecvLayout.EXPERT, "num_tokens_per_expert", (1,)),
    (RecvLayout.EXPERT, "expert_offsets", (2,)),
    (RecvLayout.EXPERT_PADDED, "x", (1, 0, 100)),
    (RecvLayout.EXPERT_PADDED, "scales", (1, 0, 0)),
    (RecvLayout.EXPERT_PADDED, "topk_weights", (1, 19)),
]


@pytest.mark.parametrize(("layout", "field", "index"), FIELDS)
def test_assert_dispatch_sees_one_bit(
    layout: RecvLayout, field: str, index: tuple[int, ...]
) -> None:
    want = outputs_of(layout, capacities=[40] * 4)
    got = replace(want, **{field: changed(getattr(want, field), index)})
    place = str(list(index)).replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(AssertionError, match=f"dispatch, rank 1, {field}: 1 of .* at {place}: "):
        assert_dispatch_equal(got, want, rank=1)


def test_assert_dispatch_message_has_both_values() -> None:
    want = outputs_of(RecvLayout.TOKEN)
    got = replace(want, num_recv_tokens=want.num_recv_tokens + 1)
    num_rows = len(want.x)
    with pytest.raises(
        AssertionError,
        match=rf"expected {num_rows} \(0x{num_rows:08x}\), got {num_rows + 1} \(0x",
    ):
        assert_dispatch_equal(got, want)


def test_assert_dispatch_sees_shape_dtype_strides_and_absence() -> None:
    want = outputs_of(RecvLayout.EXPERT)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"x": want.x[1:]}, r"x: expected torch.float8_e4m3fn \[\d+, 272\], got .*\[\d+, 272\]"),
        ({"x": want.x.view(torch.uint8)}, "x: expected torch.float8_e4m3fn .*, got torch.uint8"),
        ({"scales": want.scales.contiguous()}, r"scales: expected strides \(1, \d+\), got \(3, 1"),
        ({"scales": None}, "scales: expected torch.float32 .*, got None"),
        ({"topk_idx": want.num_recv_tokens}, "topk_idx: expected None, got torch.int32"),
        ({"handle": replace(want.handle, num_rows=1)}, r"handle.num_rows: expected \d+, got 1"),
        (
            {"handle": replace(want.handle, topk_idx=changed(want.handle.topk_idx, (4, 1)))},
            r"handle.topk_idx: 1 of 15 elements differ, first at \[4, 1\]",
        ),
    ]
    for fields, message in wrong:
        with pytest.raises(AssertionError, match=message):
            assert_dispatch_equal(replace(want, **fields), want)


def test_assert_combine_is_bitwise_but_for_nan() -> None:
    quiet, other = torch.tensor([0x7FC0, 0x3F80], dtype=torch.int16), torch.tensor([-1, 0x3F80])
    want = CombineOutput(quiet.view(torch.bfloat16), torch.tensor([0.0, torch.nan]))
    assert_combine_equal(replace(want, x=other.to(torch.int16).view(torch.bfloat16)), want)
    with pytest.raises(AssertionError, match=r"rank 3, topk_weights: 1 of 2 .* at \[0\]: .* -0.0"):
        assert_combine_equal(
            replace(want, topk_weights=torch.tensor([-0.0, torch.nan])), want, rank=3
        )
    with pytest.raises(AssertionError, match=r"x: .* at \[1\]: expected 1.0 \(0x3f80\), got nan"):
        assert_combine_equal(replace(want, x=want.x[[0, 0]]), want)
    with pytest.raises(AssertionError, match=r"topk_weights: expected torch\.float32"):
        assert_combine_equal(replace(want, topk_weights=None), want)
