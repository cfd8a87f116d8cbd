# SPDX-License-Identifier: Apache-2.0
"""Which ranks share a node: found by probing shared memory, or as the user says."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Topology"]


@dataclass(frozen=True, slots=True)
class Topology:
    """Place of one rank among nodes; ranks are node-major: node = rank // G, local = rank % G."""

    rank: int
    num_ranks: int
    ranks_per_node: int

    @property
    def num_nodes(self) -> int:
        """N, nodes of the group."""
        return self.num_ranks // self.ranks_per_node

    @property
    def node(self) -> int:
        """Node of this rank."""
        return self.rank // self.ranks_per_node

    @property
    def local(self) -> int:
        """Local index of this rank in its node, which is also its rail."""
        return self.rank % self.ranks_per_node

    def rank_of(self, node: int, local: int) -> int:
        """Return the rank with local index ``local`` on node ``node``."""
        return node * self.ranks_per_node + local
