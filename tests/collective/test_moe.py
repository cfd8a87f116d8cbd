# SPDX-License-Identifier: Apache-2.0
"""``ExpertParallelMoE`` over several ranks against the same layer, dense, in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepcomm import Buffer, RecvLayout
from deepcomm.nn import ExpertParallelMoE, Experts, Gate, GateConfig, MoEConfig, SwiGLU, swiglu
from deepcomm.testing import LocalCluster

HIDDEN = 16
NUM_EXPERTS = 8
NUM_TOPK = 3
NUM_TOKENS = 12
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
CLUSTERS = [(1, None), (2, None), (2, 1), (4, None), (4, 1), (4, 2)]
MOE = MoEConfig(
    gate=GateConfig(NUM_EXPERTS, NUM_TOPK, num_groups=4, num_chosen_groups=2, weight_scale=1.5),
    hidden=HIDDEN,
    intermediate=24,
    shared_intermediate=8,
)


def open_buffer(group: Any, ranks_per_node: int | None) -> Buffer:
    return Buffer(
        group,
        num_experts=NUM_EXPERTS,
        num_topk=NUM_TOPK,
        hidden=HIDDEN,
        max_tokens_per_rank=NUM_TOKENS,
        device="cpu",
        ranks_per_node=ranks_per_node,
        timeout_s=60.0,
    )


def dense_moe(
    moe: ExpertParallelMoE | ReplicatedPart, x: torch.Tensor
) -> tuple[torch.Tensor, Experts]:
    """The layer on all tokens with all experts, by masks instead of exchanges."""
    experts = Experts(range(NUM_EXPERTS), HIDDEN, MOE.intermediate, MOE.seed)
    routing = moe.gate(x)
    y = moe.shared(x)
    for expert_idx in range(NUM_EXPERTS):
        factor = (routing.topk_weights * (routing.topk_idx == expert_idx)).sum(1, keepdim=True)
        y = y + factor * swiglu(x, experts.gate_up[expert_idx], experts.down[expert_idx])
    return y, experts


@pytest.mark.parametrize("layout", [RecvLayout.EXPERT, RecvLayout.EXPERT_PADDED])
@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), CLUSTERS)
def test_moe_layer_matches_dense(
    num_ranks: int, ranks_per_node: int | None, layout: RecvLayout
) -> None:
    config = MoEConfig(MOE.gate, MOE.hidden, MOE.intermediate, MOE.shared_intermediate, layout)
    tokens = torch.randn(NUM_TOKENS, HIDDEN, generator=torch.Generator().manual_seed(3))
    coef = torch.randn(NUM_TOKENS, HIDDEN, generator=torch.Generator().manual_seed(4))
    # Uneven shares; the last of several ranks has no token.
    shares = [max(num_ranks - 1, 1) - rank for rank in range(num_ranks)]
    sizes = [NUM_TOKENS * share // sum(shares) for share in shares]
    sizes[0] += NUM_TOKENS - sum(sizes)
    replicated = ReplicatedPart()

    def run(group: Any) -> Any:
        with open_buffer(group, ranks_per_node) as buffer:
            moe = replicated.load_into(ExpertParallelMoE(buffer, config))
            x = tokens.split(sizes)[buffer.rank].clone().requires_grad_()
            out = moe(x)
            (out * coef.split(sizes)[buffer.rank]).sum().backward()
            own = [parameter.grad for parameter in moe.expert_parameters()]
            return out.detach(), x.grad, own, moe.gate.weight.grad, moe.shared.down.grad

    results = LocalCluster(num_ranks).run(run)
    x = tokens.clone().requires_grad_()
    want, experts = dense_moe(replicated, x)
    (want * coef).sum().backward()
    outs, grads_x, owns, gates, shareds = zip(*results, strict=True)
    torch.testing.assert_close(torch.cat(outs), want.detach(), **TOLERANCE)
    torch.testing.assert_close(torch.cat(grads_x), x.grad, **TOLERANCE)
    torch.testing.assert_close(torch.cat([g for g, _ in owns]), experts.gate_up.grad, **TOLERANCE)
    torch.testing.assert_close(torch.cat([g for _, g in owns]), experts.down.grad, **TOLERANCE)
    torch.testing.assert_close(sum(gates), replicated.gate.weight.grad, **TOLERANCE)
    torch.testing.assert_close(sum(shareds), replicated.shared.down.grad, **TOLERANCE)


class ReplicatedPart(torch.nn.Module):
    """Gate and shared expert in one copy, for ranks to load: threads share one generator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.gate = Gate(MOE.gate, HIDDEN)
        self.shared = SwiGLU(HIDDEN, MOE.shared_intermediate)

    def load_into(self, moe: ExpertParallelMoE | ReplicatedPart) -> ExpertParallelMoE:
        moe.gate.load_state_dict(self.gate.state_dict())
        moe.shared.load_state_dict(self.shared.state_dict())
        return moe
