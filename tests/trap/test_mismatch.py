# SPDX-License-Identifier: Apache-2.0
"""Arguments or configurations that differ between ranks: ConfigMismatch naming what differs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from trap import mismatches
from trap.mismatches import CASES, ODD_RANK, Case
from trap.rounds import HIDDEN, SINGLE_NODE, TWO_NODES, Outcome, Place

from deepcomm.testing import LocalCluster, run_processes

PLACES = [SINGLE_NODE, TWO_NODES]

CONFIGURATIONS: list[tuple[str, Any]] = [
    ("num_experts", 32),
    ("num_topk", 2),
    ("hidden", HIDDEN * 2),
    ("max_tokens_per_rank", 8),
    ("growable", True),
    ("num_generations", 2),
    ("num_low_latency_slots", 3),
]


@functools.cache
def outcomes_at(place: Place) -> dict[str, list[Outcome]]:
    results = run_processes(mismatches.run_cases, place.num_ranks, place, timeout_s=120)
    assert results[0] is not None
    return results[0]


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_mismatch_raises_on_every_rank(place: Place, case: Case) -> None:
    outcomes = outcomes_at(place)[case.name]
    assert {outcome.kind for outcome in outcomes} == {"ConfigMismatch"}, outcomes
    for outcome in outcomes:
        assert case.operation in outcome.message or case.odd_operation in outcome.message
        assert case.field.split()[0] in outcome.message, outcome
        assert f"rank {ODD_RANK}" in outcome.message, outcome


@pytest.mark.parametrize(("field", "value"), CONFIGURATIONS)
def test_configuration_mismatch_raises_alike_on_every_rank(field: str, value: Any) -> None:
    outcomes = LocalCluster(2).run(
        lambda group: mismatches.construct(group, Place(2), {field: value})
    )
    for outcome in outcomes:
        assert outcome.kind == "ConfigMismatch"
        assert field in outcome.message
        assert repr(value) in outcome.message
        assert "rank 1" in outcome.message
    assert outcomes[0].message == outcomes[1].message


def test_configuration_mismatch_between_processes() -> None:
    outcomes = run_processes(mismatches.construct, 2, Place(2), {"hidden": 2 * HIDDEN})
    assert [outcome.kind for outcome in outcomes if outcome] == ["ConfigMismatch"] * 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden", 7), ("num_topk", 33), ("num_experts", 9), ("timeout_s", 0.0), ("rail", "carrier")],
)
def test_bad_configuration_on_one_rank(field: str, value: Any) -> None:
    outcomes = LocalCluster(2).run(
        lambda group: mismatches.construct(group, Place(2), {field: value})
    )
    assert outcomes[ODD_RANK].kind == "InvalidArgument"
    assert outcomes[ODD_RANK].message.startswith(f"{field}: expected")
    assert (outcomes[0].kind, outcomes[0].peer) == ("CommError", ODD_RANK)
    assert field in outcomes[0].message
