# SPDX-License-Identifier: Apache-2.0
"""``Config``: tuning that clients pass around; its numbers reach no deepcomm operation.

deepcomm chooses chunks itself and sizes its memory by what arrives. The size hints are honest in
one way: they grow with the shape and the group, as clients' tests for "large enough" require.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepcomm.errors import InvalidArgument

__all__ = ["DEFAULT_NUM_SMS", "RANKS_OF_A_NODE", "Config"]

DEFAULT_NUM_SMS = 20
RANKS_OF_A_NODE = 8
"""Ranks that the V1 interface counts as one node."""

RECORD_BYTES = 256
HINT_ALIGN = 128


@dataclass
class Config:
    """Streaming multiprocessors, and the tokens of a chunk that senders and receivers buffer."""

    num_sms: int = DEFAULT_NUM_SMS
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InvalidArgument: One is not a positive int.
        """
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidArgument(f"{name}: expected a positive int, got {value!r}")

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Return bytes for ``num_nvl_bytes``.

        Args:
            hidden_bytes: Bytes of a row.
            num_ranks: R, ranks of the group.
        """
        peers = min(num_ranks, RANKS_OF_A_NODE)
        return self._hint(hidden_bytes, peers, self.num_max_nvl_chunked_recv_tokens)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Return bytes for ``num_rdma_bytes``: 0 for a group of one node.

        Args:
            hidden_bytes: Bytes of a row.
            num_ranks: R, ranks of the group.
        """
        if num_ranks <= RANKS_OF_A_NODE:
            return 0
        nodes = -(-num_ranks // RANKS_OF_A_NODE)
        return self._hint(hidden_bytes, 2 * nodes, self.num_max_rdma_chunked_recv_tokens)

    def _hint(self, hidden_bytes: int, num_peers: int, num_tokens: int) -> int:
        channels = max(1, self.num_sms // 2)
        num_bytes = channels * num_peers * num_tokens * (hidden_bytes + RECORD_BYTES)
        return -(-num_bytes // HINT_ALIGN) * HINT_ALIGN
