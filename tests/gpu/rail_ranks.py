# SPDX-License-Identifier: Apache-2.0
"""What the ranks of ``test_rails`` do beside what those of ``test_backend`` do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collective.session import Session
from gpu.backend_ranks import OPTIONS

if TYPE_CHECKING:
    from collective.case import Case


def count_bytes(group: Any, case: Case) -> None:
    """Each row crosses once to the other node, and none inside a node of one rank."""
    with Session(group, case, **OPTIONS) as session:
        dispatched = session.dispatch(0)
        assert case.ranks_per_node is not None
        per_node = case.experts_per_rank * case.ranks_per_node
        ids = dispatched.inputs.ids[session.rank]
        node = session.rank // case.ranks_per_node
        visits = [{int(i) // per_node for i in row if i >= 0} - {node} for row in ids]
        row_bytes = case.hidden + 4 * -(-case.hidden // 128)
        stats = session.buffer.stats()
        assert stats.bytes_network == sum(map(len, visits)) * row_bytes
        assert stats.bytes_node == 0
        assert "NCCL" in session.buffer.explain()
