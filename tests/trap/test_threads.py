# SPDX-License-Identifier: Apache-2.0
"""Ranks as threads: one that does not come, or closes its buffer, is noticed like a process."""

from __future__ import annotations

import logging

import pytest
from trap import threads
from trap.rounds import OPERATIONS, Outcome, Place
from trap.threads import TIMEOUT_S, VICTIM

from deepcomm.testing import LocalCluster

PLACES = [Place(3), Place(2, 1)]


def run(function: object, place: Place, operation: str) -> list[list[Outcome]]:
    cluster = LocalCluster(place.num_ranks)
    return cluster.run(lambda group: function(group, place, operation))  # type: ignore[operator]


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_rank_that_does_not_come(
    place: Place, operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "deepcomm"):
        outcomes = run(threads.run_without_victim, place, operation)
    assert f"rank {VICTIM} is late" in caplog.text
    timed_out = 0
    for first, *later in filter(None, outcomes):
        timed_out += first.kind == "CommTimeout"
        assert first.kind in ("CommTimeout", "CommError")
        assert first.peer == VICTIM
        assert first.message.startswith(f"{operation}: rank {first.rank}: ")
        assert first.seconds < TIMEOUT_S + 1.0
        for name, outcome in zip(OPERATIONS, later, strict=True):
            assert outcome.kind == "CommError"
            assert outcome.message.startswith(f"{name}: the buffer can only be closed after: ")
    assert timed_out


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_rank_that_closes_its_buffer(place: Place, operation: str) -> None:
    outcomes = run(threads.run_beside_closed_buffer, place, operation)
    for (outcome,) in outcomes:
        assert outcome.kind == "CommError"
        assert outcome.message.startswith(f"{operation}: ")
        assert outcome.seconds < 2.0
        if outcome.rank == VICTIM:
            assert outcome.message == f"{operation}: the buffer is closed"
        else:
            assert outcome.peer == VICTIM
