# SPDX-License-Identifier: Apache-2.0
"""A rank that is killed or stalls: every survivor raises in time, naming rank and operation."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from collective.case import Case
from trap import faults, masked
from trap.faults import FAULTS, Fault, Plan, Report, check_only_close_works
from trap.rounds import OPERATIONS, SINGLE_NODE, TWO_NODES, Place

from deepcomm import RecvLayout
from deepcomm.testing import run_processes

PLACES = [SINGLE_NODE, TWO_NODES]
VICTIM = 2
KILL_TIMEOUT_S = 20.0
STALL_TIMEOUT_S = 1.0
SLACK_S = 2.5
BEFORE_PEERS_WAIT = ("announce", "stage", "check_free")


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_killed_rank(place: Place, fault: Fault) -> None:
    plan = Plan(place, fault, (VICTIM,), KILL_TIMEOUT_S)
    reports = run_processes(faults.run_fault, place.num_ranks, plan, may_die=[VICTIM], timeout_s=60)
    assert reports[VICTIM] is None
    for report in reports:
        if report is None:
            continue
        outcome = report.outcome
        assert (outcome.kind, outcome.peer) == ("CommError", VICTIM), outcome
        assert outcome.message.startswith(f"{fault.operation}: rank {outcome.rank}: "), outcome
        assert f"rank {VICTIM}" in outcome.message
        assert outcome.seconds < SLACK_S  # much less than the timeout
        check_only_close_works(report)
    assert not faults.segments_of({report.pid for report in reports if report})


@pytest.mark.parametrize("fault", [*FAULTS, *faults.BEFORE_OPENING], ids=str)
def test_interrupted_rank(fault: Fault) -> None:
    plan = Plan(TWO_NODES, fault, (VICTIM,), KILL_TIMEOUT_S, faults.run_out_of_memory)
    reports = run_processes(faults.run_fault, TWO_NODES.num_ranks, plan, timeout_s=60)
    for report in reports:
        assert report is not None
        outcome = report.outcome
        if fault.step in BEFORE_PEERS_WAIT:  # refused, like a wrong argument
            later = report.later[: len(OPERATIONS)]
            assert not any(entry.kind for entry in later), later
        else:
            check_only_close_works(report)
        if outcome.rank == VICTIM:
            assert outcome.kind == "MemoryError"
            continue
        assert (outcome.kind, outcome.peer) == ("CommError", VICTIM), outcome
        assert outcome.message.startswith(f"{fault.operation}: "), outcome
        assert outcome.seconds < SLACK_S


@functools.cache
def stalls_at(place: Place) -> list[list[Report]]:
    """Stall in every operation, one after the other in the same processes; by rank."""
    plan = Plan(place, FAULTS[0], (VICTIM,), STALL_TIMEOUT_S, faults.stall)
    reports = run_processes(faults.run_stalls, place.num_ranks, plan, timeout_s=120)
    return [entry for entry in reports if entry is not None]


@pytest.mark.parametrize(
    "place", [SINGLE_NODE, pytest.param(TWO_NODES, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_stalled_rank(place: Place, fault: Fault) -> None:
    reports = [of_rank[FAULTS.index(fault)] for of_rank in stalls_at(place)]
    assert len(reports) == place.num_ranks
    for report in reports:
        outcome = report.outcome
        assert outcome.kind in ("CommTimeout", "CommError"), outcome
        assert outcome.message.startswith(f"{fault.operation}: rank {outcome.rank}: "), outcome
        check_only_close_works(report)
        if outcome.rank == VICTIM:
            continue
        assert outcome.peer is not None, outcome
        assert outcome.seconds < STALL_TIMEOUT_S + SLACK_S
    survivors = [report for report in reports if report.outcome.rank != VICTIM]
    assert any(report.outcome.kind == "CommTimeout" for report in survivors)
    assert any(report.outcome.peer == VICTIM for report in survivors)
    assert any(f"rank {VICTIM} is late" in text for report in survivors for text in report.warnings)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_killed_rank_is_masked_where_that_is_asked_for(place: Place) -> None:
    case = Case(num_ranks=place.num_ranks, ranks_per_node=place.ranks_per_node)
    case = replace(case, layout=RecvLayout.EXPERT_PADDED)
    found = run_processes(masked.outlive, place.num_ranks, case, VICTIM, may_die=[VICTIM])
    survivors = [survival for survival in found if survival is not None]
    assert len(survivors) == place.num_ranks - 1
    for survival in survivors:
        assert survival.mask == [rank == VICTIM for rank in range(place.num_ranks)]
        assert survival.seconds < SLACK_S
    assert not faults.segments_of({survival.pid for survival in survivors})
