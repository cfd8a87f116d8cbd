# SPDX-License-Identifier: Apache-2.0
"""Low-latency operations of random sizes and routings, checked with torch on the same device.

Rows travel as BF16 and cast to FP8 in turns, and every third operation is split by its hook.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from deepcomm import Buffer
from deepcomm.fp8 import quantize_fp8

TIMEOUT_S = 20.0  # of a wait on the device


@dataclass(frozen=True)
class SoakShape:
    """Sizes of the buffer, and the largest T."""

    experts: int
    topk: int
    hidden: int = 1024
    max_tokens: int = 128


class Soak:
    """Dispatches and combines of random tokens, compared with torch on the same device."""

    def __init__(self, group: Any, shape: SoakShape, device: torch.device | None = None) -> None:
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.shape = shape
        self.num_local = shape.experts // self.num_ranks
        self.device = device or torch.device("cuda", torch.cuda.current_device())
        self.generator = torch.Generator(self.device)
        self.sizes = np.random.default_rng(1)
        self.buffer = Buffer(
            group,
            num_experts=shape.experts,
            num_topk=shape.topk,
            hidden=shape.hidden,
            max_tokens_per_rank=shape.max_tokens,
            device=self.device,
            timeout_s=TIMEOUT_S,
        )

    def step(self, number: int) -> torch.Tensor:
        """Run one dispatch and its combine; return a bool on the device: all is right."""
        self.generator.manual_seed(number)  # alike on all ranks, which know each other's tokens
        sizes = self.sizes.integers(0, self.shape.max_tokens + 1, self.num_ranks)
        total, topk = int(sizes.sum()), self.shape.topk
        x = torch.randn(
            total, self.shape.hidden, device=self.device, generator=self.generator
        ).bfloat16()
        scores = torch.rand(total, self.shape.experts, device=self.device, generator=self.generator)
        ids = scores.topk(topk).indices if total else scores.new_zeros(0, topk, dtype=torch.int64)
        drop = torch.rand(ids.shape, device=self.device, generator=self.generator) < 0.1
        ids = ids.masked_fill(drop, -1)
        weights = torch.rand(ids.shape, device=self.device, generator=self.generator)
        begin = int(sizes[: self.rank].sum())
        own = slice(begin, begin + int(sizes[self.rank]))
        hook, quantize = number % 3 == 0, "fp8_e4m3" if number % 2 else None
        got = self.buffer.low_latency_dispatch(
            x[own], ids[own], weights[own], quantize=quantize, return_hook=hook
        )
        if hook:
            got.hook()
        y = got.x.to(torch.bfloat16)
        back = self.buffer.low_latency_combine(y, got.handle, return_hook=hook)
        if hook:
            back.hook()
        cast = None if quantize is None else quantize_fp8(x)
        rows = x if cast is None else cast.data.to(torch.bfloat16)
        is_right = self.check_rows(got, y, rows, ids, weights)
        if cast is not None:
            is_right &= self.check_scales(got, cast.scales, ids)
        expected = self.expected_sum(rows[own], ids[own], weights[own])
        return is_right & (back.x == expected).all()

    def chosen(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return which tokens have which local experts, and local expert and mask of each pair."""
        local = ids - self.rank * self.num_local
        is_here = (local >= 0) & (local < self.num_local)
        column = local.clamp(0, self.num_local - 1)
        chosen = torch.zeros(len(ids), self.num_local, device=self.device)
        return chosen.scatter_add_(1, column, is_here.float()), column, is_here

    def check_scales(self, got: Any, scales: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        chosen, _, _ = self.chosen(ids)
        position = chosen.cumsum(0).long() - 1
        expert, token = chosen.T.nonzero(as_tuple=True)
        return (got.scales[expert, position[token, expert]] == scales[token]).all()

    def check_rows(
        self,
        got: Any,
        received: torch.Tensor,
        rows: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        chosen, column, is_here = self.chosen(ids)
        weight = torch.zeros_like(chosen).scatter_add_(1, column, weights.masked_fill(~is_here, 0))
        position = chosen.cumsum(0).long() - 1
        expert, token = chosen.T.nonzero(as_tuple=True)
        place = position[token, expert]
        rows_equal = (received[expert, place] == rows[token]).all()
        weights_equal = (got.topk_weights[expert, place] == weight[token, expert]).all()
        counts_equal = (got.num_tokens_per_expert == chosen.sum(0).int()).all()
        return rows_equal & weights_equal & counts_equal

    def expected_sum(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum in the specified order; every operation is a kernel, so that none is fused."""
        order = ids.argsort(1)
        ids, weights = ids.gather(1, order), weights.gather(1, order)
        total = torch.zeros(x.shape, device=self.device)
        for rank in range(self.num_ranks):
            partial = torch.zeros_like(total)
            for k in range(ids.shape[1]):
                is_here = (ids[:, k] >= 0) & (ids[:, k] // self.num_local == rank)
                term = weights[:, k, None] * x.float()
                partial = torch.where(is_here[:, None], partial + term, partial)
            total = total + partial.bfloat16().float()
        return total.bfloat16()

    def run(self, num_steps: int) -> None:
        """Run and check; raises within 1,000 steps of the first that is wrong."""
        wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        for number in range(num_steps):
            wrong += ~self.step(number)
            if number % 1000 == 999 or number + 1 == num_steps:
                assert wrong.item() == 0, f"rank {self.rank}: wrong in the last of {number + 1}"
                if self.rank == 0 and num_steps >= 1000:
                    print(f"{number + 1} operations right", file=sys.stderr, flush=True)
