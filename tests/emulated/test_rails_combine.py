# SPDX-License-Identifier: Apache-2.0
"""Combines whose sums a network carries: when it is told of them, and what comes to nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from collective.session import Oracle, Session
from emulated.conftest import Schedules
from emulated.test_rails import CARRIED, PAIR, make_parts_small, run_carried
from emulated.test_trouble import layout_case
from emulated.test_trouble_nodes import fail_twice

from deepcomm import RecvLayout
from deepcomm.testing import LocalGroup

pytestmark = pytest.mark.emulated_backend

TOKEN, EXPERT, _ = RecvLayout


@pytest.mark.parametrize("layout", [TOKEN, EXPERT])
def test_parts_are_launched_between_the_stages(
    schedules: Schedules, monkeypatch: pytest.MonkeyPatch, layout: RecvLayout
) -> None:
    """Behind the node's kernel, which writes them, and not behind the rail's, which awaits all."""
    case, oracle = replace(PAIR, num_tokens=34, layout=layout, routing="uniform"), Oracle()
    make_parts_small(monkeypatch, case)
    launched: list[str] = []

    def combine(group: LocalGroup) -> None:
        with Session(group, case, oracle, **CARRIED) as session:
            received = session.dispatch(0)
            runtime: Any = session.buffer._backend.runtime  # type: ignore[attr-defined]
            launch = runtime.launch

            def note(function: Any, grid: int, params: Any) -> None:
                if group.rank == 0:
                    launched.append(function.name)
                launch(function, grid, params)

            runtime.launch = note
            session.combine(received)

    step = ["rail_gate", "rail_deliver"]
    for settings in schedules():
        launched.clear()
        run_carried(combine, case, settings)
        assert launched[:4] == ["combine_open", *step, "combine"]
        assert launched[-1] == "combine_nodes"
        parts = launched[4:-1]
        assert len(parts) > len(step)
        assert parts == step * (len(parts) // len(step))


@pytest.mark.parametrize("layout", RecvLayout)
def test_host_that_fails_before_it_launches_carries_as_much(
    schedules: Schedules, layout: RecvLayout
) -> None:
    """As its peers, who hear of it and go on."""
    case, oracle = layout_case(layout, "2x2"), Oracle()

    def fail(group: LocalGroup) -> None:
        with Session(group, case, oracle, **CARRIED) as session:
            fail_twice(session, "combine", told=set(range(case.num_ranks)))

    for settings in schedules():
        run_carried(fail, case, settings)
