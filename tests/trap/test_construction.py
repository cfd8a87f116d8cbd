# SPDX-License-Identifier: Apache-2.0
"""A rank killed while it constructs leaves no name in /dev/shm; others under construction stay."""

from __future__ import annotations

import pytest
from trap import construction
from trap.rounds import SINGLE_NODE, Place

from deepcomm.testing import run_processes

VICTIM = 1


@pytest.mark.parametrize("place", [Place(2), Place(2, 1)], ids=str)
def test_killed_before_connecting_leaves_no_name(place: Place) -> None:
    found = run_processes(
        construction.lose_a_rank, place.num_ranks, place, VICTIM, may_die=[VICTIM], timeout_s=60
    )
    survivors = [remains for remains in found if remains is not None]
    assert len(survivors) == place.num_ranks - 1
    for remains in survivors:
        assert remains.error
        assert remains.at_once == []
        assert remains.later == []


def test_segments_of_living_processes_are_left_alone() -> None:
    place = SINGLE_NODE
    for own in run_processes(construction.meet_another_construction, place.num_ranks, place):
        assert own is not None
        assert len(own) == 2
        assert own[0] == own[1]
