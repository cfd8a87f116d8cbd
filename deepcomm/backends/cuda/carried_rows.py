# SPDX-License-Identifier: Apache-2.0
"""How much of an operation a network carries."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from deepcomm.fp8 import num_scale_words
from deepcomm.types import ScaledTensor

if TYPE_CHECKING:
    from deepcomm.backends.base import CombineRequest, DispatchRequest

__all__ = ["CarriedRows", "RowBytes"]


@dataclass(frozen=True, slots=True)
class CarriedRows:
    """Rows of a dispatch between this rank and each of its rail.

    Attributes:
        to: Of this rank, for each.
        from_: For this rank, by where they come from.
        ids_are_64: Whether each takes int64 ids.
    """

    to: tuple[int, ...]
    from_: tuple[int, ...]
    ids_are_64: tuple[bool, ...]

    def first_rows(self) -> list[int]:
        """Return where the rows of each begin in the landing area."""
        return [0, *accumulate(self.from_)]

    def first_sums(self, rank: int) -> list[int]:
        """Return where the sums of each begin in the combine region; the own rank has none."""
        return [0, *accumulate(0 if peer == rank else rows for peer, rows in enumerate(self.to))]


@dataclass(frozen=True, slots=True)
class RowBytes:
    """Bytes of one row, array by array.

    Attributes:
        num_topk: Ids of a row, 4 or 8 bytes each.
    """

    row: int
    scales: int
    num_topk: int
    weights: int

    @staticmethod
    def of_dispatch(request: DispatchRequest, hidden: int, num_topk: int) -> RowBytes:
        """Return those of a dispatch, some of whose arguments may be wrong."""
        is_ue8m0 = request.scale_format == "ue8m0"
        if isinstance(request.x, ScaledTensor):
            is_ue8m0 = request.x.scales.dtype != torch.float32
        return RowBytes(
            row=hidden * (1 if request.sends_fp8 else 2),
            scales=4 * num_scale_words(hidden, is_ue8m0=is_ue8m0) * request.sends_fp8,
            num_topk=num_topk,
            weights=4 * num_topk * (request.topk_weights is not None),
        )

    @staticmethod
    def of_combine(request: CombineRequest, hidden: int) -> RowBytes:
        """Return those of a combine, likewise."""
        num_topk = int(request.handle.topk_idx.shape[1])
        is_carried = request.topk_weights is not None and not request.apply_weights
        return RowBytes(2 * hidden, 0, num_topk, 4 * num_topk * is_carried)
