# SPDX-License-Identifier: Apache-2.0
"""What a rank should see of random tokens, computed with torch on its device without a host wait.

Every rank draws the tokens of all of them from one seed, so it knows what its peers bring. Sums
take the specified order; every step of them is a kernel of its own, so that none is fused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepcomm import RecvLayout, ScaledTensor
from deepcomm.fp8 import quantize_fp8

DROPPED = 0.1  # of all ids
NO_EXPERT = 1 << 30
NUM_FACTORS = 8


@dataclass(frozen=True)
class SoakShape:
    """Sizes of the buffer; T is the largest."""

    experts: int
    topk: int
    hidden: int = 1024
    max_tokens: int = 128


@dataclass(frozen=True)
class Tokens:
    """Those of all ranks one after the other; ``own`` are this rank's."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    own: slice


def draw(generator: torch.Generator, sizes: Sequence[int], rank: int, shape: SoakShape) -> Tokens:
    """Draw rows, distinct experts of which some are none, and weights."""
    total, device = sum(sizes), generator.device

    def random(draw_some: Callable[..., torch.Tensor], width: int) -> torch.Tensor:
        return draw_some(total, width, device=device, generator=generator)

    x = random(torch.randn, shape.hidden).bfloat16()
    scores = random(torch.rand, shape.experts)
    ids = scores.topk(shape.topk).indices if total else scores.new_zeros(0, shape.topk).long()
    ids = ids.masked_fill(random(torch.rand, shape.topk) < DROPPED, -1)
    weights = random(torch.rand, shape.topk)
    begin = sum(sizes[:rank])
    return Tokens(x, ids, weights, slice(begin, begin + sizes[rank]))


class Truth:
    """Where the tokens of all ranks belong on this one, and what comes back of its own."""

    def __init__(self, tokens: Tokens, rank: int, num_ranks: int, experts: int) -> None:
        self.tokens, self.rank, self.num_ranks = tokens, rank, num_ranks
        self.num_local = experts // num_ranks
        local = tokens.ids - rank * self.num_local
        self.is_here = (tokens.ids >= 0) & (local >= 0) & (local < self.num_local)
        self.local = local.masked_fill(~self.is_here, 0)
        self.chosen = torch.zeros(len(local), self.num_local, device=local.device, dtype=torch.int)
        self.chosen.scatter_add_(1, self.local, self.is_here.int())
        self.counts = self.chosen.sum(0, dtype=torch.int)

    # ---- what arrives

    def places(self, layout: RecvLayout, alignment: int, block: int) -> torch.Tensor:
        """Return the row of each (token, k) of this rank; others get some number."""
        if layout is RecvLayout.TOKEN:
            row = self.is_here.any(1).cumsum(0) - 1
            return row[:, None].expand_as(self.local)
        position = (self.chosen.cumsum(0) - 1).gather(1, self.local)
        if layout is RecvLayout.EXPERT_PADDED:
            return self.local * block + position
        groups = (self.counts + alignment - 1) // alignment * alignment
        return (groups.cumsum(0) - groups)[self.local] + position

    def is_received(self, got: Any, rows: torch.Tensor | ScaledTensor, alignment: int) -> Any:
        """Return whether rows, weights and counts were delivered; a bool on the device."""
        layout = got.handle.recv_layout
        block = got.x.shape[1] if layout is RecvLayout.EXPERT_PADDED else 0
        places = self.places(layout, alignment, block)

        def is_equal(tensor: torch.Tensor, expected: torch.Tensor) -> Any:
            flat = tensor.flatten(0, 1) if block else tensor
            if not len(flat):
                return ~self.is_here.any()
            found = flat[places.clamp(0, len(flat) - 1)]
            is_here = self.is_here.view(*places.shape, *[1] * (found.ndim - 2))
            return ((found == expected) | ~is_here).all()

        data = rows.data.view(torch.uint8) if isinstance(rows, ScaledTensor) else rows
        x = got.x.view(torch.uint8) if isinstance(rows, ScaledTensor) else got.x
        is_right = is_equal(x, data[:, None]) & (got.num_tokens_per_expert == self.counts).all()
        if isinstance(rows, ScaledTensor):
            is_right &= is_equal(got.scales, rows.scales[:, None])
        if layout is not RecvLayout.TOKEN:
            return is_right & is_equal(got.topk_weights, self.tokens.weights)
        own = torch.where(self.is_here, self.local, -1)
        weights = self.tokens.weights.masked_fill(~self.is_here, 0)
        return (
            is_right
            & is_equal(got.topk_idx, own[:, None])
            & is_equal(got.topk_weights, weights[:, None])
        )

    # ---- what comes back

    def outputs(self, rows: torch.Tensor, places: torch.Tensor, layout: RecvLayout) -> Any:
        """Return what the experts make of received rows, [N, H] bfloat16; ``TOKEN``: the first."""
        experts = self.tokens.ids
        if layout is RecvLayout.TOKEN:
            experts = experts.masked_fill(~self.is_here, NO_EXPERT).amin(1, keepdim=True)
            experts = experts.expand_as(places)
        nobody = len(rows)
        factor = torch.zeros(nobody + 1, device=rows.device)
        target = torch.where(self.is_here, places, nobody)
        factor.scatter_(0, target.flatten(), factor_of(experts).flatten())
        return work(rows, factor[:nobody])

    def sums(self, rows: torch.Tensor, layout: RecvLayout, *, weighted: bool) -> torch.Tensor:
        """Return the combine of this rank's tokens, of which ``rows`` arrived at the experts."""
        own = self.tokens.own
        order = self.tokens.ids[own].argsort(1)
        ids = self.tokens.ids[own].gather(1, order)
        weights = self.tokens.weights[own].gather(1, order)
        factors = factor_of(ids)
        terms = (rows[own].float()[:, None] * factors[..., None]).bfloat16().float()
        if weighted:
            terms = weights[..., None] * terms
        total = torch.zeros(rows[own].shape, device=ids.device)
        for rank in range(self.num_ranks):
            is_there = (ids >= 0) & (ids // self.num_local == rank)
            if layout is RecvLayout.TOKEN:
                is_there &= is_there.cumsum(1) == 1
            partial = torch.zeros_like(total)
            for term in terms.masked_fill(~is_there[..., None], 0).unbind(1):
                partial += term
            total = total + partial.bfloat16().float()
        return total.bfloat16()


def factor_of(experts: torch.Tensor) -> torch.Tensor:
    """Return what the stand-in of each expert multiplies its rows by."""
    return 1 + experts % NUM_FACTORS / NUM_FACTORS


def work(rows: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply rows, rounding once."""
    return (rows.float() * factor[:, None]).bfloat16()


def as_rows(sent: torch.Tensor | ScaledTensor) -> torch.Tensor:
    """Return what arrived as bfloat16; scales are left out."""
    return sent.data.bfloat16() if isinstance(sent, ScaledTensor) else sent


def as_sent(x: torch.Tensor, scale_format: str | None) -> torch.Tensor | ScaledTensor:
    """Return what travels of ``x``: itself, or its cast."""
    return x if scale_format is None else quantize_fp8(x, scale_format=scale_format)
