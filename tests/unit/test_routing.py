# SPDX-License-Identifier: Apache-2.0
"""Routing generators and traces: shapes, determinism, and the statistics each one promises."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from deepcomm.errors import InvalidArgument
from deepcomm.testing.routing import (
    RoutingShape,
    RoutingTrace,
    load_trace,
    make_routing,
    save_trace,
)

if TYPE_CHECKING:
    from pathlib import Path

V3 = RoutingShape(num_ranks=8, num_experts=256, num_topk=8)
SPECS = ["uniform", "zipf:1.2", "deepseek-v3", "hot"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("num_tokens", [0, 1, 300])
def test_routing_gives_distinct_ids_and_normalised_weights(spec: str, num_tokens: int) -> None:
    routed = make_routing(spec, V3, seed=3)(2, num_tokens)
    assert routed.topk_idx.dtype == torch.int64
    assert routed.topk_weights.dtype == torch.float32
    assert routed.topk_idx.shape == routed.topk_weights.shape == (num_tokens, 8)
    assert ((routed.topk_idx >= 0) & (routed.topk_idx < 256)).all()
    in_order = routed.topk_idx.sort(dim=1).values
    assert (in_order[:, 1:] > in_order[:, :-1]).all()
    torch.testing.assert_close(routed.topk_weights.sum(dim=1), torch.ones(num_tokens))
    assert (routed.topk_weights > 0).all()


@pytest.mark.parametrize("spec", ["uniform", "zipf:1.2", "deepseek-v3"])
def test_routing_is_a_function_of_seed_and_rank(spec: str) -> None:
    def ids(seed: int, rank: int) -> torch.Tensor:
        return make_routing(spec, V3, seed)(rank, 64).topk_idx

    assert torch.equal(ids(0, 1), ids(0, 1))
    assert not torch.equal(ids(0, 1), ids(0, 2))
    assert not torch.equal(ids(0, 1), ids(1, 1))


def test_uniform_reaches_the_expected_number_of_ranks() -> None:
    topk_idx = make_routing("uniform", V3)(0, 20_000).topk_idx
    ranks = topk_idx // 32
    distinct = sum((ranks == rank).any(dim=1).float().mean().item() for rank in range(8))
    assert distinct == pytest.approx(5.295, abs=0.03)  # 8 (1 - C(224, 8) / C(256, 8))


def test_zipf_popularity_is_shared_by_the_ranks_and_falls_with_the_exponent() -> None:
    def load(exponent: float, rank: int) -> torch.Tensor:
        routed = make_routing(f"zipf:{exponent}", V3, seed=5)(rank, 4000)
        return torch.bincount(routed.topk_idx.flatten(), minlength=256)

    assert load(1.2, 0).argmax() == load(1.2, 7).argmax()
    share = [load(s, 0).max().item() / 4000 for s in (0.0, 0.5, 1.0, 2.0)]
    assert share == sorted(share)
    assert share[0] < 0.06  # 8 / 256 of the tokens, and noise
    assert share[-1] > 0.95


def test_deepseek_v3_keeps_to_four_groups_of_eight() -> None:
    topk_idx = make_routing("deepseek-v3", V3)(0, 4000).topk_idx
    group = topk_idx // 32
    distinct = torch.stack([(group == g).any(dim=1) for g in range(8)]).sum(dim=0)
    assert distinct.max() <= 4
    assert 3.9 < distinct.float().mean() < 4.0
    assert torch.bincount(topk_idx.flatten(), minlength=256).min() > 0


def test_hot_sends_every_token_of_every_rank_to_the_same_experts() -> None:
    routing = make_routing("hot", RoutingShape(4, 16, 3))
    for rank in range(4):
        assert routing(rank, 5).topk_idx.tolist() == [[0, 1, 2]] * 5


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("nonsense", V3, "expected one of uniform"),
        ("uniform:3", V3, "expected one of uniform"),
        ("zipf", V3, "expected one of uniform"),
        ("zipf:x", V3, "zipf:S"),
        ("zipf:-1", V3, "zipf:S"),
        ("zipf:nan", V3, "zipf:S"),
        ("trace:/nonexistent.npz", V3, "cannot be read"),
        ("uniform", RoutingShape(4, 8, 9), "num_topk"),
        ("uniform", RoutingShape(4, 8, 0), "num_topk"),
        ("deepseek-v3", RoutingShape(4, 60, 8), "multiple of 8"),
        ("deepseek-v3", RoutingShape(4, 8, 2), "at least 16"),
        ("deepseek-v3", RoutingShape(4, 16, 9), "at most 8"),
    ],
)
def test_routing_refuses_what_it_cannot_make(spec: str, shape: RoutingShape, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make_routing(spec, shape)


def _trace(*, with_weights: bool) -> RoutingTrace:
    """Two steps, two ranks with 2 and 1, then 0 and 3 tokens, top-2 of 8."""
    steps = [
        [torch.tensor([[0, 1], [2, -1]]), torch.tensor([[4, 5]])],
        [torch.empty((0, 2), dtype=torch.int64), torch.tensor([[6, 7], [0, 2], [3, -1]])],
    ]
    weights = [[0.5 * (ids >= 0) for ids in step] for step in steps] if with_weights else None
    return RoutingTrace.from_steps(steps, num_experts=8, weights=weights)


@pytest.mark.parametrize("with_weights", [False, True])
def test_trace_survives_the_file(tmp_path: Path, with_weights: bool) -> None:
    trace = _trace(with_weights=with_weights)
    save_trace(tmp_path / "routing.trace", trace)
    loaded = load_trace(tmp_path / "routing.trace")
    assert (loaded.num_experts, loaded.num_steps, loaded.num_ranks, loaded.num_topk) == (8, 2, 2, 2)
    np.testing.assert_array_equal(loaded.num_tokens, [[2, 1], [0, 3]])
    np.testing.assert_array_equal(loaded.topk_idx, trace.topk_idx)
    if with_weights:
        np.testing.assert_array_equal(loaded.topk_weights, trace.topk_weights)
    else:
        assert loaded.topk_weights is None


def test_trace_replays_each_ranks_own_tokens_and_starts_again(tmp_path: Path) -> None:
    save_trace(tmp_path / "t.npz", _trace(with_weights=False))
    routing = make_routing(f"trace:{tmp_path / 't.npz'}", RoutingShape(2, 8, 2))
    assert routing(0, 3).topk_idx.tolist() == [[0, 1], [2, -1], [0, 1]]
    assert routing(1, 4).topk_idx.tolist() == [[4, 5], [6, 7], [0, 2], [3, -1]]
    assert routing(0, 2).topk_weights.tolist() == [[0.5, 0.5], [1.0, 0.0]]


def test_trace_of_other_ranks_is_dealt_out_whole(tmp_path: Path) -> None:
    save_trace(tmp_path / "t.npz", _trace(with_weights=True))
    routing = make_routing(f"trace:{tmp_path / 't.npz'}", RoutingShape(4, 8, 2))
    rows = [routing(rank, count).topk_idx for rank, count in enumerate([1, 2, 1, 2])]
    assert torch.equal(torch.cat(rows).int(), torch.from_numpy(_trace(with_weights=True).topk_idx))


def test_trace_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_trace(tmp_path / "t.npz", _trace(with_weights=False))
    with pytest.raises(InvalidArgument, match=r"16 experts.*got 8 experts"):
        make_routing(f"trace:{tmp_path / 't.npz'}", RoutingShape(2, 16, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"topk_idx": np.array([[9, 0]], np.int32)}, "expert ids"),
        ({"num_tokens": np.array([[2]])}, "one row"),
        ({"num_tokens": np.array([1])}, "steps, R"),
        ({"topk_weights": np.ones((1, 3), np.float32)}, "topk_weights"),
    ],
)
def test_trace_checks_its_fields(fields: dict[str, np.ndarray], message: str) -> None:
    good = {"num_tokens": np.array([[1]]), "topk_idx": np.array([[1, 0]], np.int32)}
    with pytest.raises(InvalidArgument, match=message):
        RoutingTrace(num_experts=8, **(good | fields))


def test_load_trace_refuses_a_foreign_file(tmp_path: Path) -> None:
    arrays = {
        "num_experts": np.int64(8),
        "num_tokens": np.ones((1, 1)),
        "topk_idx": np.ones((1, 1)),
    }
    np.savez(tmp_path / "other.npz", version=np.int64(7), **arrays)
    with pytest.raises(InvalidArgument, match="version 1, got 7"):
        load_trace(tmp_path / "other.npz")
    np.savez(tmp_path / "fields.npz", version=np.int64(1))
    with pytest.raises(InvalidArgument, match="num_experts"):
        load_trace(tmp_path / "fields.npz")
    (tmp_path / "text.npz").write_text("not a trace")
    with pytest.raises(InvalidArgument, match="cannot be read"):
        load_trace(tmp_path / "text.npz")
