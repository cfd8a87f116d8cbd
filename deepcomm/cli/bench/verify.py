# SPDX-License-Identifier: Apache-2.0
"""Checks of results against what every rank can compute for itself: nothing is gathered.

Dispatch must match bit for bit. Combine is compared with an FP32 sum; the bound is that of the BF16
roundings on the way, relative to the sum of the terms' magnitudes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from deepcomm.fp8 import quantize_fp8
from deepcomm.types import RecvLayout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deepcomm.cli.bench.workload import Arrivals, Workload
    from deepcomm.types import DispatchOutput

__all__ = ["Mismatch", "check_combine", "check_dispatch", "check_rows", "expert_output_"]

CHUNK_ROWS = 512
BF16_ROUNDING = 2.0**-9


class Mismatch(Exception):
    """A result is wrong; the message says what, where, expected and got."""


def expert_output_(y: torch.Tensor, rank: int) -> torch.Tensor:
    """Apply the experts of ``rank`` to rows in place: a factor that differs between ranks."""
    return y.mul_(0.5 + rank % 7 * 0.25)


def check_dispatch(workload: Workload, output: DispatchOutput) -> None:
    """Check rows, scales, ids, weights and counts of a dispatch.

    Raises:
        Mismatch: Something is not as it must be.
    """
    expected = workload.arrivals
    _equal("num_tokens_per_expert", output.num_tokens_per_expert, expected.num_tokens_per_expert)
    check_rows(workload, expected, output.x, output.scales)
    weights = workload.topk_weights[expected.source, expected.token]
    if workload.config.recv_layout is RecvLayout.TOKEN:
        first = workload.rank * workload.num_local_experts
        ids = workload.topk_idx[expected.source, expected.token] - first
        elsewhere = (ids < 0) | (ids >= workload.num_local_experts)
        _equal("topk_idx", _at(output.topk_idx, expected), ids.masked_fill(elsewhere, -1))
        weights = weights.masked_fill(elsewhere, 0.0)
    else:
        weights = weights.gather(1, expected.choice[:, None])[:, 0]
    _equal("topk_weights", _at(output.topk_weights, expected), weights)


def check_rows(
    workload: Workload, expected: Arrivals, x: torch.Tensor, scales: torch.Tensor | None
) -> None:
    """Check received rows, BF16 or FP8 with scales, bit by bit.

    Raises:
        Mismatch: A row is wrong or missing.
    """
    for part in _chunks(len(expected.source)):
        rows = workload.payload.rows(expected.source[part], expected.token[part])
        index = tuple(place[part] for place in expected.index)
        if scales is None:
            _equal("x", x[index].cpu(), rows, part.start)
            continue
        cast = quantize_fp8(rows)
        _equal("x", x[index].cpu(), cast.data, part.start)
        _equal("scales", scales[index].cpu(), cast.scales, part.start)


def check_combine(
    workload: Workload, got: torch.Tensor, *, weighted: bool, num_roundings: int
) -> None:
    """Check the sums of the rows that ``expert_output_`` made.

    Args:
        workload: What was dispatched.
        got: BF16 [T, H].
        weighted: Whether each expert's row counts with its weight, instead of each rank's once.
        num_roundings: BF16 roundings a term may pass through.

    Raises:
        Mismatch: An element is out of bounds, or not a number.
    """
    factor = workload.destinations[workload.rank].float()
    if weighted:
        factor = _weight_per_rank(workload)
    for part in _chunks(workload.num_tokens):
        rows = workload.x[part].cpu()
        total = torch.zeros(rows.shape)
        magnitude = torch.zeros(rows.shape)
        for peer in range(workload.config.ranks):
            term = expert_output_(rows.clone(), peer).float() * factor[part, peer, None]
            total += term
            magnitude += term.abs()
        error = (got[part].cpu().float() - total).abs()
        wrong = ~(error <= magnitude * (num_roundings * BF16_ROUNDING))
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise Mismatch(
                f"combine: token {part.start + row}, element {column}: expected "
                f"{total[row, column].item()}, got {got[part][row, column].item()}"
            )


def _weight_per_rank(workload: Workload) -> torch.Tensor:
    """Return the sum of each token's weights on each rank, float32 [T, R]."""
    routed = workload.routed
    owner = routed.topk_idx.cpu() // workload.num_local_experts
    weight = routed.topk_weights.cpu().masked_fill(owner < 0, 0.0)
    per_rank = torch.zeros(workload.num_tokens, workload.config.ranks)
    return per_rank.scatter_add_(1, owner.clamp(min=0), weight)


def _chunks(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, CHUNK_ROWS):
        yield slice(start, min(start + CHUNK_ROWS, num_rows))


def _at(field: torch.Tensor | None, expected: Arrivals) -> torch.Tensor | None:
    return None if field is None else field[expected.index]


def _equal(name: str, got: torch.Tensor | None, expected: torch.Tensor, first_row: int = 0) -> None:
    if got is None:
        raise Mismatch(f"{name}: expected {list(expected.shape)}, got None")
    got = got.cpu()
    if got.shape != expected.shape:
        raise Mismatch(f"{name}: expected {list(expected.shape)}, got {list(got.shape)}")
    if not expected.is_floating_point():
        got = got.to(expected.dtype)
    elif got.dtype != expected.dtype:
        raise Mismatch(f"{name}: expected {expected.dtype}, got {got.dtype}")
    wrong = (_bits(got) != _bits(expected)).nonzero()
    if len(wrong):
        place = wrong[0].tolist()
        where = (place[0] + first_row, *place[1:])
        raise Mismatch(
            f"{name}: {len(wrong)} of {got.numel()} differ, first at {where}: expected "
            f"{expected[tuple(place)].item()}, got {got[tuple(place)].item()}"
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """View floating-point values as integers, so that NaN and -0 compare by their bits."""
    if not tensor.is_floating_point():
        return tensor
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.contiguous().view(kinds[tensor.element_size()])
