# SPDX-License-Identifier: Apache-2.0
"""The low-latency kernels with their host code, against the reference, over seeds and faults."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
from collective.case import Case
from collective.nodes import LOW_LATENCY_TWO_BY_TWO
from emulated.cluster import Settings
from emulated.host_api import Faults
from emulated.low_latency import LowLatencySession, play, use_small_blocks

from deepcomm import CommError, ConfigMismatch, InvalidArgument, RecvLayout
from deepcomm._C import kernels

pytestmark = pytest.mark.emulated_backend

TOKEN, _, PADDED = RecvLayout
SEEDS = 12
SMALL = {"num_ranks": 2, "num_tokens": 5, "hidden": 256, "num_topk": 3, "experts_per_rank": 4}
WIRES = ("bf16", "fp8", "fp8_ue8m0", "scaled", "scaled_ue8m0")

CASES = [
    *(Case(**SMALL, layout=layout, wire=wire) for layout in (PADDED, TOKEN) for wire in WIRES),
    Case(num_ranks=3, num_tokens=4, hidden=80, num_topk=4, layout=PADDED, wire="fp8"),
    Case(num_ranks=2, num_tokens=1, hidden=256, num_topk=4, layout=PADDED, wire="fp8"),
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


@pytest.mark.parametrize("layout", [PADDED, RecvLayout.TOKEN])
@pytest.mark.parametrize("nodes", [None, "lsa", "nccl"])
def test_operations_may_have_fewer_columns_than_the_buffer(
    layout: RecvLayout, nodes: str | None
) -> None:
    def body(session: LowLatencySession) -> None:
        for round_idx in range(3):
            one = session.low_latency_dispatch(round_idx)
            session.low_latency_combine(one)
            session.low_latency_combine(one, carried=True, apply_weights=False)
        two = session.low_latency_dispatch(3, return_hook=True)
        two.finish()
        session.low_latency_combine(two, return_hook=True).finish()

    case = Case(**SMALL, layout=layout)
    options: dict[str, Any] = {"num_topk": 7}
    if nodes is not None:
        case, options = replace(case, num_ranks=4, ranks_per_node=2), options | {"rail": nodes}
    play(case, body, **options)


@pytest.mark.parametrize("num_before", [0xFFFFFFFC, 0x7FFFFFFD, 0x2FFFFFFF8])
def test_tags_may_wrap(num_before: int) -> None:
    """As after so many operations: slots go on in turn, while tags begin again."""

    def body(session: LowLatencySession) -> None:
        slots = session.backend.low_latency._open("test").slots
        num_slots, places = session.backend.config.num_low_latency_slots, slots.map
        sends = ctypes.c_uint64.from_address(slots._state.address)
        sends.value = num_before * kernels.LOW_LATENCY_SEND_UNIT
        for number in range(num_before - num_slots + 1, num_before + 1):
            for rank in range(session.group.size):
                at = slots.local + places.credit_offset((number - 1) % num_slots, rank)
                ctypes.c_uint64.from_address(at).value = number
        session.group.barrier()
        for round_idx in range(5):
            session.low_latency_combine(session.low_latency_dispatch(round_idx))
        assert sends.value == (num_before + 10) * kernels.LOW_LATENCY_SEND_UNIT

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
        got = session.buffer.low_latency_dispatch(  # with a hook, own rows travel, too
            xs[rank].bfloat16(), ids[rank], torch.ones(ids[rank].shape), return_hook=True
        )
        got.hook()
        slots = session.backend.low_latency._open("test").slots
        base, places = slots.memory.bases[rank], slots.map
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
            entries = record.words[record.map.record.entries :][:6].tolist()
            assert entries[:4] == [0 | 1 << 26, -1, 4, -1]
            assert record.words[record.map.record.entries + 4 :][:2].tolist() == [5, -1]
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


@pytest.mark.parametrize("knowing", [0, 1, 2])
def test_ranks_that_learn_of_a_refusal_at_different_calls_stay_in_step(knowing: int) -> None:
    def body(session: LowLatencySession) -> None:
        low_latency = session.backend.low_latency
        inputs = session.inputs(0)
        x, ids = inputs.xs[session.rank], inputs.ids[session.rank].clone()
        if session.rank == 0:
            ids[0, 0] = 99
        low_latency.dispatch(request_of(session, x, ids, False))
        if session.rank == knowing:
            session.backend.runtime.flush()
        valid = request_of(session, x, inputs.ids[session.rank], False)
        with contextlib.suppress(InvalidArgument, CommError):
            low_latency.dispatch(valid)
            assert session.rank != knowing
        with contextlib.suppress(InvalidArgument, CommError):
            session.backend.settle()
        go_on(session)

    play(Case(num_ranks=3, num_tokens=4, hidden=64, layout=PADDED), body, Settings(knowing))


@pytest.mark.parametrize(
    ("own", "match"),
    [
        ({"recv_layout": TOKEN}, "recv_layout differs .* TOKEN"),
        ({"quantize": "fp8_e4m3"}, "rows differs between ranks: .*FP8 rows with FP32 scales"),
        ({"topk_weights": None}, "topk_weights differs"),
    ],
)
@pytest.mark.parametrize(
    "case",
    [
        Case(num_ranks=3, num_tokens=4, hidden=64, layout=PADDED),
        replace(LOW_LATENCY_TWO_BY_TWO, layout=PADDED),
    ],
    ids=["one-node", "two-nodes"],
)
def test_ranks_that_differ_are_told_so(case: Case, own: dict[str, Any], match: str) -> None:
    def body(session: LowLatencySession) -> None:
        inputs = session.inputs(0)
        arguments = {"recv_layout": PADDED, "topk_weights": inputs.weights[session.rank]}
        if session.rank == 0:
            arguments |= own
        x, ids = inputs.xs[session.rank], inputs.ids[session.rank]
        with pytest.raises(ConfigMismatch, match=match):
            session.buffer.low_latency_dispatch(x, ids, **arguments)
        go_on(session)

    play(case, body)


def test_combines_of_different_handles_are_told_so() -> None:
    def body(session: LowLatencySession) -> None:
        both = [session.low_latency_dispatch(i) for i in range(2)]
        with pytest.raises(ConfigMismatch, match="handle differs between ranks"):
            session.low_latency_combine(both[session.rank])
        go_on(session)

    play(Case(**SMALL, layout=PADDED), body)
