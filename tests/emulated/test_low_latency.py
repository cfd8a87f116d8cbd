# SPDX-License-Identifier: Apache-2.0
"""The low-latency kernels with their host code, against the reference, over seeds and faults."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from collective.case import Case
from emulated.cluster import RankStopped, Settings
from emulated.host_api import Faults
from emulated.low_latency import LowLatencySession, play, use_small_blocks

from deepcomm import CommError, CommTimeout, ConfigMismatch, InvalidArgument, RecvLayout

pytestmark = pytest.mark.emulated_backend

TOKEN, _, PADDED = RecvLayout
SEEDS = 12
SMALL = {"num_ranks": 2, "num_tokens": 5, "hidden": 256, "num_topk": 3, "experts_per_rank": 4}
WIRES = ("bf16", "fp8", "fp8_ue8m0", "scaled", "scaled_ue8m0")

CASES = [
    *(Case(**SMALL, layout=layout, wire=wire) for layout in (PADDED, TOKEN) for wire in WIRES),
    Case(num_ranks=3, num_tokens=4, hidden=80, num_topk=4, layout=PADDED, wire="fp8"),
    Case(num_ranks=3, num_tokens=4, hidden=8, num_topk=4, layout=TOKEN, routing="uniform"),
    Case(num_ranks=4, num_tokens=33, hidden=16, layout=PADDED, routing="one_expert"),
    Case(num_ranks=2, num_tokens=2, hidden=640, layout=PADDED, routing="none"),
    Case(num_ranks=1, num_tokens=6, hidden=144, num_topk=2, layout=PADDED, wire="fp8_ue8m0"),
    Case(num_ranks=2, num_tokens=3, hidden=1168, num_topk=4, layout=TOKEN, wire="fp8"),
    Case(**SMALL, layout=TOKEN, strided=True, id_dtype=torch.int32),
    Case(**SMALL, layout=PADDED, strided=True, wire="scaled"),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


def all_operations(session: LowLatencySession) -> None:
    is_padded = session.case.layout is PADDED
    for round_idx, hook in enumerate((False, True, False)):
        options: dict[str, Any] = {"return_hook": hook}
        one = session.low_latency_dispatch(round_idx, **options)
        one.finish()
        for more in (
            {},
            {"carried": True, "apply_weights": False, "extras": True},
            {"override": True} if is_padded else {"extras": True},
        ):
            session.low_latency_combine(one, **more, **options).finish()
    bare = session.low_latency_dispatch(3, has_weights=False, zero_padding=True)
    session.low_latency_combine(bare, apply_weights=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("seed", range(3))
def test_results_equal_the_reference(case: Case, seed: int) -> None:
    play(case, all_operations, Settings(seed))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_flights_overlap_in_any_order_of_hooks(seed: int) -> None:
    case = Case(**SMALL, layout=PADDED, wire="fp8")

    def body(session: LowLatencySession) -> None:
        flying = [session.low_latency_dispatch(i, return_hook=True) for i in range(3)]
        for i in (1, 0, 2):
            flying[i].finish()
        back = [
            session.low_latency_combine(flying[i], override=i == 1, return_hook=True)
            for i in range(3)
        ]
        session.low_latency_dispatch(5)
        for i in (2, 0, 1):
            back[i].finish()
        for round_idx in range(9):
            session.low_latency_combine(session.low_latency_dispatch(round_idx))

    faults = Faults(delay_rank=seed % 2, delay_from_ns=20_000 * seed, delay_for_ns=300_000)
    play(case, body, Settings(seed, faults if seed % 3 else Faults(), num_sms=1 + seed % 3))


def test_too_many_in_flight_is_refused_and_harmless() -> None:
    def body(session: LowLatencySession) -> None:
        flying = [session.low_latency_dispatch(i, return_hook=True) for i in range(4)]
        inputs = session.inputs(9)
        with pytest.raises(InvalidArgument, match="num_low_latency_slots = 4"):
            session.buffer.low_latency_dispatch(inputs.xs[session.rank], inputs.ids[session.rank])
        for one in flying:
            one.finish()
        with pytest.raises(InvalidArgument, match="one call of its hook"):
            flying[0].actual.hook()
        session.low_latency_combine(session.low_latency_dispatch(5))

    play(Case(**SMALL, layout=PADDED), body)


@pytest.mark.parametrize("first_tag", [0xFFFFFFFD, 0x7FFFFFFE])
def test_tags_may_wrap(first_tag: int) -> None:
    def body(session: LowLatencySession) -> None:
        slots = session.backend.low_latency._open_slots("test")
        # LowLatencyState.last: {number, tag, slot}
        tag = ctypes.c_uint32.from_address(slots._state.address + 8)
        tag.value = first_tag
        for round_idx in range(5):
            session.low_latency_combine(session.low_latency_dispatch(round_idx))
        assert tag.value == (first_tag + 10) % 2**32 + (first_tag + 10 >= 2**32)

    play(Case(**SMALL, layout=PADDED, wire="fp8"), body)


# ---- the example of csrc/kernels/PROTOCOLS.md --------------------------------------------------


NO_EXPERT = 0xFFFFFFFF


def words_at(address: int, num_packets: int) -> list[int]:
    """Return the payload of packets, whose tags must be those of the first operation."""
    words = (ctypes.c_uint32 * (4 * num_packets)).from_address(address)
    assert set(words[3::4]) == {1}
    return [word for i, word in enumerate(words) if i % 4 != 3]


def test_worked_example() -> None:
    case = Case(num_ranks=2, num_tokens=2, hidden=8, num_topk=2, experts_per_rank=2, layout=PADDED)
    ids = [torch.tensor([[0, 2], [3, 0]]), torch.tensor([[3, -1]])]
    xs = [torch.tensor([[1.0], [2.0]]).expand(2, 8), torch.full((1, 8), 3.0)]

    def body(session: LowLatencySession) -> None:
        rank = session.rank
        got = session.buffer.low_latency_dispatch(
            xs[rank].bfloat16(), ids[rank], torch.ones(ids[rank].shape)
        )
        memory = session.backend.low_latency._slots
        assert memory is not None
        base, places = memory.memory.bases[rank], memory.map
        headers = [words_at(base + places.header_offset(0, peer), 2)[1:] for peer in range(2)]
        expected = {
            0: [[2, 0, 2, 0, 0b11], [1, 0, 0, 0, 0]],
            1: [[2, 0, 1, 1, 0b11], [1, 0, 0, 1, 1]],
        }
        assert headers == expected[rank]
        if rank == 1:
            heads = [
                words_at(base + places.row_offset(0, *pair), 2) for pair in ((0, 0), (0, 1), (1, 0))
            ]
            assert heads[0][0] == NO_EXPERT
            assert heads[0][3:5] == [0, 0]
            assert heads[1][:2] == heads[2][:2] == [1, 0]
            assert heads[1][3] == heads[2][3] == NO_EXPERT
            assert got.x[0, 0, 0] == 1
            assert got.x[1, :2, 0].tolist() == [2, 3]
            record = got.handle.records
            entries = record.words[record.map.entries :][:6].tolist()
            assert entries[:4] == [0 | 1 << 26, -1, 4, -1]
            assert record.words[record.map.entries + 4 :][:2].tolist() == [5, -1]
        else:
            assert got.x[0, :2, 0].tolist() == [1, 2]
        assert got.num_tokens_per_expert.tolist() == [[2, 0], [1, 2]][rank]

    play(case, body)


# ---- refusals --------------------------------------------------------------------------------


def go_on(session: LowLatencySession) -> None:
    for round_idx in range(5):
        session.low_latency_combine(session.low_latency_dispatch(round_idx))


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("use_hook", [False, True])
def test_refusal_of_a_host_reaches_every_rank(seed: int, use_hook: bool) -> None:
    def body(session: LowLatencySession) -> None:
        one = session.low_latency_dispatch(0)
        inputs = session.inputs(4)
        x, ids = inputs.xs[session.rank], inputs.ids[session.rank]
        buffer = session.buffer
        for arguments in ((x[:, 1:], ids), (x, ids.float())):
            if session.rank == 1:
                with pytest.raises(InvalidArgument, match="expected"):
                    buffer.low_latency_dispatch(*arguments, return_hook=use_hook)
                continue
            with pytest.raises(CommError, match=r"rank 1 refused the operation: .*: exp") as info:
                dispatch_whole(session, x, ids, use_hook)
            assert info.value.peer == 1
        if session.rank == 1:
            with pytest.raises(InvalidArgument, match="y: expected"):
                buffer.low_latency_combine(one.actual.x[:1], one.actual.handle)
        else:
            with pytest.raises(
                CommError, match=r"combine: rank .: rank 1 refused the operation: y"
            ):
                buffer.low_latency_combine(one.actual.x, one.actual.handle)
        session.low_latency_combine(one)
        go_on(session)

    play(Case(num_ranks=3, num_tokens=4, hidden=64, layout=PADDED), body, Settings(seed))


@pytest.mark.parametrize("use_hook", [False, True])
@pytest.mark.parametrize("layout", [PADDED, TOKEN])
@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ([0, 8], r"ids in 0..7 or -1, got 8 at \[1, 1\]"),
        ([-2, 1], r"ids in 0..7 or -1, got -2 at \[1, 0\]"),
        ([3, 3], r"distinct ids in a row, got 3 at \[1, 1\]"),
        ([3, 2**32 + 1], r"ids in 0..7 or -1, got 4294967297 at \[1, 1\]"),
    ],
)
def test_wrong_ids_end_the_operation_on_every_rank(
    ids: list[int], match: str, layout: RecvLayout, use_hook: bool
) -> None:
    case = Case(num_ranks=4, num_tokens=8, hidden=64, layout=layout)

    def body(session: LowLatencySession) -> None:
        inputs = session.inputs(1)
        own = inputs.ids[session.rank].clone()
        if session.rank == 2:
            own[1] = torch.tensor(ids)
        error, text = (
            (InvalidArgument, match) if session.rank == 2 else (CommError, "rank 2 refused")
        )
        got: list[Any] = []
        with pytest.raises(error, match=text):
            combine_unaware(session, inputs.xs[session.rank], own, use_hook, got)
        assert got[0].num_tokens_per_expert.tolist() == [0, 0]
        go_on(session)

    play(case, body)


def dispatch_whole(
    session: LowLatencySession, x: torch.Tensor, ids: torch.Tensor, use_hook: bool
) -> None:
    """Dispatch, with its hook if it has one."""
    got = session.buffer.low_latency_dispatch(x, ids, return_hook=use_hook)
    if got.hook is not None:
        got.hook()


def combine_unaware(
    session: LowLatencySession, x: torch.Tensor, ids: torch.Tensor, use_hook: bool, got: list[Any]
) -> None:
    """Dispatch and combine before the host knows of a refusal: no rank's combine takes place."""
    got.append(session.backend.low_latency.dispatch(request_of(session, x, ids, use_hook)))
    if use_hook:
        got[0].hook()
    y = torch.zeros(got[0].x.shape, dtype=torch.bfloat16)
    session.buffer.low_latency_combine(y, got[0].handle, apply_weights=False)


def request_of(session: LowLatencySession, x: torch.Tensor, ids: torch.Tensor, hook: bool) -> Any:
    from deepcomm.backends.base import DispatchRequest

    return DispatchRequest(
        x=x,
        topk_idx=ids,
        topk_weights=None,
        recv_layout=session.case.layout,
        return_hook=hook,
        low_latency=True,
    )


@pytest.mark.parametrize(
    ("own", "match"),
    [
        ({"recv_layout": TOKEN}, "recv_layout differs .* TOKEN"),
        ({"quantize": "fp8_e4m3"}, "rows differs between ranks: .*FP8 rows with FP32 scales"),
        ({"topk_weights": None}, "topk_weights differs"),
    ],
)
def test_ranks_that_differ_are_told_so(own: dict[str, Any], match: str) -> None:
    def body(session: LowLatencySession) -> None:
        inputs = session.inputs(0)
        arguments = {"recv_layout": PADDED, "topk_weights": inputs.weights[session.rank]}
        if session.rank == 0:
            arguments |= own
        x, ids = inputs.xs[session.rank], inputs.ids[session.rank]
        with pytest.raises(ConfigMismatch, match=match):
            session.buffer.low_latency_dispatch(x, ids, **arguments)
        go_on(session)

    play(Case(num_ranks=3, num_tokens=4, hidden=64, layout=PADDED), body)


def test_combines_of_different_handles_are_told_so() -> None:
    def body(session: LowLatencySession) -> None:
        both = [session.low_latency_dispatch(i) for i in range(2)]
        with pytest.raises(ConfigMismatch, match="handle differs between ranks"):
            session.low_latency_combine(both[session.rank])
        go_on(session)

    play(Case(**SMALL, layout=PADDED), body)


# ---- peers that are late, dead or masked -----------------------------------------------------


def test_late_peer_times_out_with_its_name() -> None:
    def body(session: LowLatencySession) -> None:
        session.low_latency_combine(session.low_latency_dispatch(0))
        if session.rank == 1:
            session.group.barrier()
            return
        with pytest.raises(CommTimeout) as info:
            session.low_latency_dispatch(1)
        assert info.value.peer == 1
        with pytest.raises(CommTimeout):
            session.low_latency_dispatch(2)
        session.group.barrier()

    play(Case(**SMALL, layout=PADDED), body)


@pytest.mark.parametrize("stop_at_ns", [0, 3_000, 20_000, 60_000, 150_000, 300_000])
def test_rank_stopped_midway_never_hangs(stop_at_ns: int) -> None:
    """Wherever it stops, the others finish or time out, and what they delivered is right."""

    def body(session: LowLatencySession) -> str:
        try:
            for round_idx in range(4):
                session.low_latency_combine(session.low_latency_dispatch(round_idx))
        except CommTimeout as error:
            return f"timeout {error.peer}"
        except RankStopped:
            return "stopped"
        return "done"

    for seed in range(4):
        faults = Faults(stop_rank=1, stop_at_ns=stop_at_ns)
        outcomes = play(Case(**SMALL, layout=PADDED, wire="fp8"), body, Settings(seed, faults))
        assert outcomes[0] in ("timeout 1", "done")
        assert outcomes[1] in ("stopped", "done")


@pytest.mark.parametrize("layout", [PADDED, TOKEN])
@pytest.mark.parametrize("use_hook", [False, True])
def test_rank_that_never_comes_is_masked(layout: RecvLayout, use_hook: bool) -> None:
    absent = 2
    case = Case(num_ranks=3, num_tokens=6, hidden=64, layout=layout, routing="uniform", num_topk=4)
    options: dict[str, Any] = {"on_timeout": "mask", "return_hook": use_hook}

    def body(session: LowLatencySession) -> None:
        session.low_latency_combine(session.low_latency_dispatch(0, on_timeout="mask"))
        if session.rank == absent:
            session.group.barrier()
            return
        waits = torch.zeros(case.num_ranks, dtype=torch.int64)
        one = session.low_latency_dispatch(1, masked={absent}, wait_us_stats=waits, **options)
        one.finish()
        assert waits[absent] >= 1_000_000
        assert max(waits[:absent]) < 1_000_000
        assert session.buffer.rank_mask().tolist() == [False, False, True]
        for _ in range(5):
            session.low_latency_combine(one, masked={absent}, **options).finish()
        session.group.barrier()

    play(case, body)


@pytest.mark.parametrize("layout", [PADDED, TOKEN])
@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_masked_rank_counts_as_absent(layout: RecvLayout, wire: Any) -> None:
    absent = 1
    case = Case(num_ranks=3, num_tokens=6, hidden=64, layout=layout, num_topk=4, wire=wire)

    def body(session: LowLatencySession) -> None:
        if session.rank == absent:
            return
        session.buffer.set_rank_mask(absent, True)
        for round_idx in range(6):
            one = session.low_latency_dispatch(round_idx, masked={absent}, zero_padding=True)
            session.low_latency_combine(one, masked={absent}, carried=True, apply_weights=False)

    play(case, with_reserved_memory(body))


def with_reserved_memory(body: Any) -> Any:
    """Let all ranks reserve the slots, which is collective, before the body."""

    def all_ranks(session: LowLatencySession) -> Any:
        session.low_latency_dispatch(0)
        return body(session)

    return all_ranks


def test_mask_set_between_dispatch_and_combine() -> None:
    absent = 2

    def body(session: LowLatencySession) -> None:
        one = session.low_latency_dispatch(0)
        if session.rank != absent:
            session.buffer.set_rank_mask(absent, True)
            session.low_latency_combine(one, masked={absent})

    play(Case(num_ranks=3, num_tokens=6, hidden=64, layout=PADDED, num_topk=4), body)


@pytest.mark.parametrize("seed", range(4))
def test_rank_can_be_taken_back(seed: int) -> None:
    cut = 1
    case = Case(num_ranks=3, num_tokens=6, hidden=64, layout=PADDED, num_topk=4, routing="uniform")

    def body(session: LowLatencySession) -> None:
        session.low_latency_combine(session.low_latency_dispatch(0))
        others = [rank for rank in range(3) if (rank == cut) != (session.rank == cut)]
        for rank in others:
            session.buffer.set_rank_mask(rank, True)
        for round_idx in range(1, 4):  # both sides go on by themselves
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

    play(case, body, Settings(seed))


# ---- statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_expert_token_stats_add_up(dtype: torch.dtype) -> None:
    case = Case(**SMALL, layout=PADDED)

    def body(session: LowLatencySession) -> None:
        stats = torch.full((case.experts_per_rank,), 100, dtype=dtype)
        expected = stats.clone()
        for round_idx in range(3):
            one = session.low_latency_dispatch(
                round_idx, expert_token_stats=stats, return_hook=round_idx == 1
            )
            one.finish()
            expected += one.expected[session.rank].num_tokens_per_expert
        assert torch.equal(stats, expected)

    play(case, body)


def test_wait_us_stats_name_the_late_source() -> None:
    case = Case(num_ranks=3, num_tokens=4, hidden=64, layout=PADDED)

    def body(session: LowLatencySession) -> list[list[int]]:
        waits = [torch.zeros(case.num_ranks, dtype=torch.int64) for _ in range(2)]
        one = session.low_latency_dispatch(0, wait_us_stats=waits[0])
        session.low_latency_combine(one, wait_us_stats=waits[1])
        return [wait.tolist() for wait in waits]

    faults = Faults(delay_rank=2, delay_from_ns=0, delay_for_ns=400_000_000)
    waits = play(case, body, Settings(3, faults))[0][0]
    assert waits[2] > 300_000
    assert max(waits[:2]) < 100_000
