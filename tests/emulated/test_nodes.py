# SPDX-License-Identifier: Apache-2.0
"""Several nodes on the emulator, a stage on the rail and one inside the node, and the reference.

Scenarios and oracle are those of one node (``test_matrix.py``).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from collective.case import Case
from collective.nodes import NODES_CASES, SHAPE_CASES, TWO_BY_TWO, bytes_to_other_nodes
from collective.session import Oracle, Session
from emulated.cluster import RankStopped
from emulated.conftest import Schedules
from emulated.host_api import Faults
from emulated.operations import HIGH_THROUGHPUT_ONLY, exchange_emulated, exchange_until_failure
from emulated.runtime import run_emulated

from deepcomm import RecvLayout
from deepcomm.errors import CommTimeout
from deepcomm.testing import LocalGroup

pytestmark = pytest.mark.emulated_backend


@pytest.mark.parametrize("case", NODES_CASES, ids=lambda case: case.id)
def test_exchange_of_nodes_equals_reference(schedules: Schedules, case: Case) -> None:
    oracle = Oracle()
    # Blocks among each other are what one node already shows.
    for settings in schedules(num_sms=1 if case.num_ranks > 4 else 2):
        exchange_emulated(settings, case, oracle)


SLOW = {
    "delayed": Faults(delay_rank=1, delay_from_ns=50_000, delay_for_ns=2_000_000),
    "slow-rail": Faults(slow_src=0, slow_dst=2, slow_extra_ns=100_000),
    "slow-inside": Faults(slow_src=2, slow_dst=3, slow_extra_ns=100_000),
}


@pytest.mark.parametrize("fault", SLOW)
@pytest.mark.parametrize("layout", RecvLayout)
def test_exchange_of_nodes_equals_reference_beside_slow_peers(
    schedules: Schedules, layout: RecvLayout, fault: str
) -> None:
    case, oracle = replace(TWO_BY_TWO, layout=layout), Oracle()
    for settings in schedules(faults=SLOW[fault]):
        exchange_emulated(settings, case, oracle)


STOPPED = 3


@pytest.mark.parametrize("stop_at_ns", [0, 30_000, 100_000, 200_000, 400_000])
@pytest.mark.parametrize("layout", RecvLayout)
def test_stopped_node_ends_the_operation_everywhere(
    schedules: Schedules, layout: RecvLayout, stop_at_ns: int
) -> None:
    case, oracle = replace(TWO_BY_TWO, layout=layout), Oracle()
    errors: dict[int, int | None] = {}

    def run_into_timeout(group: LocalGroup) -> None:
        if group.rank == STOPPED:
            exchange_until_failure(group, case, oracle)
        with pytest.raises(CommTimeout) as caught:
            exchange_until_failure(group, case, oracle)
        errors[group.rank] = caught.value.peer

    for settings in schedules(faults=Faults(stop_rank=STOPPED, stop_at_ns=stop_at_ns)):
        with pytest.raises(RankStopped):
            run_emulated(run_into_timeout, case.num_ranks, settings)
        assert set(errors) == set(range(case.num_ranks)) - {STOPPED}
        # Some rank misses the stopped one; others may run out of time on ranks that do.
        assert STOPPED in errors.values()
        for rank, peer in errors.items():
            assert peer is not None
            # Of its node or of its rail.
            assert peer != rank
            assert peer // 2 == rank // 2 or peer % 2 == rank % 2
        errors.clear()


@pytest.mark.parametrize("case", [replace(TWO_BY_TWO, wire="fp8"), SHAPE_CASES[3]], ids=str)
def test_token_crosses_once_per_node(schedules: Schedules, case: Case) -> None:
    """What a rank counts on its rail is its tokens times the other nodes that they visit."""
    oracle = Oracle()

    def count(group: LocalGroup) -> None:
        with Session(group, case, oracle, **HIGH_THROUGHPUT_ONLY) as session:
            dispatched = session.dispatch(0)
            after_dispatch = session.buffer.stats()
            session.combine(dispatched)
            after_combine = session.buffer.stats()
            ids = dispatched.inputs.ids[group.rank]
            assert after_dispatch.bytes_network == bytes_to_other_nodes(case, ids, group.rank)
            # What comes back was sent by ranks of the rail: together they bring as many rows.
            assert after_combine.bytes_network >= after_dispatch.bytes_network

    for settings in schedules():
        run_emulated(count, case.num_ranks, settings)
