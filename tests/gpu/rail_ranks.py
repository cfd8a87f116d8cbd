# SPDX-License-Identifier: Apache-2.0
"""What the ranks of ``test_rails`` do beside what those of ``test_backend`` do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collective.nodes import bytes_to_other_nodes
from collective.session import Session
from gpu.backend_ranks import OPTIONS

if TYPE_CHECKING:
    from collective.case import Case


def count_bytes(group: Any, case: Case) -> None:
    """Each row crosses once to the other node, and none inside a node of one rank."""
    with Session(group, case, **OPTIONS) as session:
        dispatched = session.dispatch(0)
        ids = dispatched.inputs.ids[session.rank]
        stats = session.buffer.stats()
        assert stats.bytes_network == bytes_to_other_nodes(case, ids, session.rank)
        assert stats.bytes_node == 0
        assert "NCCL" in session.buffer.explain()
