# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend's host code and kernels on the emulator, against the reference, bit for bit.

The scenarios and the oracle are those of the other backends (``tests/collective``).
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from collective.case import Case, Inputs
from collective.scenario import low_latency_exchange
from collective.session import Oracle, Session
from emulated.cluster import RankStopped
from emulated.conftest import Schedules
from emulated.host_api import Faults
from emulated.operations import (
    HIGH_THROUGHPUT_ONLY,
    exchange_emulated,
    exchange_until_failure,
)
from emulated.runtime import EmulatedRuntime, LazyKernel, run_emulated

from deepcomm import RecvLayout
from deepcomm.errors import CommError, CommTimeout, InvalidArgument
from deepcomm.jit import KERNELS
from deepcomm.testing import LocalGroup
from deepcomm.testing.oracle import ROUTING_KINDS

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.emulated_backend

TOKEN, EXPERT, PADDED = RecvLayout
WIRES = ("bf16", "fp8", "fp8_ue8m0", "scaled", "scaled_ue8m0")
MANY_RANKS = 8
SMALL = Case(num_ranks=3, num_tokens=10)
APART = Case(num_ranks=2, num_tokens=10, ranks_per_node=1)

WIRE_CASES = [
    replace(SMALL, layout=layout, wire=wire, alignment=8 if layout is EXPERT else 1)
    for layout, wire in itertools.product(RecvLayout, WIRES)
]
CLUSTER_CASES = [
    replace(SMALL, num_ranks=ranks, num_tokens=6, num_topk=3, experts_per_rank=3, layout=layout)
    for ranks, layout in itertools.product((1, 2, MANY_RANKS), RecvLayout)
]
ROUTING_CASES = [
    replace(SMALL, routing=routing, layout=layout)
    for routing, layout in itertools.product(ROUTING_KINDS, RecvLayout)
]
OPTION_CASES = [
    *(replace(SMALL, id_dtype=torch.int32, layout=layout) for layout in RecvLayout),
    *(replace(SMALL, strided=True, wire="scaled", layout=layout) for layout in RecvLayout),
    *(replace(SMALL, even=True, num_tokens=1, layout=layout) for layout in RecvLayout),
    *(replace(SMALL, capacity=capacity, layout=layout, num_topk=3) for layout in (TOKEN, EXPERT)
      for capacity in (4, 40)),
    *(replace(SMALL, alignment=alignment, layout=EXPERT, wire="fp8") for alignment in (3, 128)),
    # Only padding does not fit, which is no loss.
    replace(SMALL, layout=EXPERT, alignment=16, capacity=12, experts_per_rank=1),
    # More chunks than are announced at once, rows of several vectors a lane, more tiles of scales.
    *(replace(SMALL, num_tokens=70, even=True, layout=layout) for layout in RecvLayout),
    *(replace(SMALL, hidden=1040, num_ranks=2, wire="fp8", layout=layout) for layout in RecvLayout),
    # Rows that are cast in two parts, whose scales bulk copies move or not.
    *(replace(SMALL, hidden=hidden, num_ranks=2, wire=wire, layout=layout) for layout in RecvLayout
      for hidden, wire in ((4096, "fp8"), (1024, "fp8_ue8m0"))),
]  # fmt: skip
CASES = list(dict.fromkeys(WIRE_CASES + CLUSTER_CASES + ROUTING_CASES + OPTION_CASES))
# Kernels of their own tests run every other one: test_low_latency.py.
LOW_LATENCY_CASES = [case for case in WIRE_CASES if case.layout is not EXPERT]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_exchange_equals_reference(schedules: Schedules, case: Case) -> None:
    oracle, num_sms = Oracle(), 1 if case.num_ranks == MANY_RANKS else 2
    for settings in schedules(num_sms=num_sms):
        exchange_emulated(settings, case, oracle)


@pytest.mark.parametrize("case", LOW_LATENCY_CASES, ids=lambda case: case.id)
def test_low_latency_exchange_equals_reference(schedules: Schedules, case: Case) -> None:
    oracle = Oracle()
    for settings in schedules():
        run_emulated(
            lambda group: low_latency_exchange(group, case, oracle), case.num_ranks, settings
        )


@pytest.mark.parametrize("num_sms", [1, 3, 5])
@pytest.mark.parametrize("layout", RecvLayout)
def test_exchange_equals_reference_for_any_number_of_blocks(
    schedules: Schedules, layout: RecvLayout, num_sms: int
) -> None:
    case, oracle = replace(SMALL, num_tokens=20, layout=layout), Oracle()
    for settings in schedules(num_sms=num_sms):
        exchange_emulated(settings, case, oracle)


@pytest.mark.parametrize("layout", RecvLayout)
def test_warps_count_more_tokens_than_they_have_lanes(
    schedules: Schedules, layout: RecvLayout
) -> None:
    case = Case(num_ranks=2, num_tokens=300, even=True, hidden=16, num_topk=3, layout=layout)
    oracle = Oracle()
    for settings in itertools.islice(schedules(num_sms=1), 1):
        exchange_emulated(settings, case, oracle)


class FewTravel(Oracle):
    """Inputs of which only some early tokens and the last ones have experts."""

    def get(self, key: Any, compute: Callable[[], Any]) -> Any:
        return super().get(key, lambda: self._thin_out(compute()))

    @staticmethod
    def _thin_out(result: Any) -> Any:
        if isinstance(result, Inputs):
            for ids in result.ids:
                ids[:64] = -1
                ids[192:-64] = -1
        return result


def test_warps_pass_more_empty_chunks_than_they_have_lanes(schedules: Schedules) -> None:
    case = Case(num_ranks=2, num_tokens=2400, even=True, hidden=16, num_topk=1, layout=EXPERT)
    settings = next(iter(schedules(num_sms=1)))

    def exchange_once(group: LocalGroup) -> None:
        with Session(group, case, oracle, **HIGH_THROUGHPUT_ONLY) as session:
            session.combine(session.dispatch(0), apply_weights=True)

    oracle = FewTravel()
    run_emulated(exchange_once, case.num_ranks, settings)


SLOW = {
    "delayed": Faults(delay_rank=1, delay_from_ns=50_000, delay_for_ns=2_000_000),
    "slow-link": Faults(slow_src=0, slow_dst=2, slow_extra_ns=100_000),
}


@pytest.mark.parametrize("fault", SLOW)
@pytest.mark.parametrize("layout", RecvLayout)
def test_exchange_equals_reference_beside_slow_peers(
    schedules: Schedules, layout: RecvLayout, fault: str
) -> None:
    case, oracle = replace(SMALL, layout=layout), Oracle()
    for settings in schedules(faults=SLOW[fault]):
        exchange_emulated(settings, case, oracle)


@pytest.mark.parametrize("stop_at_ns", [0, 30_000, 100_000, 200_000, 400_000])
@pytest.mark.parametrize("layout", RecvLayout)
def test_stopped_rank_is_named_by_its_peers(
    schedules: Schedules, layout: RecvLayout, stop_at_ns: int
) -> None:
    case, oracle = replace(SMALL, layout=layout), Oracle()
    errors: dict[int, int | None] = {}

    def run_into_timeout(group: LocalGroup) -> None:
        if group.rank == 1:
            exchange_until_failure(group, case, oracle)
        with pytest.raises(CommTimeout) as caught:
            exchange_until_failure(group, case, oracle)
        errors[group.rank] = caught.value.peer

    for settings in schedules(faults=Faults(stop_rank=1, stop_at_ns=stop_at_ns)):
        with pytest.raises(RankStopped):
            run_emulated(run_into_timeout, case.num_ranks, settings)
        assert set(errors) == {0, 2}
        # A rank may run out of time on one that runs out of time on the stopped one.
        assert 1 in errors.values()
        assert all(peer in {0, 1, 2} - {rank} for rank, peer in errors.items())
        errors.clear()


def test_every_kernel_of_the_backend_is_run(
    schedules: Schedules, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: set[str] = set()
    launch = EmulatedRuntime.launch

    def remember(self: EmulatedRuntime, function: LazyKernel, grid: int, params: Any) -> None:
        launched.add(function.name)
        launch(self, function, grid, params)

    monkeypatch.setattr(EmulatedRuntime, "launch", remember)
    for layout, wire in itertools.product(RecvLayout, ("bf16", "fp8")):
        exchange_emulated(schedules()[0], replace(SMALL, layout=layout, wire=wire), Oracle())
    run_emulated(use_low_latency, SMALL.num_ranks, schedules()[0])
    for rail in ("nccl", "gin"):
        settings = replace(schedules()[0], has_network=True)
        run_emulated(partial(use_network, rail=rail), APART.num_ranks, settings)
    assert launched == {
        kernel.name for kernel in KERNELS if not kernel.source.startswith("kernels/probe/")
    }


RANGES = [
    *("deepcomm.dispatch", "deepcomm.combine"),
    *("deepcomm.low_latency_dispatch", "deepcomm.low_latency_combine"),
    *("deepcomm.low_latency_dispatch", "deepcomm.low_latency_dispatch.hook"),
    *("deepcomm.low_latency_combine", "deepcomm.low_latency_combine.hook"),
]


def use_network(group: LocalGroup, rail: str) -> None:
    """Operations of both modes and a refusal, where a network is between the ranks."""
    with Session(group, APART, rail=rail) as session:
        session.combine(session.dispatch(0))
        session.low_latency_combine(session.low_latency_dispatch(0))
        refuse_low_latency(session)


def refuse_low_latency(session: Session) -> None:
    """Let rank 0 bring rows of a wrong size."""
    hidden = session.case.hidden + 8 * (session.rank == 0)
    rows = torch.zeros(1, hidden, dtype=torch.bfloat16)
    # Raised there at once, at the peers where their host hears of it.
    with contextlib.suppress(CommError, InvalidArgument):
        session.buffer.low_latency_dispatch(rows, torch.tensor([[0, 1]]))


def use_low_latency(group: LocalGroup) -> None:
    """Both operations, a refusal and a mask; nothing is loaded for them but at construction."""
    with Session(group, SMALL) as session:
        group.runtime.load = None  # type: ignore[assignment, method-assign, union-attr]
        session.combine(session.dispatch(0))
        for hook in (False, True):
            received = session.low_latency_dispatch(0, return_hook=hook)
            received.finish()
            session.low_latency_combine(received, return_hook=hook).finish()
        assert group.runtime.ranges == RANGES  # type: ignore[union-attr]
        refuse_low_latency(session)
        assert not group.runtime.open_ranges  # type: ignore[union-attr]
        session.buffer.set_rank_mask((group.rank + 1) % group.size, False)
