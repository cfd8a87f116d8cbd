# SPDX-License-Identifier: Apache-2.0
"""Sums of the reference where their grouping, their order or a rounding shows in the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from deepcomm import reference
from deepcomm.reference import ReferenceConfig
from deepcomm.types import RecvLayout


@dataclass(frozen=True)
class OneToken:
    """One token of rank ``source`` that goes to all experts; ``values[rank][expert]`` come back.

    For ``TOKEN`` there is one value a rank.
    """

    values: list[list[float]]
    ranks_per_node: int
    layout: RecvLayout = RecvLayout.TOKEN
    dtype: torch.dtype = torch.bfloat16
    source: int = 0
    weights: list[float] | None = None
    bias: float = 0.0

    def combine(self) -> float:
        num_ranks, num_experts = len(self.values), sum(map(len, self.values))
        config = ReferenceConfig(num_experts, num_ranks, self.ranks_per_node, 1)
        num_tokens = [int(rank == self.source) for rank in range(num_ranks)]
        xs = [torch.zeros(n, 1, dtype=self.dtype) for n in num_tokens]
        # Descending ids: no sum may follow the columns of topk_idx.
        ids = [torch.arange(num_experts).flip(0).repeat(n, 1) for n in num_tokens]
        weights = torch.tensor(self.weights or [1.0] * num_experts).flip(0)
        outputs = reference.dispatch(
            xs,
            ids,
            [weights.repeat(n, 1) for n in num_tokens],
            config=config,
            recv_layout=self.layout,
        )
        back = reference.combine(
            [torch.tensor(v, dtype=self.dtype)[:, None] for v in self.values],
            [output.handle for output in outputs],
            biases=[torch.full_like(x, self.bias) for x in xs],
            apply_weights=self.weights is not None,
        )
        return back[self.source].x.item()


def one_token(values: list[list[float]], **options: Any) -> float:
    return OneToken(values, **options).combine()


def test_combine_bias_is_added_before_the_one_rounding() -> None:
    """256 + 1 = 257 needs 9 bits; bfloat16 has 8 and would round it to 256."""
    assert one_token([[256], [1]], ranks_per_node=2) == 256
    assert one_token([[256], [1]], ranks_per_node=2, bias=-256) == 1


@pytest.mark.parametrize("source", [0, 1])
def test_combine_rank_partial_is_rounded_also_at_home(source: int) -> None:
    values = [[256.0, 1.0], [0.0, 0.0]]
    got = one_token(values, ranks_per_node=2, layout=RecvLayout.EXPERT, source=source, bias=-256)
    assert got == 0


@pytest.mark.parametrize(("source", "want"), [(0, 1), (3, 1), (2, 1)])
def test_combine_node_partial_is_rounded_where_it_leaves_the_node(source: int, want: float) -> None:
    """Own node 257, other node 257 rounded to 256: 513 - 512 = 1 (2 unrounded, 0 both rounded)."""
    values = [[256.0], [1.0], [256.0], [1.0]]
    assert one_token(values, ranks_per_node=2, source=source, bias=-512) == want


def test_combine_one_rank_a_node_rounds_nothing_twice() -> None:
    values = [[256.0], [1.0], [256.0], [1.0]]
    assert one_token(values, ranks_per_node=1, bias=-512) == 2


BIG = 2.0**24  # float32 loses a 1 added to it


@pytest.mark.parametrize(
    ("values", "ranks_per_node", "want"),
    [
        # One node: ((BIG + 1) + 1) - BIG.
        ([[BIG], [1.0], [1.0], [0.0]], 4, 0),
        # Ascending ranks: ((1 + 1) + BIG) - BIG.
        ([[1.0], [1.0], [BIG], [0.0]], 4, 2),
        # Grouped by node: (BIG + 1) + (1 + 1), where a flat sum would lose each 1.
        ([[BIG], [1.0], [1.0], [1.0]], 2, 2),
        # Nodes ascending, each a rank: ((BIG + 1) + 1) + 1.
        ([[BIG], [1.0], [1.0], [1.0]], 1, 0),
        ([[1.0], [1.0], [1.0], [BIG]], 1, 4),  # 3 + BIG is a tie, to even
    ],
)
def test_combine_order_of_ranks_and_nodes(
    values: list[list[float]], ranks_per_node: int, want: float
) -> None:
    """The bias of -BIG comes last and uncovers what the sum lost; float32 wire, so no rounding."""
    got = one_token(values, ranks_per_node=ranks_per_node, dtype=torch.float32, bias=-BIG)
    assert got == want


@pytest.mark.parametrize(("values", "want"), [([BIG, 1, 1, 0], 0), ([1, 1, BIG, 0], 2)])
def test_combine_experts_ascend(values: list[float], want: float) -> None:
    got = one_token(
        [values], ranks_per_node=1, layout=RecvLayout.EXPERT, dtype=torch.float32, bias=-BIG
    )
    assert got == want


def test_combine_product_is_rounded_before_it_is_added() -> None:
    """(1 + u)^2 = 1 + 2u + u^2, u = 2^-12, rounds to 1 + 2u; a fused operation keeps u^2."""
    u = 2.0**-12
    got = one_token(
        [[-(1 + 2 * u), 1 + u]],
        ranks_per_node=1,
        layout=RecvLayout.EXPERT,
        dtype=torch.float32,
        weights=[1.0, 1 + u],
    )
    assert got == 0


def test_combine_float16_overflows_where_it_is_rounded() -> None:
    """65504 + 65504 is infinite in float16 at the rank, although the bias would bring it back."""
    values = [[65504.0, 65504.0]]
    got = one_token(
        values, ranks_per_node=1, layout=RecvLayout.EXPERT, dtype=torch.float16, bias=-65504.0
    )
    assert got == float("inf")
