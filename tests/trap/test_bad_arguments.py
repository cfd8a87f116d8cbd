# SPDX-License-Identifier: Apache-2.0
"""A wrong argument on one rank: it raises InvalidArgument, its peers CommError naming it."""

from __future__ import annotations

import functools

import pytest
from trap import bad_argument_ranks as ranks
from trap.bad_arguments import ALL, Case, ident
from trap.rounds import SINGLE_NODE, TWO_NODES, Outcome, Place

from deepcomm.testing import LocalCluster, run_processes

PLACES = [SINGLE_NODE, TWO_NODES]


@functools.cache
def outcomes_at(place: Place) -> dict[str, tuple[int, list[Outcome]]]:
    """Run all cases once, in processes that end with round trips on the same buffer."""
    results = run_processes(ranks.run_cases, place.num_ranks, place, timeout_s=120)
    assert results[0] is not None
    return results[0]


def check(operation: str, case: Case, bad_rank: int, outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.rank == bad_rank:
            assert outcome.kind == "InvalidArgument", outcome
            assert case.names_argument in outcome.message
        else:
            assert (outcome.kind, outcome.peer) == ("CommError", bad_rank), outcome
            assert outcome.message.startswith(f"{operation}: "), outcome
            assert case.names_argument in outcome.message


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(("operation", "case"), [pytest.param(*e, id=ident(*e)) for e in ALL])
def test_bad_argument_on_one_rank(place: Place, operation: str, case: Case) -> None:
    bad_rank, outcomes = outcomes_at(place)[ident(operation, case)]
    check(operation, case, bad_rank, outcomes)


def test_bad_arguments_between_threads() -> None:
    outcomes = LocalCluster(3).run(lambda group: ranks.run_cases(group, Place(3)))[0]
    for operation, case in ALL:
        check(operation, case, *outcomes[ident(operation, case)])


def test_handle_before_its_hook_is_refused() -> None:
    outcomes = LocalCluster(3).run(lambda group: ranks.combine_before_hook(group, Place(3)))
    assert outcomes[1].kind == "InvalidArgument"
    assert "hook" in outcomes[1].message
    for outcome in (outcomes[0], outcomes[2]):
        assert (outcome.kind, outcome.peer) == ("CommError", 1), outcome
        assert "hook" in outcome.message
