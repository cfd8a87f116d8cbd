# SPDX-License-Identifier: Apache-2.0
"""The reference's low-latency operations: static shapes, weights at the source, rank masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from deepcomm import reference
from deepcomm.errors import InvalidArgument
from deepcomm.reference import ReferenceConfig
from deepcomm.types import CombineOutput, DispatchOutput, RecvLayout

# The example of deepcomm.slots, see test_reference.
CONFIG = ReferenceConfig(num_experts=4, num_ranks=2, ranks_per_node=2, max_tokens_per_rank=2)
A, B, C = 1.0, 2.0, 3.0
XS = [torch.tensor([[A], [B]]), torch.tensor([[C]])]
IDS = [torch.tensor([[0, 2], [1, 0]]), torch.tensor([[3, -1]])]
WEIGHTS = [torch.tensor([[0.5, 0.25], [0.125, 2.0]]), torch.tensor([[4.0, 9.0]])]


def dispatched(**options: Any) -> list[DispatchOutput]:
    outputs = reference.low_latency_dispatch(XS, IDS, WEIGHTS, config=CONFIG, **options)
    return [output for output in outputs if output is not None]


def echoed(outputs: list[DispatchOutput], **options: Any) -> list[CombineOutput]:
    """Combine what was received."""
    ys = [output.x for output in outputs]
    back = reference.low_latency_combine(ys, [output.handle for output in outputs], **options)
    return [output for output in back if output is not None]


def column(x: torch.Tensor) -> list[float]:
    return x[..., 0].tolist()


def test_low_latency_expert_padded_is_the_default() -> None:
    first, second = dispatched(zero_padding=True)
    assert column(first.x) == [[A, B, 0, 0], [B, 0, 0, 0]]
    assert column(second.x) == [[A, 0, 0, 0], [C, 0, 0, 0]]
    assert first.num_tokens_per_expert.tolist() == [2, 1]
    assert first.num_recv_tokens.item() == 3
    assert first.topk_weights.tolist() == [[0.5, 2.0, 0, 0], [0.125, 0, 0, 0]]
    assert (first.handle.low_latency, first.handle.num_rows) == (True, 8)


def test_low_latency_token_has_a_static_shape() -> None:
    first, second = dispatched(recv_layout=RecvLayout.TOKEN, zero_padding=True)
    assert column(first.x) == [A, B, 0, 0]
    assert column(second.x) == [A, C, 0, 0]
    assert second.topk_idx.tolist() == [[-1, 0], [1, -1], [-1, -1], [-1, -1]]
    assert second.num_recv_tokens.item() == 2
    assert (second.handle.num_rows, second.handle.capacity) == (4, None)
    assert not second.overflow.item()


def test_low_latency_combine_applies_weights_by_default() -> None:
    outputs = dispatched()
    # a: (.5 + .25) 1; b: (.125 + 2) 2; c: 4 * 3.
    assert [column(b.x) for b in echoed(outputs)] == [[0.75, 4.25], [12.0]]
    assert [column(b.x) for b in echoed(outputs, apply_weights=False)] == [[2, 4], [3]]


def test_low_latency_combine_weights_at_the_source_replace_the_recorded() -> None:
    ones_and_twos = [torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[2.0, 1.0]])]
    back = echoed(dispatched(), source_weights=ones_and_twos)
    assert [column(b.x) for b in back] == [[3 * A, 3 * B], [2 * C]]


def test_low_latency_combine_token_rows_are_summed_plainly() -> None:
    outputs = dispatched(recv_layout=RecvLayout.TOKEN)
    back = echoed(outputs, topk_weights=[output.topk_weights for output in outputs])
    assert [column(b.x) for b in back] == [[2 * A, B], [C]]
    assert back[0].topk_weights.tolist() == WEIGHTS[0].tolist()
    assert back[1].topk_weights.tolist() == [[4.0, 0.0]]


def test_low_latency_combine_needs_weights_to_apply() -> None:
    outputs = reference.low_latency_dispatch(XS, IDS, config=CONFIG)
    with pytest.raises(InvalidArgument, match="expected a dispatch with topk_weights, got none"):
        echoed(outputs)
    assert [column(b.x) for b in echoed(outputs, source_weights=WEIGHTS)] == [[0.75, 4.25], [12.0]]


@dataclass(frozen=True)
class MaskCase:
    """Destinations that each source still reaches, of 4 ranks on nodes {0, 1} and {2, 3}."""

    name: str
    masked: frozenset[int]
    reached: dict[int, set[int]]


MASK_CASES = [
    MaskCase("none", frozenset(), {s: {0, 1, 2, 3} for s in range(4)}),
    # Rank 1 forwards for rank 3 into node 0, so 3 -> 0 is cut with it; 0 reaches node 1 over 2.
    MaskCase("rank-1", frozenset({1}), {0: {0, 2, 3}, 2: {0, 2, 3}, 3: {2, 3}}),
    MaskCase("rank-2", frozenset({2}), {0: {0, 1}, 1: {0, 1, 3}, 3: {0, 1, 3}}),
    MaskCase("a-rail", frozenset({0, 2}), {1: {1, 3}, 3: {1, 3}}),
    MaskCase("a-node", frozenset({2, 3}), {0: {0, 1}, 1: {0, 1}}),
]
FOUR = ReferenceConfig(num_experts=4, num_ranks=4, ranks_per_node=2, max_tokens_per_rank=1)
FOUR_XS = [torch.tensor([[2.0**rank]]) for rank in range(4)]
FOUR_IDS = [torch.tensor([[0, 1, 2, 3]])] * 4  # every token to every rank
FOUR_WEIGHTS = [torch.tensor([[1.0, 2.0, 3.0, 4.0]])] * 4
LAYOUTS = [RecvLayout.TOKEN, RecvLayout.EXPERT_PADDED]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", MASK_CASES, ids=lambda case: case.name)
def test_mask_cuts_pairs_at_dispatch_and_combine(case: MaskCase, layout: RecvLayout) -> None:
    outputs = reference.low_latency_dispatch(
        FOUR_XS, FOUR_IDS, FOUR_WEIGHTS, config=FOUR, recv_layout=layout, masked=case.masked
    )
    assert {rank for rank, output in enumerate(outputs) if output is None} == case.masked
    for rank in case.reached:
        sources = [src for src, dsts in sorted(case.reached.items()) if rank in dsts]
        assert outputs[rank].num_recv_tokens.item() == len(sources)
        rows = outputs[rank].x.flatten()[: len(sources)]
        assert rows.tolist() == [2.0**src for src in sources]
    check_combine(case, outputs, masked_now=frozenset())
    check_combine(case, outputs, masked_now=case.masked)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", MASK_CASES, ids=lambda case: case.name)
def test_mask_set_after_dispatch_cuts_the_combine(case: MaskCase, layout: RecvLayout) -> None:
    outputs = reference.low_latency_dispatch(
        FOUR_XS, FOUR_IDS, FOUR_WEIGHTS, config=FOUR, recv_layout=layout
    )
    check_combine(case, outputs, masked_now=case.masked)


def check_combine(
    case: MaskCase, outputs: list[DispatchOutput | None], masked_now: frozenset[int]
) -> None:
    """Every rank d answers 10^d for each row: the digits of a sum tell who took part."""
    back = reference.low_latency_combine(
        [o and torch.full_like(o.x, 10.0**rank) for rank, o in enumerate(outputs)],
        [o and o.handle for o in outputs],
        topk_weights=[o and o.topk_weights for o in outputs],
        apply_weights=False,
        masked=masked_now,
    )
    for src, dsts in case.reached.items():
        assert back[src].x.item() == sum(10.0**dst for dst in dsts)
        assert back[src].topk_weights.tolist() == [
            [FOUR_WEIGHTS[0][0, dst].item() if dst in dsts else 0.0 for dst in range(4)]
        ]
    assert all(back[rank] is None for rank in masked_now)
