# SPDX-License-Identifier: Apache-2.0
"""What the ranks of the process tests do; a module of its own so that processes can import it."""

from __future__ import annotations

from typing import Any

import torch
from collective.workers import Communicator

from deepcomm.compat import Buffer


def exchange(group: Any, use_communicator: bool) -> float:
    """Dispatch and combine in one process of several; returns the largest error."""
    comm = Communicator(group) if use_communicator else None
    buffer = Buffer(None if use_communicator else group, 0, 0, comm=comm)
    generator = torch.Generator().manual_seed(buffer.rank)
    ids = torch.rand(9, 6, generator=generator).topk(2).indices
    x = torch.randn(9, 64, generator=generator)
    layout = buffer.get_dispatch_layout(ids, 6)
    rows, *_, handle, _ = buffer.dispatch(x, topk_idx=ids, num_tokens_per_expert=layout[2])
    total = buffer.combine(rows, handle)[0]
    return float((total - x * layout[3].sum(1, keepdim=True)).abs().max())
