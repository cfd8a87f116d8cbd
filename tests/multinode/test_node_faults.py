# SPDX-License-Identifier: Apache-2.0
"""A node that dies or is cut off: every other rank raises in time, and nothing is left behind."""

from __future__ import annotations

import pytest
from multinode import netns, ranks
from trap import faults
from trap.faults import FAULTS, Fault, Plan, Report, check_only_close_works
from trap.rounds import Place

pytestmark = pytest.mark.multi_node

LAST_STEPS = {"receive", "finish"}
TIMEOUT_S, SLACK_S = 1.5, 2.5
FOUND = Place(4)  # the nodes are found, not given
IN_MIDDLE = [fault for fault in FAULTS if fault.step not in LAST_STEPS]


def check(report: Report, fault: Fault, kinds: tuple[str, ...]) -> None:
    outcome = report.outcome
    assert outcome.kind in kinds, outcome
    assert outcome.message.startswith(f"{fault.operation}: rank {outcome.rank}: "), outcome
    assert outcome.peer is not None
    check_only_close_works(report)


@pytest.mark.parametrize("fault", IN_MIDDLE, ids=str)
def test_killed_node(fault: Fault) -> None:
    plan = Plan(FOUND, fault, (2, 3), timeout_s=20.0)
    with netns.nodes_of(2) as nodes:
        reports = netns.run_on_nodes(nodes, 2, faults.run_fault, plan, may_die=(2, 3))
        assert not any(node.leftovers() for node in nodes)
    assert reports[2:] == [None, None]
    for report in reports[:2]:
        check(report, fault, ("CommError",))
        assert report.outcome.peer in plan.victims
        assert report.outcome.seconds < SLACK_S


@pytest.mark.parametrize("fault", IN_MIDDLE, ids=str)
def test_cut_link(fault: Fault) -> None:
    plan = Plan(FOUND, fault, (3,), TIMEOUT_S, ranks.cut_own_link)
    with netns.nodes_of(2) as nodes:
        reports = netns.run_on_nodes(nodes, 2, faults.run_fault, plan)
        assert not any(node.leftovers() for node in nodes)
    for report in reports:
        check(report, fault, ("CommTimeout", "CommError"))
        assert report.outcome.seconds < TIMEOUT_S + SLACK_S
    assert any(report.outcome.kind == "CommTimeout" for report in reports)
