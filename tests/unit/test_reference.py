# SPDX-License-Identifier: Apache-2.0
"""The reference against examples worked out by hand; every number here can be checked on paper.

Most examples are the one of ``deepcomm.slots``: 2 ranks, 4 experts (0, 1 on rank 0; 2, 3 on
rank 1); rank 0 holds token a = 1 for experts {0, 2} and b = 2 for {1, 0}, rank 1 holds c = 3 for
{3}.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepcomm import reference
from deepcomm.errors import InvalidArgument
from deepcomm.reference import ReferenceConfig
from deepcomm.types import CombineOutput, DispatchOutput, RecvLayout, ScaledTensor

TOKEN, EXPERT, EXPERT_PADDED = RecvLayout.TOKEN, RecvLayout.EXPERT, RecvLayout.EXPERT_PADDED

CONFIG = ReferenceConfig(num_experts=4, num_ranks=2, ranks_per_node=2, max_tokens_per_rank=2)
A, B, C = 1.0, 2.0, 3.0
XS = [torch.tensor([[A], [B]]), torch.tensor([[C]])]
IDS = [torch.tensor([[0, 2], [1, 0]]), torch.tensor([[3, -1]])]
WEIGHTS = [torch.tensor([[0.5, 0.25], [0.125, 2.0]]), torch.tensor([[4.0, 9.0]])]


def example(layout: RecvLayout, **options: Any) -> list[DispatchOutput]:
    return reference.dispatch(XS, IDS, WEIGHTS, config=CONFIG, recv_layout=layout, **options)


def handles(outputs: list[DispatchOutput]) -> list[Any]:
    return [output.handle for output in outputs]


def column(x: torch.Tensor) -> list[float]:
    return x[..., 0].tolist()


def combined(
    rows: list[list[float]], outputs: list[DispatchOutput], **options: Any
) -> list[CombineOutput]:
    ys = [torch.tensor(r, dtype=torch.float32)[:, None] for r in rows]
    return reference.combine(ys, handles(outputs), **options)


# ---- Dispatch -------------------------------------------------------------------------------


def test_dispatch_token_layout() -> None:
    first, second = example(TOKEN)
    assert column(first.x) == [A, B]
    assert first.topk_idx.dtype == torch.int64
    assert first.topk_idx.tolist() == [[0, -1], [1, 0]]
    assert first.topk_weights.tolist() == [[0.5, 0.0], [0.125, 2.0]]
    assert first.num_tokens_per_expert.tolist() == [2, 1]
    assert (first.expert_offsets, first.scales) == (None, None)
    assert (first.num_recv_tokens.item(), first.overflow.item()) == (2, False)

    assert column(second.x) == [A, C]
    assert second.topk_idx.tolist() == [[-1, 0], [1, -1]]
    assert second.topk_weights.tolist() == [[0.0, 0.25], [4.0, 0.0]]
    assert second.num_tokens_per_expert.tolist() == [1, 1]


def test_dispatch_expert_layout_aligned() -> None:
    first, second = example(EXPERT, expert_alignment=2, zero_padding=True)
    assert column(first.x) == [A, B, B, 0]
    assert first.topk_weights.tolist() == [0.5, 2.0, 0.125, 0.0]
    assert first.expert_offsets.tolist() == [0, 2, 4]
    assert first.num_tokens_per_expert.tolist() == [2, 1]
    assert first.num_recv_tokens.item() == first.handle.num_rows == 4
    assert first.topk_idx is None

    assert column(second.x) == [A, 0, C, 0]
    assert second.topk_weights.tolist() == [0.25, 0.0, 4.0, 0.0]
    assert second.expert_offsets.tolist() == [0, 2, 4]
    assert second.num_tokens_per_expert.tolist() == [1, 1]


def test_dispatch_expert_layout_without_alignment_has_no_padding() -> None:
    first, second = example(EXPERT)
    assert (column(first.x), column(second.x)) == ([A, B, B], [A, C])
    assert first.expert_offsets.tolist() == [0, 2, 3]


def test_dispatch_expert_padded_layout() -> None:
    first, second = example(EXPERT_PADDED, zero_padding=True)
    assert column(first.x) == [[A, B, 0, 0], [B, 0, 0, 0]]
    assert column(second.x) == [[A, 0, 0, 0], [C, 0, 0, 0]]
    assert first.topk_weights.tolist() == [[0.5, 2.0, 0, 0], [0.125, 0, 0, 0]]
    assert first.num_tokens_per_expert.tolist() == [2, 1]
    assert first.num_recv_tokens.item() == 3
    assert first.handle.num_rows == 8
    assert first.expert_offsets is None


def test_dispatch_padding_is_poisoned_unless_zeroed() -> None:
    first, _ = example(EXPERT, expert_alignment=4)
    padding = first.x[[2, 3, 5, 6, 7]].view(torch.uint8)
    assert padding.numel() == 20
    assert (padding == 0xEE).all()


def test_dispatch_rows_of_an_expert_are_sorted_by_source_then_token() -> None:
    """Columns of topk_idx do not matter: only (source rank, token) orders the rows."""
    xs = [torch.tensor([[10.0], [11.0]]), torch.tensor([[20.0], [21.0]])]
    ids = [torch.tensor([[3, 0], [0, 3]]), torch.tensor([[0, 3], [3, 0]])]
    for layout in (EXPERT, TOKEN):
        first, _ = reference.dispatch(xs, ids, config=CONFIG, recv_layout=layout)
        assert column(first.x) == [10, 11, 20, 21]


def test_dispatch_ids_keep_their_dtype_and_handle_is_int32() -> None:
    ids = [i.int() for i in IDS]
    first, _ = reference.dispatch(XS, ids, config=CONFIG)
    assert first.topk_idx.dtype == torch.int32
    assert first.topk_weights is None
    assert first.handle.topk_weights is None
    handle = example(EXPERT, expert_alignment=2, capacities=[5, 5])[0].handle
    assert handle.topk_idx.dtype == torch.int32
    assert torch.equal(handle.topk_idx, ids[0])
    assert torch.equal(handle.topk_weights, WEIGHTS[0])
    assert (handle.recv_layout, handle.expert_alignment, handle.capacity) == (EXPERT, 2, 5)
    assert (handle.num_tokens, handle.num_rows, handle.low_latency) == (2, 5, False)


def test_dispatch_without_tokens_on_a_rank() -> None:
    xs = [torch.zeros(0, 1), XS[1]]
    ids = [torch.zeros(0, 2, dtype=torch.int64), IDS[1]]
    for layout in (TOKEN, EXPERT, EXPERT_PADDED):
        outputs = reference.dispatch(xs, ids, config=CONFIG, recv_layout=layout)
        assert [o.num_recv_tokens.item() for o in outputs] == [0, 1]
        back = reference.combine([o.x for o in outputs], handles(outputs))
        assert back[0].x.shape == (0, 1)
        assert column(back[1].x) == [C]


def test_dispatch_without_any_destination() -> None:
    ids = [torch.full((2, 2), -1), torch.full((1, 2), -1)]
    for layout in (TOKEN, EXPERT):
        outputs = reference.dispatch(XS, ids, config=CONFIG, recv_layout=layout)
        assert [o.x.shape for o in outputs] == [(0, 1), (0, 1)]
        back = reference.combine([o.x for o in outputs], handles(outputs), biases=[XS[0], None])
        assert [column(b.x) for b in back] == [[A, B], [0]]


def test_dispatch_cached_repeats_routing_layout_and_capacity() -> None:
    once = example(EXPERT, expert_alignment=2, capacities=[6, 6])
    doubled = [2 * x for x in XS]
    again = reference.dispatch(doubled, config=CONFIG, handles=handles(once), zero_padding=True)
    assert column(again[0].x) == [2 * A, 2 * B, 2 * B, 0, 0, 0]
    assert again[0].topk_weights is None
    assert again[0].handle.topk_weights is None
    assert again[0].handle.capacity == 6
    new_weights = [w + 1 for w in WEIGHTS]
    again = reference.dispatch(
        doubled, topk_weights=new_weights, config=CONFIG, handles=handles(once)
    )
    assert again[1].topk_weights.tolist() == [1.25, 0, 5, 0, 0, 0]


# ---- FP8 rows -------------------------------------------------------------------------------


def test_dispatch_quantized_rows_and_scale_strides() -> None:
    """Rows of constant value v: data 448, scale v / 448, in every layout's place."""
    xs = [x.repeat(1, 144) for x in XS]
    common: dict[str, Any] = {"config": CONFIG, "quantize": "fp8_e4m3", "zero_padding": True}
    token = reference.dispatch(xs, IDS, **common)[0]
    assert token.x.dtype == torch.float8_e4m3fn
    assert (token.x.float() == 448).all()
    assert (token.scales * 448).tolist() == [[A, A], [B, B]]
    assert token.scales.stride() == (2, 1)

    expert = reference.dispatch(xs, IDS, recv_layout=EXPERT, **common)[0]
    assert (expert.scales * 448).tolist() == [[A, A], [B, B], [B, B]]
    assert expert.scales.stride() == (1, 4)  # 3 rows, rounded up to 4

    padded = reference.dispatch(xs, IDS, recv_layout=EXPERT_PADDED, **common)[0]
    assert padded.scales.shape == (2, 4, 2)
    assert (padded.scales[..., 1] * 448).tolist() == [[A, B, 0, 0], [B, 0, 0, 0]]
    assert padded.scales.stride() == (8, 1, 4)


def test_dispatch_scaled_tensors_travel_unchanged() -> None:
    q = [reference.quantize_fp8(torch.randn(len(x), 640).mul(x), "ue8m0") for x in (XS[0], XS[1])]
    outputs = reference.dispatch(q, IDS, config=CONFIG, recv_layout=EXPERT)
    second = outputs[1]
    assert second.scales.dtype == torch.int32
    assert second.scales.shape == (2, 2)
    assert second.scales.stride() == (1, 4)
    assert torch.equal(second.scales, torch.stack([q[0].scales[0], q[1].scales[0]]))
    want = torch.stack([q[0].data[0].view(torch.uint8), q[1].data[0].view(torch.uint8)])
    assert torch.equal(second.x.view(torch.uint8), want)


def test_dispatch_given_and_asked_quantization_agree() -> None:
    xs = [torch.randn(len(x), 256) for x in XS]
    given = [reference.quantize_fp8(x) for x in xs]
    for want, got in zip(
        reference.dispatch(given, IDS, config=CONFIG),
        reference.dispatch(xs, IDS, config=CONFIG, quantize="fp8_e4m3"),
        strict=True,
    ):
        assert torch.equal(
            reference.dequantize_fp8(ScaledTensor(got.x, got.scales)),
            reference.dequantize_fp8(ScaledTensor(want.x, want.scales)),
        )


# ---- Capacity -------------------------------------------------------------------------------


def test_capacity_token_layout_drops_the_last_row() -> None:
    outputs = example(TOKEN, capacities=[1, 3], zero_padding=True)
    first, second = outputs
    assert column(first.x) == [A]
    assert first.num_tokens_per_expert.tolist() == [1, 0]
    assert (first.num_recv_tokens.item(), first.overflow.item()) == (1, True)
    assert column(second.x) == [A, C, 0]
    assert second.topk_idx.tolist() == [[-1, 0], [1, -1], [-1, -1]]
    assert second.topk_weights[2].tolist() == [0, 0]
    assert (second.num_recv_tokens.item(), second.overflow.item()) == (2, False)

    rows = [[10.0], [20.0, 30.0, torch.nan]]
    weights = [torch.tensor([[5.0, 6.0]]), torch.tensor([[7.0, 8.0]] * 3)]
    back = combined(rows, outputs, topk_weights=weights, biases=[torch.ones(2, 1), None])
    assert back[0].x[0].item() == 31.0
    assert back[0].x[1].isnan().all()
    assert column(back[1].x) == [30.0]
    carried = back[0].topk_weights
    assert carried[0].tolist() == [5.0, 8.0]
    assert carried[1].isnan().all()


def test_capacity_expert_layout_counts_padding_as_used() -> None:
    """Slots on rank 0: a b | b -, so capacity 3 loses padding only and 2 loses b's second row."""
    first, _ = example(EXPERT, expert_alignment=2, capacities=[3, 4])
    assert column(first.x) == [A, B, B]
    assert first.expert_offsets.tolist() == [0, 2, 3]
    assert (first.num_recv_tokens.item(), first.overflow.item()) == (3, False)

    outputs = example(EXPERT, expert_alignment=2, capacities=[2, 4])
    first = outputs[0]
    assert column(first.x) == [A, B]
    assert first.expert_offsets.tolist() == [0, 2, 2]
    assert first.num_tokens_per_expert.tolist() == [2, 0]
    assert (first.num_recv_tokens.item(), first.overflow.item()) == (2, True)

    weights = [torch.tensor([5.0, 6.0]), torch.tensor([7.0, 8.0, 9.0, 10.0])]
    back = combined([[1.0, 1.0], [1.0] * 4], outputs, topk_weights=weights)
    assert back[0].x[0].item() == 2.0
    assert back[0].x[1].isnan().all()
    carried = back[0].topk_weights
    assert carried[0].tolist() == [5.0, 7.0]
    assert carried[1, 0].isnan()
    assert carried[1, 1].item() == 6.0


def test_capacity_overflow_is_known_to_receiver_and_source_alone() -> None:
    config = ReferenceConfig(num_experts=3, num_ranks=3, ranks_per_node=3, max_tokens_per_rank=2)
    xs = [torch.zeros(1, 1)] * 3
    ids = [torch.tensor([[2]]), torch.tensor([[2]]), torch.tensor([[0]])]
    for layout in (TOKEN, EXPERT):
        outputs = reference.dispatch(
            xs, ids, config=config, recv_layout=layout, capacities=[1, 1, 1]
        )
        assert [o.overflow.item() for o in outputs] == [False, True, True]


def test_capacity_zero() -> None:
    outputs = example(TOKEN, capacities=[0, 2])
    assert outputs[0].x.shape == (0, 1)
    back = combined([[], [1.0, 1.0]], outputs)
    assert back[0].x.isnan().all()
    assert column(back[1].x) == [1.0]


# ---- Combine --------------------------------------------------------------------------------


def test_combine_token_layout_sums_over_ranks() -> None:
    back = combined([[10, 20], [300, 400]], example(TOKEN), biases=[None, torch.tensor([[0.5]])])
    assert [column(b.x) for b in back] == [[310, 20], [400.5]]
    assert back[0].topk_weights is None


def test_combine_expert_layouts_sum_over_experts() -> None:
    rows = [[10, 20, 30, torch.nan], [400, torch.nan, 500, torch.nan]]
    outputs = example(EXPERT, expert_alignment=2)
    # a: expert 0 -> 10, expert 2 -> 400; b: expert 0 -> 20, expert 1 -> 30; c: expert 3 -> 500.
    assert [column(b.x) for b in combined(rows, outputs)] == [[410, 50], [500]]
    weighted = combined(rows, outputs, apply_weights=True)
    # a: .5 * 10 + .25 * 400; b: 2 * 20 + .125 * 30; c: 4 * 500.
    assert [column(b.x) for b in weighted] == [[105, 43.75], [2000]]

    padded = example(EXPERT_PADDED)
    ys = [torch.full((2, 4, 1), torch.nan) for _ in range(2)]
    ys[0][0, :2, 0] = torch.tensor([10.0, 20.0])
    ys[0][1, 0] = 30
    ys[1][0, 0], ys[1][1, 0] = 400, 500
    back = reference.combine(ys, handles(padded), apply_weights=True)
    assert [column(b.x) for b in back] == [[105, 43.75], [2000]]


def test_combine_carries_weights_back() -> None:
    for layout in (TOKEN, EXPERT, EXPERT_PADDED):
        outputs = example(layout)
        weights = [o.topk_weights for o in outputs if o.topk_weights is not None]
        back = reference.combine([o.x for o in outputs], handles(outputs), topk_weights=weights)
        carried = [b.topk_weights for b in back if b.topk_weights is not None]
        assert carried[0].tolist() == WEIGHTS[0].tolist()
        assert carried[1].tolist() == [[4.0, 0.0]]  # nothing comes back for id -1


def test_combine_rejects_weights_it_cannot_apply() -> None:
    with pytest.raises(InvalidArgument, match="expected an expert layout, got TOKEN"):
        combined([[1, 1], [1, 1]], example(TOKEN), apply_weights=True)
    outputs = reference.dispatch(XS, IDS, config=CONFIG, recv_layout=EXPERT)
    with pytest.raises(InvalidArgument, match="dispatch with topk_weights, got none"):
        combined([[1] * 3, [1] * 2], outputs, apply_weights=True)


def test_combine_negative_zero_becomes_positive() -> None:
    for layout in (TOKEN, EXPERT):
        outputs = example(layout)
        ys = [torch.full_like(o.x, -0.0) for o in outputs]
        for output in reference.combine(ys, handles(outputs)):
            assert not output.x.signbit().any()
