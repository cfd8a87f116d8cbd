# SPDX-License-Identifier: Apache-2.0
"""Properties of the reference on random routings, and a second, plainer implementation of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from deepcomm import reference
from deepcomm.reference import ReferenceConfig
from deepcomm.testing.oracle import (
    ROUTING_KINDS,
    RoutingKind,
    assert_dispatch_equal,
    encoded_payload,
    random_payload,
    routed_tokens,
)
from deepcomm.types import DispatchOutput, RecvLayout

HIDDEN = 16
MAX_TOKENS = 6


@dataclass(frozen=True)
class Scenario:
    """What all ranks bring to one dispatch."""

    config: ReferenceConfig
    num_tokens: tuple[int, ...]
    num_topk: int
    kind: RoutingKind
    seed: int

    def ids_and_weights(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        routed = [
            routed_tokens(self.kind, self.config, rank, n, self.num_topk, seed=self.seed)
            for rank, n in enumerate(self.num_tokens)
        ]
        return [r.topk_idx for r in routed], [r.topk_weights for r in routed]

    def encoded(self) -> list[torch.Tensor]:
        """Return bytes as float32, so that sums of a few are exact in any order."""
        return [
            encoded_payload(rank, n, HIDDEN, dtype=torch.float32)
            for rank, n in enumerate(self.num_tokens)
        ]

    def random(self) -> list[torch.Tensor]:
        return [
            random_payload(rank, n, HIDDEN, seed=self.seed)
            for rank, n in enumerate(self.num_tokens)
        ]

    def dispatch(self, xs: list[torch.Tensor], **options: Any) -> list[DispatchOutput]:
        return reference.dispatch(xs, *self.ids_and_weights(), config=self.config, **options)


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    num_nodes, ranks_per_node, num_local = (draw(st.integers(1, 3)) for _ in range(3))
    num_ranks = num_nodes * ranks_per_node
    num_experts = num_ranks * num_local
    return Scenario(
        config=ReferenceConfig(num_experts, num_ranks, ranks_per_node, MAX_TOKENS),
        num_tokens=tuple(draw(st.integers(0, MAX_TOKENS)) for _ in range(num_ranks)),
        num_topk=draw(st.integers(1, min(4, num_experts))),
        kind=draw(st.sampled_from(ROUTING_KINDS)),
        seed=draw(st.integers(0, 1000)),
    )


some = settings(max_examples=25, deadline=None, derandomize=True)


def handles(outputs: list[DispatchOutput]) -> list[Any]:
    return [output.handle for output in outputs]


@some
@given(scenarios())
def test_combine_of_token_rows_counts_distinct_ranks(scenario: Scenario) -> None:
    xs = scenario.encoded()
    outputs = scenario.dispatch(xs)
    back = reference.combine([o.x for o in outputs], handles(outputs))
    for x, ids, output in zip(xs, scenario.ids_and_weights()[0], back, strict=True):
        ranks = torch.where(ids < 0, -1, ids // scenario.config.num_local_experts)
        num_ranks = torch.tensor([len(set(row) - {-1}) for row in ranks.tolist()])
        assert torch.equal(output.x, x * num_ranks.reshape(-1, 1))


@some
@given(scenarios(), st.sampled_from([RecvLayout.EXPERT, RecvLayout.EXPERT_PADDED]))
def test_combine_of_expert_rows_counts_experts(scenario: Scenario, layout: RecvLayout) -> None:
    xs = scenario.encoded()
    outputs = scenario.dispatch(xs, recv_layout=layout, expert_alignment=4)
    back = reference.combine(
        [o.x for o in outputs], handles(outputs), topk_weights=[o.topk_weights for o in outputs]
    )
    for x, ids, weights, output in zip(xs, *scenario.ids_and_weights(), back, strict=True):
        assert torch.equal(output.x, x * (ids >= 0).sum(1, keepdim=True))
        assert torch.equal(output.topk_weights, weights.masked_fill(ids < 0, 0))


@some
@given(scenarios(), st.sampled_from(RecvLayout), st.sampled_from([None, 3, 100]))
def test_dispatch_cached_equals_dispatch(
    scenario: Scenario, layout: RecvLayout, capacity: int | None
) -> None:
    options: dict[str, Any] = {"recv_layout": layout, "zero_padding": True}
    options["capacities"] = [capacity] * scenario.config.num_ranks
    xs, (_, weights) = scenario.random(), scenario.ids_and_weights()
    first = scenario.dispatch(scenario.encoded(), **options)
    again = reference.dispatch(
        xs, None, weights, config=scenario.config, handles=handles(first), zero_padding=True
    )
    for rank, expected in enumerate(scenario.dispatch(xs, **options)):
        assert_dispatch_equal(again[rank], expected, zero_padding=True, rank=rank)


Pair = tuple[int, int, int]  # source rank, token, column of topk_idx


def pairs_of_expert(scenario: Scenario, expert: int) -> list[Pair]:
    """Return in order the pairs that choose ``expert``, by walking over every id."""
    return [
        (source, token, k)
        for source, ids in enumerate(scenario.ids_and_weights()[0])
        for token, row in enumerate(ids.tolist())
        for k, chosen in enumerate(row)
        if chosen == expert
    ]


@some
@given(scenarios(), st.sampled_from([1, 2, 8]))
def test_dispatch_expert_rows_by_walking(scenario: Scenario, alignment: int) -> None:
    xs, (_, weights) = scenario.random(), scenario.ids_and_weights()
    num_local = scenario.config.num_local_experts
    outputs = scenario.dispatch(
        xs, recv_layout=RecvLayout.EXPERT, expert_alignment=alignment, zero_padding=True
    )
    for rank, output in enumerate(outputs):
        rows, row_weights, counts, offsets = [], [], [], [0]
        for local in range(num_local):
            pairs = pairs_of_expert(scenario, rank * num_local + local)
            rows += [xs[source][token] for source, token, _ in pairs]
            row_weights += [weights[source][token, k].item() for source, token, k in pairs]
            counts.append(len(pairs))
            while len(rows) % alignment:
                rows.append(torch.zeros(HIDDEN))
                row_weights.append(0.0)
            offsets.append(len(rows))
        assert output.x.tolist() == [row.tolist() for row in rows]
        assert output.topk_weights.tolist() == row_weights
        assert output.num_tokens_per_expert.tolist() == counts
        assert output.expert_offsets.tolist() == offsets


@some
@given(scenarios())
def test_dispatch_layouts_agree(scenario: Scenario) -> None:
    """The rows of an expert are the same in every layout, weights included."""
    xs = scenario.random()
    by_layout = [scenario.dispatch(xs, recv_layout=layout) for layout in RecvLayout]
    for token, expert, padded in zip(*by_layout, strict=True):
        assert torch.equal(token.num_tokens_per_expert, expert.num_tokens_per_expert)
        assert torch.equal(token.num_tokens_per_expert, padded.num_tokens_per_expert)
        for local, count in enumerate(token.num_tokens_per_expert.tolist()):
            chosen = token.topk_idx == local
            first = int(expert.expert_offsets[local])
            rows = expert.x[first : first + count]
            assert torch.equal(rows, padded.x[local, :count])
            assert torch.equal(rows, token.x[chosen.any(1)])
            weights = expert.topk_weights[first : first + count]
            assert torch.equal(weights, padded.topk_weights[local, :count])
            assert torch.equal(weights, token.topk_weights[chosen])


@some
@given(scenarios(), st.integers(0, 8))
def test_capacity_delivers_a_prefix(scenario: Scenario, capacity: int) -> None:
    """What fits is as without a capacity; lost tokens, and they alone, combine to NaN."""
    xs = scenario.random()
    exact = scenario.dispatch(xs)
    outputs = scenario.dispatch(xs, capacities=[capacity] * scenario.config.num_ranks)
    for full, output in zip(exact, outputs, strict=True):
        num_recv = min(capacity, len(full.x))
        assert output.num_recv_tokens.item() == num_recv
        assert torch.equal(output.x[:num_recv], full.x[:num_recv])
        assert torch.equal(output.topk_idx[:num_recv], full.topk_idx[:num_recv])
        assert (output.topk_idx[num_recv:] == -1).all()
    got = reference.combine([o.x for o in outputs], handles(outputs))
    want = reference.combine([o.x for o in exact], handles(exact))
    for rank, (g, w) in enumerate(zip(got, want, strict=True)):
        lost = g.x.isnan().all(1)
        assert torch.equal(g.x[~lost], w.x[~lost])
        dropped_here = len(exact[rank].x) > capacity
        assert outputs[rank].overflow.item() == (dropped_here or bool(lost.any()))


@pytest.mark.parametrize("layout", [RecvLayout.TOKEN, RecvLayout.EXPERT_PADDED])
def test_low_latency_holds_the_rows_of_high_throughput(layout: RecvLayout) -> None:
    scenario = Scenario(ReferenceConfig(8, 4, 2, MAX_TOKENS), (6, 0, 3, 5), 3, "sparse", 1)
    xs = scenario.random()
    common: dict[str, Any] = {"recv_layout": layout, "quantize": "fp8_e4m3"}
    fast = reference.low_latency_dispatch(
        xs, *scenario.ids_and_weights(), config=scenario.config, **common
    )
    for exact, static in zip(scenario.dispatch(xs, **common), fast, strict=True):
        num_rows = exact.x.shape[0]
        same = exact.x.view(torch.uint8) == static.x[:num_rows].view(torch.uint8)
        assert same.all()
        assert torch.equal(
            exact.scales.view(torch.int32), static.scales[:num_rows].view(torch.int32)
        )
        assert torch.equal(exact.topk_weights, static.topk_weights[:num_rows])
