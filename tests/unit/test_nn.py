# SPDX-License-Identifier: Apache-2.0
"""Gate and experts, which need no buffer; the layer itself: tests/collective/test_functional.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepcomm import InvalidArgument, RecvLayout
from deepcomm.nn import (
    ExpertParallelMoE,
    Experts,
    Gate,
    GateConfig,
    MoEConfig,
    Routing,
    SwiGLU,
    swiglu,
)


def gate_of(keys: list[float], config: GateConfig, bias: list[float] | None = None) -> Gate:
    """Return a gate whose scores for the token (1,) are sigmoid(``keys``)."""
    gate = Gate(config, hidden=1)
    with torch.no_grad():
        gate.weight.copy_(torch.tensor(keys).unsqueeze(1))
        if bias is not None:
            gate.bias.copy_(torch.tensor(bias))
    return gate


def choose(gate: Gate) -> tuple[set[int], Routing]:
    routing = gate(torch.ones(1, 1))
    return set(routing.topk_idx[0].tolist()), routing


def test_gate_by_hand() -> None:
    # 4 groups of 2; sums of the two best sigmoids: 0.98, 1.23, 1.00, 1.46; best 2 groups: 1 and 3.
    keys = [3.0, -4.0, 0.5, 0.4, 0.0, 0.0, 1.0, 1.0]
    config = GateConfig(8, 3, num_groups=4, num_chosen_groups=2, weight_scale=2.5)
    chosen, routing = choose(gate_of(keys, config))
    assert chosen == {2, 6, 7}  # expert 0 has the best key of all, but lies in a weak group
    scores = torch.tensor(keys).sigmoid()[routing.topk_idx[0]]
    torch.testing.assert_close(routing.topk_weights[0], 2.5 * scores / scores.sum())
    chosen, _ = choose(gate_of(keys, GateConfig(8, 3)))
    assert chosen == {0, 6, 7}


def test_bias_decides_the_selection_but_not_the_weights() -> None:
    keys = [2.0, 1.0, 0.0, -1.0]
    chosen, routing = choose(gate_of(keys, GateConfig(4, 2), bias=[0.0, -1.0, 0.0, 1.0]))
    assert chosen == {0, 3}
    scores = torch.tensor(keys).sigmoid()[routing.topk_idx[0]]
    torch.testing.assert_close(routing.topk_weights[0], scores / scores.sum())


def test_single_expert_groups_and_more_than_one_token() -> None:
    config = GateConfig(6, 2, num_groups=6, num_chosen_groups=2)
    gate = Gate(config, hidden=8)
    routing = gate(torch.randn(50, 8))
    assert routing.topk_idx.shape == routing.topk_weights.shape == (50, 2)
    assert (routing.topk_idx[:, 0] != routing.topk_idx[:, 1]).all()
    unlimited = Gate(GateConfig(6, 2), hidden=8)
    unlimited.load_state_dict(gate.state_dict())
    x = torch.randn(50, 8)
    assert torch.equal(gate(x).topk_idx.sort(1)[0], unlimited(x).topk_idx.sort(1)[0])


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((8, 2, 3), "num_groups"),
        ((8, 2, 0), "num_groups"),
        ((8, 2, 4, 5), "num_chosen_groups"),
        ((8, 5, 4, 2), "num_topk"),
        ((8, 0), "num_topk"),
    ],
)
def test_gate_config_names_the_wrong_field(arguments: tuple[int, ...], name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}: expected"):
        GateConfig(*arguments)


def test_load_counts_training_tokens_and_bias_moves_against_it() -> None:
    gate = Gate(GateConfig(4, 2), hidden=8)
    x = torch.randn(40, 8)
    idx = torch.cat([gate(x).topk_idx, gate(x).topk_idx])
    assert torch.equal(gate.load, torch.bincount(idx.flatten(), minlength=4))
    gate.eval()(x)
    assert gate.load.sum() == 160

    gate.update_bias(torch.tensor([10, 0, 5, 5]), rate=0.01)
    torch.testing.assert_close(gate.bias, torch.tensor([-0.01, 0.01, 0.0, 0.0]))
    assert not gate.load.any()


def test_bias_updates_balance_a_skewed_gate() -> None:
    torch.manual_seed(0)
    gate = Gate(GateConfig(8, 2, num_groups=2, num_chosen_groups=1), hidden=8)
    gate.weight.data[0] += 0.5
    x = torch.randn(500, 8) + 0.5

    def imbalance() -> float:
        gate.load.zero_()
        gate(x)
        return (gate.load.max() / gate.load.float().mean()).item()

    before = imbalance()
    for _ in range(300):
        gate(x)
        gate.update_bias(gate.load, rate=0.005)
    assert before > 1.7
    assert imbalance() < 1.15


def test_bias_and_scores_stay_fp32_in_a_bfloat16_model() -> None:
    gate = Gate(GateConfig(4, 2), hidden=8).bfloat16()
    assert (gate.weight.dtype, gate.bias.dtype) == (torch.bfloat16, torch.float32)
    routing = gate(torch.randn(5, 8, dtype=torch.bfloat16))
    assert routing.topk_weights.dtype == torch.float32
    assert routing.topk_idx.dtype == torch.int64


def test_weights_differentiate_through_the_scores() -> None:
    gate = Gate(GateConfig(6, 2), hidden=4).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    x.requires_grad_()
    factors = torch.randn(3, 2)
    (gate(x).topk_weights * factors).sum().backward()
    assert x.grad.abs().sum() > 0
    assert gate.weight.grad.abs().sum() > 0
    idx = gate(x).topk_idx
    never = torch.ones(6, dtype=torch.bool)
    never[idx.flatten()] = False
    assert not gate.weight.grad[never].any()


def test_gate_without_tokens() -> None:
    routing = Gate(GateConfig(4, 2, num_groups=2), hidden=8)(torch.zeros(0, 8))
    assert routing.topk_idx.shape == routing.topk_weights.shape == (0, 2)


def test_experts_have_the_same_weights_on_any_rank() -> None:
    whole = Experts(range(8), 16, 12, seed=3)
    parts = [Experts(range(first, first + 2), 16, 12, seed=3) for first in (0, 2, 4, 6)]
    assert torch.equal(whole.gate_up, torch.cat([part.gate_up for part in parts]))
    assert torch.equal(whole.down, torch.cat([part.down for part in parts]))
    assert not torch.equal(whole.gate_up[0], whole.gate_up[1])
    assert not torch.equal(whole.gate_up, Experts(range(8), 16, 12, seed=4).gate_up)
    assert whole.gate_up.std().item() == pytest.approx(16**-0.5, rel=0.05)


def test_swiglu_is_its_formula() -> None:
    module = SwiGLU(6, 10)
    x = torch.randn(3, 6)
    gate, up = x @ module.gate_up[:10].T, x @ module.gate_up[10:].T
    torch.testing.assert_close(module(x), (gate * gate.sigmoid() * up) @ module.down.T)


@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 0, 0), (4, 4, 4)])
def test_experts_agree_on_groups_and_blocks(counts: tuple[int, ...]) -> None:
    experts = Experts(range(3), 8, 4, seed=0)
    alignment, block = 4, 5
    x = torch.randn(sum(counts), 8)
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + -(-count // alignment) * alignment)
    rows = torch.zeros(starts[-1] + 2, 8)  # two free rows of a capacity at the end
    blocks = torch.zeros(3, block, 8)
    want = []
    for expert_idx, tokens in enumerate(x.split(counts)):
        rows[starts[expert_idx] :][: len(tokens)] = tokens
        blocks[expert_idx, : len(tokens)] = tokens
        want.append(swiglu(tokens, experts.gate_up[expert_idx], experts.down[expert_idx]))
    grouped = experts(SimpleNamespace(x=rows, expert_offsets=torch.tensor(starts)))
    padded = experts(SimpleNamespace(x=blocks, expert_offsets=None))
    assert grouped.shape == rows.shape
    assert padded.shape == blocks.shape
    for expert_idx, tokens in enumerate(want):
        for got in (grouped[starts[expert_idx] :], padded[expert_idx]):
            torch.testing.assert_close(got[: len(tokens)], tokens)
    assert not grouped[starts[-1] :].any()
    grouped.sum().backward()
    assert experts.down.grad is not None  # zeros for an expert without rows, not None
    assert [bool(grad.any()) for grad in experts.down.grad] == [count > 0 for count in counts]


def test_experts_refuse_token_rows() -> None:
    received = SimpleNamespace(x=torch.zeros(2, 8), expert_offsets=None)
    with pytest.raises(InvalidArgument, match="recv_layout: expected EXPERT or EXPERT_PADDED"):
        Experts(range(2), 8, 4, seed=0)(received)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": GateConfig(4, 2)}, "num_experts: expected 8"),
        ({"gate": GateConfig(8, 4)}, "num_topk: expected at most 3"),
        ({"hidden": 24}, "hidden: expected 16"),
        ({"recv_layout": RecvLayout.TOKEN}, "recv_layout: expected EXPERT or EXPERT_PADDED"),
    ],
)
def test_layer_that_does_not_fit_the_buffer_is_refused(
    change: dict[str, Any], message: str
) -> None:
    config = SimpleNamespace(num_experts=8, num_topk=3, hidden=16)
    buffer = SimpleNamespace(config=config, num_ranks=2, rank=0)
    fields = {"gate": GateConfig(8, 3), "hidden": 16, "intermediate": 4} | change
    with pytest.raises(InvalidArgument, match=message):
        ExpertParallelMoE(buffer, MoEConfig(**fields))


def test_layer_owns_its_rank_s_experts_and_shares_the_rest() -> None:
    config = SimpleNamespace(num_experts=8, num_topk=3, hidden=16)
    moe_config = MoEConfig(GateConfig(8, 3), 16, 4, shared_intermediate=6)
    buffer = SimpleNamespace(config=config, num_ranks=4, rank=2)
    moe = ExpertParallelMoE(buffer, moe_config)
    want = Experts(range(4, 6), 16, 4, moe_config.seed)
    assert torch.equal(moe.experts.gate_up, want.gate_up)
    names = {name for name, _ in moe.named_parameters()}
    experts = {"experts.gate_up", "experts.down"}
    assert names == experts | {"gate.weight", "shared.gate_up", "shared.down"}
    assert len(list(moe.expert_parameters())) == 2
