# SPDX-License-Identifier: Apache-2.0
"""Ranks between the creation of their segments and the end of construction: what those tests do."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trap import faults
from trap.faults import Fault
from trap.rounds import Inputs, check_round_trips, gather, open_buffer

from deepcomm.testing import LocalCluster

if TYPE_CHECKING:
    from trap.rounds import Place

BEFORE_CONNECTING = Fault("Buffer", "Endpoint", "connect")
PATIENCE_S = 2.0


@dataclass(frozen=True)
class Remains:
    """How a construction ended, and the names left: when it raised, and when another had begun."""

    error: str
    at_once: list[str]
    later: list[str]


def names_left(pids: set[int]) -> list[str]:
    """Return the names that are still there a moment later: a killed process ends in steps."""
    deadline = time.monotonic() + PATIENCE_S
    while (names := faults.segments_of(pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return names


def construct_alone(group: Any, place: Place) -> None:
    with open_buffer(group, place) as buffer:
        check_round_trips(buffer, Inputs(buffer))


def lose_a_rank(group: Any, place: Place, victim: int) -> Remains:
    """Construct while a rank is killed before it connects."""
    rank = group.rank()
    pids = gather(group, os.getpid())
    if rank == victim:
        with BEFORE_CONNECTING.strikes(faults.kill):
            open_buffer(group, place)
    error = ""
    try:
        open_buffer(group, place)
    except RuntimeError as problem:  # the group's own: it is what the construction waits in
        error = str(problem)
    at_once = faults.segments_of({os.getpid()})
    alone = type(place)(1)
    LocalCluster(1).run(lambda one: construct_alone(one, alone))
    return Remains(error, at_once, names_left({pids[victim]}))


def meet_another_construction(group: Any, place: Place) -> list[str]:
    """Construct beside a process that has a segment and is not connected yet."""
    own: list[str] = []

    def construct_another() -> None:
        own.extend(faults.segments_of({os.getpid()}))
        alone = type(place)(1)
        LocalCluster(1).run(lambda one: construct_alone(one, alone))
        own.extend(faults.segments_of({os.getpid()}))

    with BEFORE_CONNECTING.strikes(construct_another), open_buffer(group, place) as buffer:
        check_round_trips(buffer, Inputs(buffer))
    return own
