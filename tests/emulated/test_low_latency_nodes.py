# SPDX-License-Identifier: Apache-2.0
"""Low latency over several nodes on the emulator, against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from collective.case import Case, Inputs, make_outputs
from collective.nodes import LOW_LATENCY_CASES, LOW_LATENCY_SLOW_CASES, LOW_LATENCY_TWO_BY_TWO
from emulated.cluster import Settings
from emulated.host_api import Faults
from emulated.low_latency import (
    LowLatencySession,
    combine_what_cancels,
    play,
    use_small_blocks,
)
from emulated.test_graphs import CapturingRuntime
from emulated.test_low_latency import all_operations, combine_unaware, go_on, request_of

from deepcomm import (
    CommError,
    ConfigMismatch,
    Handle,
    InvalidArgument,
    RecvLayout,
    reference,
)
from deepcomm.backends.base import CombineRequest
from deepcomm.testing.oracle import assert_combine_equal, assert_dispatch_equal

pytestmark = pytest.mark.emulated_backend

TOKEN, _, PADDED = RecvLayout
SEEDS = 6
RAILS = ("lsa", "nccl")
PADDED_CASE = replace(LOW_LATENCY_TWO_BY_TWO, layout=PADDED)
THREE_BY_TWO = replace(PADDED_CASE, num_ranks=6, num_tokens=3)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


@pytest.mark.parametrize("case", LOW_LATENCY_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("seed", range(2))
def test_results_over_nodes_equal_the_reference(case: Case, seed: int) -> None:
    play(case, all_operations, Settings(seed, num_sms=1 + seed))


@pytest.mark.slow  # other rows than bf16 and cast to FP8: five kernels more
@pytest.mark.parametrize("case", LOW_LATENCY_SLOW_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("seed", range(8))
def test_all_results_over_nodes_equal_the_reference(case: Case, seed: int) -> None:
    play(case, all_operations, Settings(seed, num_sms=1 + seed % 3))


@pytest.mark.parametrize("case", [PADDED_CASE, THREE_BY_TWO], ids=lambda case: case.id)
@pytest.mark.parametrize("layout", [PADDED, TOKEN])
def test_sums_over_nodes_are_in_order(layout: RecvLayout, case: Case) -> None:
    play(replace(case, layout=layout, num_topk=6, routing="uniform"), combine_what_cancels)


def fly(session: LowLatencySession) -> None:
    """Three operations in flight; hooks in other orders than sends, alike on all ranks."""
    flying = [session.low_latency_dispatch(i, return_hook=True) for i in range(3)]
    for i in (1, 0, 2):
        flying[i].finish()
    back = [
        session.low_latency_combine(flying[i], override=i == 1, return_hook=True) for i in range(3)
    ]
    session.low_latency_dispatch(5)
    for i in (2, 0, 1):
        back[i].finish()
    for round_idx in range(4):
        session.low_latency_combine(session.low_latency_dispatch(round_idx))


DELAYS = {
    "none": Faults(),
    "rank": Faults(delay_rank=1, delay_from_ns=50_000, delay_for_ns=300_000),
    "rail": Faults(slow_src=0, slow_dst=2, slow_extra_ns=50_000),
    "inside": Faults(slow_src=2, slow_dst=3, slow_extra_ns=50_000),
}


@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_flights_over_nodes_overlap(delay: str, seed: int) -> None:
    play(PADDED_CASE, fly, Settings(seed, DELAYS[delay], num_sms=1 + seed % 3))


def test_nodes_may_call_their_hooks_in_different_orders() -> None:
    """Only a combine ties a node's hook to another node's, so dispatches may come in any order."""

    def body(session: LowLatencySession) -> None:
        flying = [session.low_latency_dispatch(i, return_hook=True) for i in range(3)]
        order = (2, 0, 1) if session.rank < 2 else (1, 2, 0)
        for i in order:
            flying[i].finish()
        for one in flying:
            session.low_latency_combine(one)

    for seed in range(3):
        play(PADDED_CASE, body, Settings(seed))


def test_ranks_store_to_their_node_and_rail_alone() -> None:
    """Of other ranks they do not even know the addresses: 0, which nothing survives."""

    def body(session: LowLatencySession) -> None:
        session.low_latency_combine(session.low_latency_dispatch(0))
        slots = session.backend.low_latency._open("test").slots
        known = [int.from_bytes(base, "little") for base in slots._bases_of_peers()]
        own, per_node = session.rank, session.case.ranks_per_node
        assert per_node is not None
        for rank, base in enumerate(known):
            is_peer = rank // per_node == own // per_node or rank % per_node == own % per_node
            assert base == (slots.memory.bases[rank] if is_peer else 0)

    play(THREE_BY_TWO, body)


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("use_hook", [False, True])
@pytest.mark.parametrize("culprit", [1, 2])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rail", RAILS)
def test_refusal_of_a_host_reaches_every_node(
    rail: str, seed: int, culprit: int, use_hook: bool
) -> None:
    def body(session: LowLatencySession) -> None:
        one = session.low_latency_dispatch(0)
        inputs = session.inputs(4)
        x, ids, buffer = inputs.xs[session.rank], inputs.ids[session.rank], session.buffer
        match = rf"rank {culprit} refused the operation: .*: exp"
        if session.rank == culprit:
            with pytest.raises(InvalidArgument, match="expected"):
                buffer.low_latency_dispatch(x[:, 1:], ids, return_hook=use_hook)
            with pytest.raises(InvalidArgument, match="y: expected"):
                buffer.low_latency_combine(one.actual.x[:1], one.actual.handle)
        else:
            with pytest.raises(CommError, match=match) as info:
                finish(buffer.low_latency_dispatch(x, ids, return_hook=use_hook))
            assert info.value.peer == culprit
            with pytest.raises(CommError, match="combine: rank .: " + match):
                buffer.low_latency_combine(one.actual.x, one.actual.handle)
        session.low_latency_combine(one)
        go_on(session)

    play(PADDED_CASE, body, Settings(seed), rail=rail)


def finish(output: Any) -> None:
    """Call the hook, if there is one."""
    if output.hook is not None:
        output.hook()


@pytest.mark.parametrize("use_hook", [False, True])
@pytest.mark.parametrize(("wrong", "match"), [([0, 8], "ids in 0..7 or -1"), ([3, 3], "distinct")])
@pytest.mark.parametrize("rail", RAILS)
def test_wrong_ids_end_the_operation_on_every_node(
    rail: str, wrong: list[int], match: str, use_hook: bool
) -> None:
    case = replace(PADDED_CASE, num_topk=2)

    def body(session: LowLatencySession) -> None:
        inputs = session.inputs(1)
        own = inputs.ids[session.rank].clone()
        if session.rank == 3:
            own[:] = torch.tensor(wrong)
        error, text = (InvalidArgument, match) if session.rank == 3 else (CommError, "rank 3 ref")
        got: list[Any] = []
        with pytest.raises(error, match=text):
            combine_unaware(session, inputs.xs[session.rank], own, use_hook, got)
        assert got[0].num_tokens_per_expert.tolist() == [0, 0]
        go_on(session)

    play(replace(case, even=True), body, rail=rail)


@pytest.mark.parametrize("override", [False, True])
@pytest.mark.parametrize("rail", RAILS)
def test_combines_of_different_handles_are_told_to_every_node(rail: str, override: bool) -> None:
    def body(session: LowLatencySession) -> None:
        both = [session.low_latency_dispatch(i) for i in range(2)]
        with pytest.raises(ConfigMismatch, match="handle differs between ranks"):
            session.low_latency_combine(both[session.rank == 3], override=override)
        go_on(session)

    play(PADDED_CASE, body, rail=rail)


# ---- graphs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_operations_over_nodes_are_replayed(seed: int) -> None:
    """Launches that are recorded once, as for a graph, do the same with other rows and ids."""

    def body(session: LowLatencySession) -> None:
        rank, low_latency = session.rank, session.backend.low_latency
        session.low_latency_combine(session.low_latency_dispatch(0))
        inputs = session.inputs(0)
        x, ids = inputs.xs[rank].clone(), inputs.ids[rank].clone()
        capturing = CapturingRuntime(session.backend.runtime)
        place = low_latency._place
        low_latency._place = replace(place, runtime=capturing)
        received = low_latency.dispatch(request_of(session, x, ids, True))
        received.hook()
        y = torch.zeros(received.x.shape, dtype=torch.bfloat16)
        back = low_latency.combine(combine_request_of(y, received.handle))
        back.hook()
        low_latency._place = place
        for round_idx in range(1, 4):
            inputs = session.inputs(round_idx)
            expected = session._oracle.get(
                ("replay", round_idx), lambda inputs=inputs: expected_of(session.case, inputs)
            )
            x.copy_(inputs.xs[rank])
            ids.copy_(inputs.ids[rank])
            y.copy_(expected[1][rank])
            capturing.replay()
            session.backend.settle()
            assert_dispatch_equal(received, expected[0][rank], rank=rank)
            assert_combine_equal(back, expected[2][rank], rank=rank)
            session.low_latency_combine(session.low_latency_dispatch(round_idx))

    play(PADDED_CASE, body, Settings(seed))


def combine_request_of(y: torch.Tensor, handle: Handle) -> CombineRequest:
    return CombineRequest(
        y=y, handle=handle, apply_weights=False, return_hook=True, low_latency=True
    )


def expected_of(case: Case, inputs: Inputs) -> tuple[list[Any], list[Any], list[Any]]:
    """Return what all ranks receive, what they give back, and what comes of it."""
    received: list[Any] = reference.low_latency_dispatch(
        inputs.xs, inputs.ids, config=case.config, recv_layout=case.layout
    )
    ys = [make_outputs(case, output, rank, 0) for rank, output in enumerate(received)]
    handles = [output.handle for output in received]
    return received, ys, reference.low_latency_combine(ys, handles, apply_weights=False)
