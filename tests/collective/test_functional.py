# SPDX-License-Identifier: Apache-2.0
"""Differentiable operations against dense torch in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from deepcomm import Buffer, InvalidArgument, RecvLayout, ScaledTensor, functional
from deepcomm.fp8 import dequantize_fp8, quantize_fp8
from deepcomm.testing import LocalCluster

if TYPE_CHECKING:
    from deepcomm.types import DispatchOutput

HIDDEN = 16
NUM_EXPERTS = 8
NUM_TOPK = 3
MAX_TOKENS = 12
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
LAYOUTS = tuple(RecvLayout)
CLUSTERS = [(1, None), (2, None), (2, 1), (4, None), (4, 1), (4, 2)]


def open_buffer(group: Any, **options: Any) -> Buffer:
    shape = {"hidden": HIDDEN, "num_experts": NUM_EXPERTS, "num_topk": NUM_TOPK}
    limits = {"max_tokens_per_rank": MAX_TOKENS, "device": "cpu", "timeout_s": 60.0}
    return Buffer(group, **(shape | limits | options))


@dataclass
class Problem:
    """Inputs of all ranks, one entry each; the matrices of all experts, [E, H, H], in one."""

    xs: list[torch.Tensor]
    ids: list[torch.Tensor]
    weights: list[torch.Tensor]
    coefs: list[torch.Tensor]
    matrices: torch.Tensor

    @staticmethod
    def make(num_ranks: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Problem:
        """Ranks differ in T, the last of several has none; some ids are -1, one token has none."""
        rng = torch.Generator().manual_seed(seed)
        sizes = [MAX_TOKENS - 3 * rank for rank in range(num_ranks)]
        sizes[-1] = 0 if num_ranks > 1 else MAX_TOKENS
        problem = Problem([], [], [], [], torch.randn(NUM_EXPERTS, HIDDEN, HIDDEN, generator=rng))
        for size in sizes:
            ids = torch.rand(size, NUM_EXPERTS, generator=rng).argsort(1)[:, :NUM_TOPK]
            ids[torch.rand(ids.shape, generator=rng) < 0.2] = -1
            ids[:1] = -1
            problem.ids.append(ids)
            problem.xs.append(torch.randn(size, HIDDEN, generator=rng).to(dtype))
            problem.weights.append(torch.rand(size, NUM_TOPK, generator=rng) + 0.1)
            problem.coefs.append(torch.randn(size, HIDDEN, generator=rng))
        problem.matrices = (problem.matrices / HIDDEN**0.5).to(dtype)
        return problem

    def dense(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return outputs and gradients (x, weights) of ``rank``."""
        x = self.xs[rank].clone().requires_grad_()
        weights = self.weights[rank].clone().requires_grad_()
        ids = self.ids[rank]
        every = torch.stack([expert(x, matrix) for matrix in self.matrices], dim=1)
        chosen = every.gather(1, ids.clamp_min(0).unsqueeze(2).expand(-1, -1, HIDDEN))
        factors = weights * (ids >= 0)
        out = (chosen.float() * factors.unsqueeze(2)).sum(1)
        (out * self.coefs[rank]).sum().backward()
        return out.detach(), x.grad, weights.grad

    def dense_matrices_grad(self) -> torch.Tensor:
        matrices = self.matrices.clone().requires_grad_()
        Problem(self.xs, self.ids, self.weights, self.coefs, matrices)._dense_loss().backward()
        return matrices.grad

    def _dense_loss(self) -> torch.Tensor:
        loss = self.matrices.sum() * 0
        for x, ids, weights, coef in zip(self.xs, self.ids, self.weights, self.coefs, strict=True):
            for k in range(NUM_TOPK):
                rows = torch.einsum("th,tho->to", x, self.matrices[ids[:, k].clamp_min(0)])
                factors = weights[:, k : k + 1] * (ids[:, k : k + 1] >= 0)
                loss = loss + (rows.tanh() * factors * coef).sum()
        return loss


def expert(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return (x @ matrix).tanh()


def reaches(ids: torch.Tensor, rank: int, num_ranks: int) -> torch.Tensor:
    """Return which tokens have an expert on ``rank``, bool [T]."""
    return (torch.where(ids < 0, -1, ids // (NUM_EXPERTS // num_ranks)) == rank).any(1)


def fan_out(ids: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Return how many ranks each token goes to, [T, 1]."""
    return sum(reaches(ids, rank, num_ranks).float() for rank in range(num_ranks)).unsqueeze(1)


def run_experts(
    received: DispatchOutput, matrices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weighted outputs in the rows of ``received``, and the weights still to apply."""
    x, weights = received.x, received.topk_weights
    layout = received.handle.recv_layout
    if layout is RecvLayout.EXPERT_PADDED:
        return expert(x, matrices), weights
    if layout is RecvLayout.EXPERT:
        ends = [*received.expert_offsets.tolist(), x.shape[0]]
        sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        _, *groups = x.split(sizes)
        matrices = [*matrices, torch.zeros(HIDDEN, HIDDEN, dtype=x.dtype)]
        rows = [expert(group, matrix) for group, matrix in zip(groups, matrices, strict=True)]
        return torch.cat(rows), weights
    y = torch.zeros_like(x)
    for local_expert_idx, matrix in enumerate(matrices):
        factor = (weights * (received.topk_idx == local_expert_idx)).sum(1, keepdim=True)
        y = y + expert(x, matrix) * factor
    return y.to(x.dtype), None


def local_matrices(problem: Problem, buffer: Buffer) -> torch.Tensor:
    num_local = NUM_EXPERTS // buffer.num_ranks
    return problem.matrices[buffer.rank * num_local :][:num_local].clone().requires_grad_()


def exchange(
    buffer: Buffer, problem: Problem, *, x_grad: bool = True, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Run forward and backward of this rank; return (out, grad x, grad weights, grad matrices)."""
    x = problem.xs[buffer.rank].clone().requires_grad_(x_grad)
    weights = problem.weights[buffer.rank].clone().requires_grad_(x_grad)
    matrices = local_matrices(problem, buffer)
    received = functional.dispatch(buffer, x, problem.ids[buffer.rank], weights, **options)
    y, row_weights = run_experts(received, matrices)
    out = functional.combine(buffer, y, received.handle, row_weights=row_weights).x
    (out.float() * problem.coefs[buffer.rank]).sum().backward()
    return out.detach(), x.grad, weights.grad, matrices.grad


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), CLUSTERS)
def test_forward_and_gradients_match_dense(
    num_ranks: int, ranks_per_node: int | None, layout: RecvLayout
) -> None:
    problem = Problem.make(num_ranks)

    def run(group: Any) -> Any:
        with open_buffer(group, ranks_per_node=ranks_per_node) as buffer:
            return exchange(buffer, problem, recv_layout=layout)

    results = LocalCluster(num_ranks).run(run)
    for rank, (out, grad_x, grad_weights, _) in enumerate(results):
        want_out, want_x, want_weights = problem.dense(rank)
        torch.testing.assert_close(out, want_out, **TOLERANCE)
        torch.testing.assert_close(grad_x, want_x, **TOLERANCE)
        torch.testing.assert_close(grad_weights, want_weights, **TOLERANCE)
        assert not grad_weights[problem.ids[rank] < 0].any()
    grad_matrices = torch.cat([result[3] for result in results])
    torch.testing.assert_close(grad_matrices, problem.dense_matrices_grad(), **TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_gradients_are_close(layout: RecvLayout) -> None:
    problem = Problem.make(2, dtype=torch.bfloat16)

    def run(group: Any) -> Any:
        with open_buffer(group) as buffer:
            return exchange(buffer, problem, recv_layout=layout)

    for rank, (out, grad_x, grad_weights, _) in enumerate(LocalCluster(2).run(run)):
        assert (out.dtype, grad_x.dtype) == (torch.bfloat16, torch.bfloat16)
        want_out, want_x, want_weights = problem.dense(rank)
        loose = {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(out.float(), want_out, **loose)
        torch.testing.assert_close(grad_x, want_x, **loose)
        torch.testing.assert_close(grad_weights, want_weights, **loose)


def test_rank_without_gradients_of_its_own_still_takes_part() -> None:
    problem = Problem.make(2)

    def run(group: Any) -> Any:
        with open_buffer(group) as buffer:
            layout = RecvLayout.EXPERT
            return exchange(buffer, problem, x_grad=buffer.rank == 0, recv_layout=layout)

    first, second = LocalCluster(2).run(run)
    torch.testing.assert_close(first[1], problem.dense(0)[1], **TOLERANCE)
    assert second[1] is None
    grad_matrices = torch.cat([first[3], second[3]])
    torch.testing.assert_close(grad_matrices, problem.dense_matrices_grad(), **TOLERANCE)


def test_padding_rows_are_zero_in_both_directions() -> None:
    problem = Problem.make(2)

    def run(group: Any) -> Any:
        with open_buffer(group) as buffer:
            x = problem.xs[buffer.rank].clone().requires_grad_()
            poison = torch.full_like(x, torch.nan)
            for _ in range(4):  # leave NaN in every landing area
                buffer.dispatch(poison, problem.ids[buffer.rank])
            received = functional.dispatch(
                buffer,
                x,
                problem.ids[buffer.rank],
                problem.weights[buffer.rank],
                recv_layout=RecvLayout.EXPERT,
                expert_alignment=8,
            )
            y = received.x.detach().requires_grad_()
            functional.combine(buffer, y, received.handle).x.sum().backward()
            counts = received.num_tokens_per_expert.tolist()
            return received.x.detach(), y.grad, received.expert_offsets.tolist(), counts

    for x, grad_y, offsets, counts in LocalCluster(2).run(run):
        padding = torch.ones(x.shape[0], dtype=torch.bool)
        for start, count in zip(offsets, counts, strict=False):
            padding[start : start + count] = False
        assert padding.sum() > 0
        assert not x[padding].any()
        assert not grad_y[padding].any()
        assert (grad_y[~padding] == 1).all()


def test_quantised_rows_come_back_in_their_dtype_and_gradients_pass_straight_through() -> None:
    problem = Problem.make(2)

    def run(group: Any) -> Any:
        with open_buffer(group) as buffer:
            results = []
            for scale_format in ("fp32", "ue8m0"):
                x = problem.xs[buffer.rank].clone().requires_grad_()
                received = functional.dispatch(
                    buffer,
                    x,
                    problem.ids[buffer.rank],
                    quantize="fp8_e4m3",
                    scale_format=scale_format,
                )
                received.x.sum().backward()
                results.append((scale_format, received, x.grad))
            return results

    cluster = LocalCluster(2).run(run)
    for rank, results in enumerate(cluster):
        tokens = torch.cat(
            [x[reaches(i, rank, 2)] for x, i in zip(problem.xs, problem.ids, strict=True)]
        )
        for scale_format, received, grad_x in results:
            want = dequantize_fp8(quantize_fp8(tokens, scale_format))
            torch.testing.assert_close(received.x.detach(), want, rtol=0, atol=0)
            assert received.scales is None
            torch.testing.assert_close(
                grad_x, fan_out(problem.ids[rank], 2).expand_as(grad_x), **TOLERANCE
            )


def test_capacity_that_suffices_changes_no_gradient_and_overflow_gives_nan() -> None:
    problem = Problem.make(2)

    def run(group: Any, capacity: int) -> Any:
        with open_buffer(group) as buffer:
            layout = RecvLayout.EXPERT
            return exchange(buffer, problem, recv_layout=layout, num_recv_tokens=capacity)

    results = LocalCluster(2).run(lambda group: run(group, 2 * MAX_TOKENS * NUM_TOPK))
    torch.testing.assert_close(results[0][1], problem.dense(0)[1], **TOLERANCE)
    torch.testing.assert_close(results[0][2], problem.dense(0)[2], **TOLERANCE)

    out, grad_x, _, _ = LocalCluster(2).run(lambda group: run(group, 4))[0]
    lost = out.isnan().any(1)
    assert lost.any()
    assert not lost.all()
    assert grad_x[lost].isnan().all()
    assert not grad_x[~lost].isnan().any()


def test_bias_and_carried_weights_have_gradients() -> None:
    problem = Problem.make(2)

    def run(group: Any) -> Any:
        with open_buffer(group) as buffer:
            rank = buffer.rank
            x = problem.xs[rank].clone().requires_grad_()
            weights = problem.weights[rank].clone().requires_grad_()
            bias = torch.zeros_like(x).requires_grad_()
            received = functional.dispatch(buffer, x, problem.ids[rank], weights)
            out = functional.combine(
                buffer,
                received.x,
                received.handle,
                topk_weights=received.topk_weights * 3,
                bias=bias,
            )
            loss = (out.x * problem.coefs[rank]).sum() + (out.topk_weights**2).sum()
            loss.backward()
            return out.topk_weights.detach(), weights.grad, bias.grad

    for rank, (carried, grad_weights, grad_bias) in enumerate(LocalCluster(2).run(run)):
        there = problem.weights[rank] * (problem.ids[rank] >= 0)
        torch.testing.assert_close(carried, 3 * there, **TOLERANCE)
        torch.testing.assert_close(grad_weights, 18 * there, **TOLERANCE)
        torch.testing.assert_close(grad_bias, problem.coefs[rank], rtol=0, atol=0)


def test_second_derivatives() -> None:
    problem = Problem.make(2)

    def run(group: Any) -> Any:
        with open_buffer(group) as buffer:
            rank = buffer.rank
            x = problem.xs[rank].clone().requires_grad_()
            received = functional.dispatch(buffer, x, problem.ids[rank])
            out = functional.combine(buffer, received.x**3, received.handle).x
            (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            grad.sum().backward()
            return x.grad

    for rank, grad in enumerate(LocalCluster(2).run(run)):
        want = 6 * problem.xs[rank] * fan_out(problem.ids[rank], 2)
        torch.testing.assert_close(grad, want, **TOLERANCE)


def test_repeated_routing_and_kept_activations_outlive_the_ring() -> None:
    problem = Problem.make(2)
    num_layers = 7  # more than a buffer has landing areas

    def run(group: Any) -> Any:
        with open_buffer(group) as buffer:
            rank = buffer.rank
            x = problem.xs[rank].clone().requires_grad_()
            first = functional.dispatch(buffer, x, problem.ids[rank])
            total = torch.zeros(())
            for layer in range(num_layers):
                received = functional.dispatch(buffer, x * (layer + 1), handle=first.handle)
                squared = received.x * received.x
                total = total + functional.combine(buffer, squared, received.handle).x.sum()
            (total + 0 * first.x.sum()).backward()
            return x.grad

    for rank, grad in enumerate(LocalCluster(2).run(run)):
        factor = sum((layer + 1) ** 2 for layer in range(num_layers))
        want = 2 * factor * problem.xs[rank] * fan_out(problem.ids[rank], 2)
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-3)


def test_no_graph_without_grad_and_no_scaled_tensors() -> None:
    problem = Problem.make(1)

    def run(group: Any) -> Any:
        with open_buffer(group) as buffer:
            x = problem.xs[0].clone().requires_grad_()
            with torch.no_grad():
                received = functional.dispatch(buffer, x, problem.ids[0])
                out = functional.combine(buffer, received.x, received.handle)
            assert not received.x.requires_grad
            assert not out.x.requires_grad
            scaled = ScaledTensor(x.detach().to(torch.float8_e4m3fn), torch.ones(MAX_TOKENS, 1))
            with pytest.raises(InvalidArgument, match=r"x: expected a Tensor.*ScaledTensor"):
                functional.dispatch(buffer, scaled, problem.ids[0])

    LocalCluster(1).run(run)
