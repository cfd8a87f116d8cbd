# SPDX-License-Identifier: Apache-2.0
"""Checks of a rank mask's changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepcomm.errors import InvalidArgument

if TYPE_CHECKING:
    from deepcomm.topology import Topology


def check_peer(topology: Topology, rank: int) -> None:
    """Raise InvalidArgument unless a rank is another one of the buffer's."""
    if not 0 <= rank < topology.num_ranks or rank == topology.rank:
        raise InvalidArgument(
            f"rank: expected a peer in 0..{topology.num_ranks - 1} other than {topology.rank}, "
            f"got {rank}"
        )


def check_taken_back(rank: int, num_in_flight: int) -> None:
    """Raise InvalidArgument where a masked rank cannot be taken back.

    An operation that was sent without it would await, in its hook, rows that were never sent.

    Args:
        rank: That is masked, and shall not be any more.
        num_in_flight: Low-latency operations that wait for their hooks.
    """
    if num_in_flight > 0:
        raise InvalidArgument(
            f"masked: expected True for rank {rank}, got False while {num_in_flight} low-latency "
            "operation(s) wait for their hooks: call these first"
        )
