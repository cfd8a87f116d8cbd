# SPDX-License-Identifier: Apache-2.0
"""Low latency over several nodes on GPUs against the reference, bit for bit; ranks are threads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from collective.session import Oracle
from gpu import backend_cases as cases
from gpu import low_latency_ranks as ranks

from deepcomm.testing import LocalCluster

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective.case import Case

pytestmark = pytest.mark.gpu(1)

NUM_REPLAYS = 8
CASES = cases.low_latency_nodes()


def by_threads(num_ranks: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    return LocalCluster(num_ranks, device="cuda:0").run(lambda group: body(group, *args))


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_low_latency_over_nodes_equals_reference(case: Case) -> None:
    by_threads(case.num_ranks, ranks.fly_all, [case], Oracle())


@pytest.mark.parametrize("case", cases.LOW_LATENCY_GRAPHS, ids=lambda case: case.id)
def test_graph_of_hooks_over_nodes_replays(case: Case) -> None:
    counts = by_threads(case.num_ranks, ranks.replay, case, NUM_REPLAYS, Oracle())
    assert counts == [NUM_REPLAYS] * case.num_ranks


def test_absent_rank_of_a_node_is_named() -> None:
    case = replace(cases.LOW_LATENCY_GRAPHS[0], even=True)
    absent = case.num_ranks - 1
    for rank, peer in enumerate(by_threads(case.num_ranks, ranks.miss_a_peer, case)[:absent]):
        assert peer is not None
        is_near = rank // 2 == absent // 2 or rank % 2 == absent % 2
        assert peer == absent if is_near else peer // 2 == rank // 2
