# SPDX-License-Identifier: Apache-2.0
"""Scales of the expert layouts: from rows, as they arrive, to the columns that GEMMs take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepcomm._C import kernels
from deepcomm.backends.cuda.tensors import SCALE_ROW_ALIGN, address_of

if TYPE_CHECKING:
    import torch

    from deepcomm.backends.cuda.domain import Domain

__all__ = ["turn_scales"]


def turn_scales(
    domain: Domain, rows: torch.Tensor, columns: torch.Tensor, used_rows: torch.Tensor
) -> None:
    """Launch dispatch_scales.

    Args:
        domain: Whose kernels to launch.
        rows: [blocks, rows, words], or [rows, words], as dispatch_send has written them.
        columns: Of the same shape, its words apart; filled.
        used_rows: int32 [blocks]: rows to turn.
    """
    block_rows, words = columns.shape[-2:]
    params = kernels.ScaleParams()
    params.rows = address_of(rows)
    params.columns = address_of(columns)
    params.used_rows = address_of(used_rows)
    params.num_blocks = columns.shape[0] if columns.ndim == 3 else 1
    params.block_rows = block_rows
    params.column_words = -(-block_rows // SCALE_ROW_ALIGN) * SCALE_ROW_ALIGN
    params.scale_words = words
    domain.launch(domain.functions.scales, domain.num_sms, params)
