# SPDX-License-Identifier: Apache-2.0
"""Which ranks share a node: found by probing shared memory, or as the user says."""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deepcomm.errors import CommError, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from deepcomm.group import Group

__all__ = ["Topology", "find_nodes"]

SHARED_MEMORY = Path("/dev/shm")


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

    @property
    def node_ranks(self) -> range:
        """Ranks of this node."""
        first = self.node * self.ranks_per_node
        return range(first, first + self.ranks_per_node)

    @property
    def rail_ranks(self) -> list[int]:
        """Ranks of this rail, by node."""
        return [self.rank_of(node, self.local) for node in range(self.num_nodes)]

    def rank_of(self, node: int, local: int) -> int:
        """Return the rank with local index ``local`` on node ``node``."""
        return node * self.ranks_per_node + local


def discover(group: Group, ranks_per_node: int | None) -> Topology:
    """Find out which ranks share memory, and check that they make equal, node-major nodes.

    Args:
        group: The control plane; collective.
        ranks_per_node: The user's choice: then every block of that many ranks must share memory.

    Raises:
        InvalidArgument: Ranks are not node-major, nodes are uneven, or the ranks of a chosen node
            do not share memory. Raised alike on every rank.
        CommError: A rank cannot create a file in shared memory.
    """
    with probe_file(group) as names:
        visible = frozenset(rank for rank, name in enumerate(names) if is_visible(name))
        reach = group.all_gather(visible)
    return nodes_of(group.rank, reach, ranks_per_node)


def find_nodes(rank: int, labels: Sequence[str], ranks_per_node: int | None) -> Topology:
    """Return the nodes that ranks with one label each make.

    Args:
        rank: This rank.
        labels: By rank.
        ranks_per_node: The user's choice: then the ranks of every node must have one label.

    Raises:
        InvalidArgument: As ``discover`` does.
    """
    reach = [
        frozenset(other for other, its in enumerate(labels) if its == label) for label in labels
    ]
    return nodes_of(rank, reach, ranks_per_node)


def nodes_of(rank: int, reach: list[frozenset[int]], ranks_per_node: int | None) -> Topology:
    """Return the nodes that follow from what every rank reaches, or the chosen ones."""
    if ranks_per_node is None:
        ranks_per_node = check_nodes(reach)
    else:
        check_blocks(reach, ranks_per_node)
    return Topology(rank, len(reach), ranks_per_node)


@contextlib.contextmanager
def probe_file(group: Group) -> Iterator[list[str | None]]:
    """Create this rank's probe, yield the names of all, and remove it again."""
    name = f"deepcomm-probe-{uuid.uuid4().hex}"
    path = SHARED_MEMORY / name
    created = True
    try:
        path.touch(exist_ok=False)
    except OSError:
        created = False
    try:
        names = group.all_gather(name if created else None)
        if None in names:
            rank = names.index(None)
            raise CommError(
                f"rank {group.rank}: rank {rank} cannot create a file in {SHARED_MEMORY}", rank
            )
        yield names
    finally:
        if created:
            path.unlink(missing_ok=True)


def is_visible(name: str | None) -> bool:
    """Return whether the probe of that name can be seen from here."""
    return name is not None and (SHARED_MEMORY / name).exists()


def check_nodes(reach: list[frozenset[int]]) -> int:
    """Return the ranks per node that the reachability of all ranks implies."""
    num_ranks = len(reach)
    per_node = len(reach[0])
    for rank, ranks in enumerate(reach):
        if sorted(ranks) != list(range(min(ranks), min(ranks) + len(ranks))):
            raise InvalidArgument(
                "group: expected node-major ranks (all ranks of a node adjacent), got rank "
                f"{rank} sharing a node with ranks {sorted(ranks)}"
            )
        if len(ranks) != per_node or num_ranks % per_node:
            raise InvalidArgument(
                f"group: expected nodes with equal numbers of ranks, got {per_node} on the node of "
                f"rank 0 and {len(ranks)} on that of rank {rank} ({num_ranks} in all)"
            )
    return per_node


def check_blocks(reach: list[frozenset[int]], ranks_per_node: int) -> None:
    """Check that the ranks of every chosen node see each other."""
    for rank, ranks in enumerate(reach):
        first = rank - rank % ranks_per_node
        missing = set(range(first, first + ranks_per_node)) - ranks
        if missing:
            raise InvalidArgument(
                f"ranks_per_node: expected ranks {first}..{first + ranks_per_node - 1} to share "
                f"memory, got rank {rank} that does not see ranks {sorted(missing)}"
            )
