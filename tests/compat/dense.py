# SPDX-License-Identifier: Apache-2.0
"""A mixture of SwiGLU experts without any exchange: what a client's layer must compute.

Every rank can compute the tokens, and so the results and gradients, of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import silu

from deepcomm.compat import install_as_deep_ep

if TYPE_CHECKING:
    from collections.abc import Callable

RELATIVE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Of the largest value, by the dtype that rows travel in."""


class Experts(nn.Module):
    """SwiGLU experts: w1, w3 [L, F, H], w2 [L, H, F]."""

    def __init__(self, w1: torch.Tensor, w2: torch.Tensor, w3: torch.Tensor) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Parameter(w.detach().clone()) for w in (w1, w2, w3))

    def one(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        """Return the output of one expert."""
        gate = silu(rows @ self.w1[expert].t()) * (rows @ self.w3[expert].t())
        return gate @ self.w2[expert].t()

    def forward(self, rows: torch.Tensor, counts: torch.Tensor | list[int]) -> torch.Tensor:
        """Return the outputs of rows grouped by expert."""
        groups = rows.split([int(count) for count in counts])
        return torch.cat([self.one(expert, group) for expert, group in enumerate(groups)])

    @property
    def grads(self) -> list[torch.Tensor | None]:
        return [self.w1.grad, self.w2.grad, self.w3.grad]


@dataclass(frozen=True, eq=False)
class Result:
    """Output and gradients of one rank."""

    out: torch.Tensor
    grad_x: torch.Tensor
    grad_probs: torch.Tensor
    grad_experts: list[torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """Sizes of a layer; ranks bring ``tokens`` minus their number, or all the same."""

    num_ranks: int
    tokens: int = 12
    even: bool = False
    hidden: int = 64
    inner: int = 32
    experts: int = 8
    topk: int = 2
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def num_local(self) -> int:
        return self.experts // self.num_ranks

    def of_rank(self, rank: int) -> tuple[torch.Tensor, ...]:
        """Return rows, ids, probabilities and the gradient of the output."""
        random = torch.Generator().manual_seed(100 + rank)
        tokens = self.tokens if self.even else self.tokens - 3 * rank
        x = torch.randn(tokens, self.hidden, generator=random)
        scores = torch.randn(tokens, self.experts, generator=random)
        top, ids = scores.topk(self.topk)
        grad = torch.randn(tokens, self.hidden, generator=random)
        return x.to(self.dtype), ids, top.softmax(-1), grad.to(self.dtype)

    @cached_property
    def weights(self) -> list[torch.Tensor]:
        """Weights of all experts."""
        random = torch.Generator().manual_seed(7)
        shapes = ((self.inner, self.hidden), (self.hidden, self.inner), (self.inner, self.hidden))
        return [
            (torch.randn(self.experts, *shape, generator=random) / shape[1] ** 0.5).to(self.dtype)
            for shape in shapes
        ]

    def local_experts(self, rank: int) -> Experts:
        first = rank * self.num_local
        local = [w[first : first + self.num_local] for w in self.weights]
        return Experts(*local).to(self.device)

    @cached_property
    def expected(self) -> list[Result]:
        """What the layer must give on every rank, in double precision."""
        experts = Experts(*(w.double() for w in self.weights))
        results = [self._dense(experts, rank) for rank in range(self.num_ranks)]
        own = [grad.split(self.num_local) for grad in experts.grads]
        return [
            Result(*result, [grad[rank] for grad in own]) for rank, result in enumerate(results)
        ]

    def _dense(self, experts: Experts, rank: int) -> tuple[torch.Tensor, ...]:
        """Return output and gradients of one rank's tokens; adds to those of the experts."""
        x, ids, probs, grad = self.of_rank(rank)
        x, probs = x.double().requires_grad_(), probs.double().requires_grad_()
        rows = [
            sum(p * experts.one(int(e), row) for p, e in zip(*choice, strict=True))
            for row, *choice in zip(x, probs, ids, strict=True)
        ]
        out = torch.stack(rows)
        (out * grad.double()).sum().backward()
        return out, x.grad, probs.grad


def enter(group: Any, problem: Problem) -> int:
    """Let ``deep_ep`` mean the facades, choose this rank's device, and return the rank."""
    install_as_deep_ep()
    rank = dist.get_rank(group)
    if problem.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    return rank


def run_layer(
    problem: Problem, rank: int, layer: Callable[..., torch.Tensor], *, backward: bool = True
) -> None:
    """Run a client's layer forward and backward, and compare with the dense one.

    The layer is called with rows, ids, probabilities and this rank's experts.
    """
    x, ids, probs, grad = (tensor.to(problem.device) for tensor in problem.of_rank(rank))
    experts, expected = problem.local_experts(rank), problem.expected[rank]
    x, probs = x.requires_grad_(backward), probs.requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        out = layer(x, ids, probs, experts)
    found = {"output": out}
    wanted = {"output": expected.out}
    if backward:
        (out.reshape_as(grad) * grad).sum().backward()
        found |= {"gradient of x": x.grad, "gradient of the probabilities": probs.grad}
        wanted |= {
            "gradient of x": expected.grad_x,
            "gradient of the probabilities": expected.grad_probs,
        }
        for name, actual, dense in zip("123", experts.grads, expected.grad_experts, strict=True):
            found[f"gradient of w{name}"] = actual
            wanted[f"gradient of w{name}"] = dense
    for what, dense in wanted.items():
        actual = found[what]
        assert actual is not None, f"{what}: missing"
        error = (actual.detach().cpu().double().reshape_as(dense) - dense).abs().max()
        bound = RELATIVE_ERROR[problem.dtype] * dense.abs().max()
        assert error <= bound, f"{what}: error {error:.3g}, expected at most {bound:.3g}"
