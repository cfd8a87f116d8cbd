# SPDX-License-Identifier: Apache-2.0
"""Generations of the ring: leased to views, reserved for graphs, and one always free."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from deepcomm.backends.cuda.generations import Generations


class Ring:
    """A ring whose views are leases that end when the test says so."""

    def __init__(self, count: int) -> None:
        self._leases: Counter[int] = Counter()
        self._count = count
        memory: Any = self
        self.generations = Generations(memory, count)

    def num_leases(self, generation: int) -> int:
        return self._leases[generation]

    def dispatch(self, *, captured: bool = False, hold: bool = True) -> tuple[int, bool]:
        """Land; return where, and whether a view is held there now."""
        landing = self.generations.choose(captured)
        assert self._leases[landing.generation] == 0, "somebody holds a view of it"
        is_held = hold and landing.may_lease
        self._leases[landing.generation] += is_held
        assert any(self._leases[g] == 0 for g in range(self._count))
        return landing.generation, is_held

    def drop(self, generation: int) -> None:
        self._leases[generation] -= 1


@pytest.mark.parametrize("count", [2, 3, 5])
def test_views_may_hold_all_but_one(count: int) -> None:
    ring = Ring(count)
    held = [ring.dispatch() for _ in range(count - 1)]
    assert held == [(generation, True) for generation in range(count - 1)]
    assert [ring.dispatch() for _ in range(2)] == [(count - 1, False)] * 2
    ring.drop(0)
    assert ring.dispatch() == (0, True)


@pytest.mark.parametrize("hold", [False, True])
def test_views_stay_out_of_what_a_graph_writes(hold: bool) -> None:
    ring = Ring(3)
    assert ring.dispatch(captured=True, hold=hold) == (0, hold)
    assert ring.dispatch() == (1, True)
    if hold:
        assert ring.dispatch() == (2, False), "a copy, for one stays free"
        ring.drop(0)
    assert ring.dispatch() == (2, True), "the graph's generation is the free one"
    assert [ring.dispatch() for _ in range(2)] == [(0, False)] * 2, "passing through"
    assert ring.generations.num_reserved == 1


def test_graphs_share_a_generation_unless_one_holds_a_view() -> None:
    ring = Ring(4)
    assert [ring.dispatch(captured=True, hold=False) for _ in range(3)] == [(0, False)] * 3
    assert [ring.dispatch(captured=True) for _ in range(3)] == [(0, True), (1, True), (2, True)]
    assert ring.dispatch(captured=True) == (3, False)
    assert ring.generations.num_reserved == 4
    ring.drop(2)
    assert ring.dispatch(captured=True) == (2, True)
    ring.drop(1)
    assert ring.dispatch() == (1, False), "all are reserved: views are copies from now on"


def test_graph_captured_beside_a_view_keeps_to_its_generation() -> None:
    ring = Ring(2)
    assert ring.dispatch() == (0, True)
    assert ring.dispatch(captured=True) == (1, False)
    ring.drop(0)
    assert ring.dispatch() == (0, True)
    assert ring.dispatch() == (1, False)
