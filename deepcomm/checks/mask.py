# SPDX-License-Identifier: Apache-2.0
"""Checks of a rank mask's changes."""

from __future__ import annotations

from deepcomm.errors import InvalidArgument


def check_peer(name: str, peer: int, rank: int, num_ranks: int) -> None:
    """Raise InvalidArgument, by the argument's name, unless a rank is another one of the group."""
    if not 0 <= peer < num_ranks or peer == rank:
        raise InvalidArgument(
            f"{name}: expected a peer in 0..{num_ranks - 1} other than {rank}, got {peer}"
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
