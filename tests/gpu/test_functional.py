# SPDX-License-Identifier: Apache-2.0
"""Gradients on a GPU against those of the CPU backend; backward blocks no other rank.

Ranks share a GPU, hence autograd's one thread for it: a backward that waited on the host for
another rank's would never end. What no sum of torch's enters is compared bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from gpu.backend_ranks import meet

from deepcomm import Buffer, RecvLayout, functional
from deepcomm.nn import ExpertParallelMoE, GateConfig, MoEConfig
from deepcomm.testing import LocalCluster
from deepcomm.testing.oracle import random_payload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

pytestmark = pytest.mark.gpu(1)

HIDDEN = 128
NUM_EXPERTS = 12
NUM_TOPK = 3
MAX_TOKENS = 24
NUM_LAYERS = 5  # more than a buffer has landing areas
TIMEOUT_S = 20.0
GPU = "cuda:0"
LAYOUTS = list(RecvLayout)


def open_buffer(group: Any, device: str) -> Buffer:
    return Buffer(
        group,
        num_experts=NUM_EXPERTS,
        num_topk=NUM_TOPK,
        hidden=HIDDEN,
        max_tokens_per_rank=MAX_TOKENS,
        device=device,
        num_low_latency_slots=0,
        timeout_s=TIMEOUT_S,
    )


def on(device: str, num_ranks: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    return LocalCluster(num_ranks, device=device).run(lambda group: body(group, device, *args))


@dataclass
class Inputs:
    """Leaves of one rank; the last of several ranks brings no token."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    bias: torch.Tensor
    factor: torch.Tensor
    coef: torch.Tensor

    @staticmethod
    def make(rank: int, num_ranks: int, device: str) -> Inputs:
        rng = torch.Generator().manual_seed(rank)
        size = 0 if num_ranks > 1 and rank == num_ranks - 1 else MAX_TOKENS - 5 * rank
        ids = torch.rand(size, NUM_EXPERTS, generator=rng).argsort(1)[:, :NUM_TOPK]
        ids[torch.rand(ids.shape, generator=rng) < 0.2] = -1
        ids[:1] = -1
        factor = torch.randn(HIDDEN, generator=rng).bfloat16()
        weights = torch.rand(size, NUM_TOPK, generator=rng) + 0.1
        bias, coef = (random_payload(rank, size, HIDDEN, seed=seed) for seed in (1, 2))
        leaves = [
            leaf.to(device).requires_grad_()
            for leaf in (random_payload(rank, size, HIDDEN), weights, bias, factor)
        ]
        x, weights, bias, factor = leaves
        return Inputs(x, ids.to(device), weights, bias, factor, coef.float().to(device))

    def results(self, out: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what forward and backward gave, on the CPU."""
        named = {"out": out, "x": self.x.grad, "bias": self.bias.grad}
        named |= {"weights": self.weights.grad, "factor": self.factor.grad}
        return {name: tensor.detach().cpu() for name, tensor in named.items()}


def forward(
    buffer: Buffer, inputs: Inputs, layout: RecvLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and loss of some layers of one routing."""
    by_expert = layout is not RecvLayout.TOKEN
    x, handle = inputs.x, None
    carried = torch.zeros((), device=x.device)
    for _ in range(NUM_LAYERS):
        routing = {"handle": handle} if handle is not None else {"recv_layout": layout}
        ids = inputs.ids if handle is None else None
        received = functional.dispatch(buffer, x, ids, inputs.weights, **routing)
        handle = received.handle
        output = functional.combine(
            buffer,
            received.x * inputs.factor,
            handle,
            row_weights=received.topk_weights if by_expert else None,
            topk_weights=None if by_expert else received.topk_weights * 3,
            bias=inputs.bias,
        )
        if output.topk_weights is not None:
            carried = carried + (output.topk_weights**2).sum()
        x = output.x
    return x, (x.float() * inputs.coef).sum() + carried


def differentiate(group: Any, device: str, layout: RecvLayout) -> dict[str, torch.Tensor]:
    with open_buffer(group, device) as buffer:
        inputs = Inputs.make(buffer.rank, buffer.num_ranks, device)
        out, loss = forward(buffer, inputs, layout)
        loss.backward()
        return inputs.results(out)


def assert_near(
    mine: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
    names: Iterable[str],
    fraction: float,
) -> None:
    """Compare within a fraction of each tensor's largest element."""
    for name in names:
        want = theirs[name].float()
        assert mine[name].shape == want.shape, name
        if want.numel() == 0:
            continue
        difference = float((mine[name].float() - want).abs().max())
        limit = fraction * float(want.abs().max())
        assert difference <= limit, f"{name}: differs by {difference}, more than {limit}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_gradients_equal_those_of_the_cpu(num_ranks: int, layout: RecvLayout) -> None:
    got = on(GPU, num_ranks, differentiate, layout)
    want = on("cpu", num_ranks, differentiate, layout)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine["out"], theirs["out"])
        assert torch.equal(mine["x"], theirs["x"])
        assert_near(mine, theirs, ("weights",), 1e-4)
        assert_near(mine, theirs, ("bias", "factor"), 0.02)  # BF16 sums over layers and rows


def backward_in_turns(group: Any, device: str, layout: RecvLayout) -> dict[str, torch.Tensor]:
    """Let rank 0's backward return before rank 1 begins its own."""
    with open_buffer(group, device) as buffer:
        inputs = Inputs.make(buffer.rank, buffer.num_ranks, device)
        out, loss = forward(buffer, inputs, layout)
        loss.backward(retain_graph=True)  # whatever happens only once
        for leaf in (inputs.x, inputs.weights, inputs.bias, inputs.factor):
            leaf.grad = None
        meet(group)
        for turn in range(buffer.num_ranks):
            if turn == buffer.rank:
                loss.backward()
            group.barrier()  # of the hosts alone: the device still waits for the peers
        return inputs.results(out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_does_not_wait_for_the_peers_on_the_host(layout: RecvLayout) -> None:
    got = on(GPU, 3, backward_in_turns, layout)
    want = on("cpu", 3, differentiate, layout)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine["x"], theirs["x"])


def run_layer(group: Any, device: str, layout: RecvLayout) -> dict[str, torch.Tensor]:
    """Train a step of an MoE layer; return its routing, output and gradients."""
    with open_buffer(group, device) as buffer:
        config = MoEConfig(
            GateConfig(NUM_EXPERTS, NUM_TOPK, num_groups=4, num_chosen_groups=2),
            HIDDEN,
            intermediate=64,
            shared_intermediate=32,
            recv_layout=layout,
        )
        moe = ExpertParallelMoE(buffer, config)
        generator = torch.Generator().manual_seed(7)  # threads share torch's own
        with torch.no_grad():
            for parameter in (*moe.gate.parameters(), *moe.shared.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * HIDDEN**-0.5)
        moe = moe.to(device, torch.bfloat16)
        rng = torch.Generator().manual_seed(buffer.rank)
        size = MAX_TOKENS - 5 * buffer.rank
        x = torch.randn(size, HIDDEN, generator=rng).bfloat16().to(device).requires_grad_()
        out = moe(x)
        out.float().square().sum().backward()
        moe.gate.update_bias(moe.gate.load, 0.01)
        results = {"ids": moe.last_routing.topk_idx, "out": out, "x": x.grad}
        results |= {name: parameter.grad for name, parameter in moe.named_parameters()}
        results["bias"] = moe.gate.bias
        return {name: tensor.detach().cpu() for name, tensor in results.items()}


@pytest.mark.parametrize("layout", [RecvLayout.EXPERT, RecvLayout.EXPERT_PADDED])
def test_moe_layer_trains_as_on_the_cpu(layout: RecvLayout) -> None:
    got = on(GPU, 2, run_layer, layout)
    want = on("cpu", 2, run_layer, layout)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine["ids"], theirs["ids"])
        assert torch.equal(mine["bias"], theirs["bias"])
        assert_near(mine, theirs, theirs, 0.03)
