# SPDX-License-Identifier: Apache-2.0
"""Low latency over several nodes on the emulator: rails, passing on inside the node, the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from collective.case import Case
from collective.nodes import LOW_LATENCY_CASES, LOW_LATENCY_SLOW_CASES, LOW_LATENCY_TWO_BY_TWO
from emulated.cluster import RankStopped, Settings
from emulated.host_api import Faults
from emulated.low_latency import LowLatencySession, play, use_small_blocks
from emulated.test_low_latency import all_operations, combine_unaware, go_on

from deepcomm import CommError, CommTimeout, ConfigMismatch, InvalidArgument, RecvLayout

pytestmark = pytest.mark.emulated_backend

TOKEN, _, PADDED = RecvLayout
SEEDS = 6
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
def test_refusal_of_a_host_reaches_every_node(seed: int, culprit: int, use_hook: bool) -> None:
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

    play(PADDED_CASE, body, Settings(seed))


def finish(output: Any) -> None:
    """Call the hook, if there is one."""
    if output.hook is not None:
        output.hook()


@pytest.mark.parametrize("use_hook", [False, True])
@pytest.mark.parametrize(("wrong", "match"), [([0, 8], "ids in 0..7 or -1"), ([3, 3], "distinct")])
def test_wrong_ids_end_the_operation_on_every_node(
    wrong: list[int], match: str, use_hook: bool
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

    play(replace(case, even=True), body)


@pytest.mark.parametrize(
    ("own", "match"),
    [
        ({"recv_layout": TOKEN}, "recv_layout differs .* TOKEN"),
        ({"quantize": "fp8_e4m3"}, "rows differs between ranks: .*FP8 rows with FP32 scales"),
        ({"topk_weights": None}, "topk_weights differs"),
    ],
)
def test_ranks_of_several_nodes_that_differ_are_told_so(own: dict[str, Any], match: str) -> None:
    def body(session: LowLatencySession) -> None:
        inputs = session.inputs(0)
        arguments = {"recv_layout": PADDED, "topk_weights": inputs.weights[session.rank]}
        if session.rank == 0:
            arguments |= own
        x, ids = inputs.xs[session.rank], inputs.ids[session.rank]
        with pytest.raises(ConfigMismatch, match=match):
            session.buffer.low_latency_dispatch(x, ids, **arguments)
        go_on(session)

    play(PADDED_CASE, body)


@pytest.mark.parametrize("override", [False, True])
def test_combines_of_different_handles_are_told_to_every_node(override: bool) -> None:
    def body(session: LowLatencySession) -> None:
        both = [session.low_latency_dispatch(i) for i in range(2)]
        with pytest.raises(ConfigMismatch, match="handle differs between ranks"):
            session.low_latency_combine(both[session.rank == 3], override=override)
        go_on(session)

    play(PADDED_CASE, body)


# ---- ranks that do not come --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["dispatch", "combine", "weights"])
@pytest.mark.parametrize("case", [PADDED_CASE, THREE_BY_TWO], ids=lambda case: case.id)
def test_rank_of_a_node_that_does_not_come_times_out(case: Case, how: str) -> None:
    """Its node and rail name it; who only hears of it names who would have passed it on."""
    absent = case.num_ranks - 1

    def body(session: LowLatencySession) -> int | None:
        one = session.low_latency_dispatch(0)
        session.low_latency_combine(one)
        peer = None
        if session.rank != absent:
            with pytest.raises(CommTimeout) as info:
                if how == "dispatch":
                    session.low_latency_dispatch(1)
                session.low_latency_combine(one, override=how == "weights")
            peer = info.value.peer
            with pytest.raises(CommTimeout):
                session.low_latency_dispatch(2)
        session.group.barrier()
        return peer

    for rank, peer in enumerate(play(case, body)[:absent]):
        assert peer is not None
        if rank // 2 == absent // 2 or rank % 2 == absent % 2:
            assert peer == absent
        else:
            assert peer // 2 == rank // 2


@pytest.mark.parametrize("stop_at_ns", [0, 20_000, 60_000, 150_000, 300_000])
@pytest.mark.parametrize("seed", range(2))
def test_rank_of_a_node_stopped_midway_never_hangs(stop_at_ns: int, seed: int) -> None:
    """Wherever it stops, the others finish or time out, and what they delivered is right."""
    stopped = 3

    def body(session: LowLatencySession) -> str:
        try:
            for round_idx in range(4):
                session.low_latency_combine(session.low_latency_dispatch(round_idx))
        except CommTimeout:
            return "timeout"
        except RankStopped:
            return "stopped"
        return "done"

    faults = Faults(stop_rank=stopped, stop_at_ns=stop_at_ns)
    outcomes = play(PADDED_CASE, body, Settings(seed, faults))
    assert outcomes[stopped] in ("stopped", "done")
    assert set(outcomes[:stopped]) <= {"timeout", "done"}
    assert outcomes[stopped] == "done" or "timeout" in outcomes


@pytest.mark.parametrize("use_hook", [False, True])
@pytest.mark.parametrize(
    "case",
    [replace(PADDED_CASE, routing="uniform"), replace(THREE_BY_TWO, layout=TOKEN)],
    ids=lambda case: case.id,
)
def test_rank_of_another_node_that_never_comes_is_masked_by_all(case: Case, use_hook: bool) -> None:
    absent = case.num_ranks - 1
    options: dict[str, Any] = {"on_timeout": "mask", "return_hook": use_hook}

    def body(session: LowLatencySession) -> list[bool]:
        session.low_latency_combine(session.low_latency_dispatch(0, on_timeout="mask"))
        if session.rank != absent:
            for round_idx in (1, 2):
                one = session.low_latency_dispatch(round_idx, masked={absent}, **options)
                one.finish()
                for override in (False, case.layout is PADDED):
                    session.low_latency_combine(
                        one, masked={absent}, override=override, **options
                    ).finish()
        mask: list[bool] = session.buffer.rank_mask().tolist()
        session.group.barrier()
        return mask

    masks = play(case, body)
    assert masks[:absent] == [[rank == absent for rank in range(case.num_ranks)]] * absent


@pytest.mark.parametrize("override", [False, True])
def test_rank_that_leaves_after_dispatch_is_masked(override: bool) -> None:
    absent = 3

    def body(session: LowLatencySession) -> None:
        one = session.low_latency_dispatch(0)
        if session.rank != absent:
            for _ in range(2):
                session.low_latency_combine(
                    one, masked={absent}, override=override, on_timeout="mask"
                )
            again = session.low_latency_dispatch(1, masked={absent}, on_timeout="mask")
            session.low_latency_combine(again, masked={absent}, on_timeout="mask")
        session.group.barrier()

    play(replace(PADDED_CASE, routing="uniform"), body)


@pytest.mark.parametrize("absent", [1, 2])
@pytest.mark.parametrize("layout", [PADDED, TOKEN])
def test_masked_rank_of_a_node_counts_as_absent(layout: RecvLayout, absent: int) -> None:
    def body(session: LowLatencySession) -> None:
        session.low_latency_dispatch(0)  # reserves the slots, which is collective
        if session.rank == absent:
            return
        session.buffer.set_rank_mask(absent, True)
        for round_idx in range(6):
            one = session.low_latency_dispatch(round_idx, masked={absent}, zero_padding=True)
            session.low_latency_combine(one, masked={absent}, carried=True, apply_weights=False)

    play(replace(PADDED_CASE, layout=layout, routing="uniform"), body)


@pytest.mark.parametrize("absent", [0, 3])
def test_mask_set_between_dispatch_and_combine_over_nodes(absent: int) -> None:
    def body(session: LowLatencySession) -> None:
        one = session.low_latency_dispatch(0)
        if session.rank != absent:
            session.buffer.set_rank_mask(absent, True)
            session.low_latency_combine(one, masked={absent})
            session.low_latency_combine(one, masked={absent}, override=True)

    play(replace(PADDED_CASE, routing="uniform"), body)


@pytest.mark.parametrize("seed", range(2))
def test_node_can_be_taken_back(seed: int) -> None:
    """Two nodes mask each other, go on by themselves, and come together again."""

    def body(session: LowLatencySession) -> None:
        session.low_latency_combine(session.low_latency_dispatch(0))
        others = [rank for rank in range(4) if rank // 2 != session.rank // 2]
        for rank in others:
            session.buffer.set_rank_mask(rank, True)
        for round_idx in range(1, 4):
            inputs = session.inputs(round_idx)
            got = session.buffer.low_latency_dispatch(
                inputs.xs[session.rank], inputs.ids[session.rank]
            )
            session.buffer.low_latency_combine(got.x, got.handle, apply_weights=False)
        for rank in others:
            session.buffer.set_rank_mask(rank, False)
        session.group.barrier()
        for round_idx in range(4, 10):
            session.low_latency_combine(session.low_latency_dispatch(round_idx))

    play(replace(PADDED_CASE, routing="uniform"), body, Settings(seed))


def test_wait_us_stats_name_the_late_rank_of_a_node() -> None:
    def body(session: LowLatencySession) -> list[list[int]]:
        waits = [torch.zeros(4, dtype=torch.int64) for _ in range(2)]
        one = session.low_latency_dispatch(0, wait_us_stats=waits[0])
        session.low_latency_combine(one, wait_us_stats=waits[1])
        return [wait.tolist() for wait in waits]

    faults = Faults(delay_rank=2, delay_from_ns=0, delay_for_ns=400_000_000)
    results = play(PADDED_CASE, body, Settings(3, faults))
    for rank in (0, 1):
        waits = results[rank][0]
        assert waits[2] > 300_000
        assert max(waits[:2]) < 100_000
