# SPDX-License-Identifier: Apache-2.0
"""Moves over NCCL: bytes arrive, and ranks meet or fail together.

The library has no GPU but really moves bytes between threads and processes.
"""

from __future__ import annotations

import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from fake_nccl.library import FakeNccl
from fake_nccl.ranks import (
    SOON_S,
    STREAM,
    TIMEOUT_S,
    Memory,
    device,
    exchange,
    exchange_in_process,
    leaving_nothing,
    network,
    pair,
    run,
)

from deepcomm._C import nccl
from deepcomm.backends.cuda.network import Message, Network, Span
from deepcomm.errors import CommTimeout, Error, InvalidArgument
from deepcomm.group import SubGroup
from deepcomm.testing import LocalGroup, run_processes

SIZES = (0, 1, 1 << 20, 0, 77)


@pytest.fixture
def fake() -> FakeNccl:
    return FakeNccl()


# Bytes


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_move_delivers_in_order_to_and_from_every_peer(fake: FakeNccl, num_ranks: int) -> None:
    def use(group: LocalGroup) -> None:
        with network(group, fake) as made:
            for _ in range(3):
                exchange(group, made, SIZES)

    run(num_ranks, use)
    with leaving_nothing(fake):
        run(num_ranks, use)


def test_move_between_processes() -> None:
    processes = run_processes(exchange_in_process, 3, SIZES)
    assert len(set(processes)) == 3


def test_move_goes_to_the_current_stream(fake: FakeNccl) -> None:
    def use(group: LocalGroup) -> None:
        with network(group, fake) as made:
            made.move(pair(0))

    run(1, use)
    assert fake.asked().stream == STREAM


def test_move_of_parts_that_differ_by_rank(fake: FakeNccl) -> None:
    def use(group: LocalGroup) -> bytes:
        memory = Memory()
        into = memory.of(6)
        halves = (Span(into.address, 3), Span(into.address + 3, 3))
        with network(group, fake) as made:
            if group.rank == 0:
                made.move([Message(1, (memory.holding(b"abc"),), ())])
                made.move([Message(1, (memory.holding(b"def"), memory.of(0)), ())])
            else:
                made.move([Message(0, (), (memory.of(0), halves[0]))])
                made.move([Message(0, (), (halves[1],))])
        return bytes(memory.buffers[0].raw)

    assert run(2, use)[1] == b"abcdef"


def test_nothing_to_move_is_no_group(fake: FakeNccl) -> None:
    def use(group: LocalGroup) -> None:
        with network(group, fake) as made:
            fake.wish("fail ncclSend", 1)
            made.move([])
            made.move([Message(0, (Span(0, 0),), (Span(0, 0),))])

    run(1, use)


def test_two_networks_of_a_process_are_independent(fake: FakeNccl) -> None:
    def use(group: LocalGroup) -> None:
        rail = SubGroup(group, range(group.rank % 2, 4, 2))
        with network(rail, fake) as first, network(group, fake) as second:
            exchange(rail, first, SIZES)
            exchange(group, second, SIZES)
            first.abort()
            exchange(group, second, SIZES)

    run(4, use)
    assert fake.num_live() == 0


def test_library_is_told_what_the_network_needs(fake: FakeNccl) -> None:
    def use(options: dict[str, int]) -> Any:
        def meet(group: LocalGroup) -> Network:
            with network(group, fake, **options) as made:
                return made

        return run(1, meet)[0]

    made = use({})
    undefined = -(1 << 31)
    asked = fake.asked()
    assert (asked.config_bytes, asked.config_version, asked.blocking) == (48, 22600, 0)
    assert (asked.traffic_class, asked.max_ctas) == (undefined, undefined)
    assert made.describe() == f"NCCL 2.28.9, {fake.path}"
    made = use({"traffic_class": 104, "max_ctas": 4})
    assert made.describe() == f"NCCL 2.28.9, {fake.path}, traffic class 104"
    assert (fake.asked().traffic_class, fake.asked().max_ctas) == (104, 4)


# Arguments


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (Message(1, (Span(1, 1),), ()), "peer: expected one of 1 ranks, got 1"),
        (Message(-1, (), (Span(1, 1),)), "peer: expected one of 1 ranks, got -1"),
        (Message(0, (Span(1, -2),), ()), "num_bytes: expected at least 0, got -2"),
    ],
)
def test_wrong_messages_are_refused_and_the_network_goes_on(
    fake: FakeNccl, message: Message, text: str
) -> None:
    def use(group: LocalGroup) -> None:
        with network(group, fake) as made:
            with pytest.raises(InvalidArgument, match=f"^{text}$"):
                made.move([message])
            exchange(group, made, SIZES)

    run(1, use)


def test_communicator_checks_its_configuration(fake: FakeNccl) -> None:
    wrong = {
        "rank: expected one of 2, got 2": nccl.CommunicatorConfig("rank 2", 2, 2, bytes(128)),
        "unique_id: expected 128 bytes, got 5": nccl.CommunicatorConfig("rank 0", 0, 2, b"short"),
    }
    for text, config in wrong.items():
        with pytest.raises(InvalidArgument, match=f"^{text}$"):
            nccl.Communicator(device(0), fake.library(), config, 1.0)


# Construction that fails


def failures_of(num_ranks: int, meet: Any) -> list[str]:
    def use(group: LocalGroup) -> str:
        with pytest.raises(Error) as caught:
            meet(group)
        return f"{type(caught.value).__name__}: {caught.value}"

    return run(num_ranks, use)


def meet_over(fake: FakeNccl, timeout_s: float = TIMEOUT_S, **options: Any) -> Any:
    def meet(group: LocalGroup) -> None:
        with network(group, fake, timeout_s=timeout_s, **options):
            pass

    return meet


def test_meeting_that_hangs_ends_in_time(fake: FakeNccl) -> None:
    fake.wish("hang ncclCommInitRankConfig")
    start = time.monotonic()
    with leaving_nothing(fake):
        texts = failures_of(2, meet_over(fake, timeout_s=0.3))
    assert texts == [
        f"CommTimeout: rank {rank}: NCCL: ncclCommInitRankConfig() of 2 ranks did not end "
        "within 0.3 s"
        for rank in range(2)
    ]
    assert time.monotonic() - start < SOON_S


def test_meeting_without_a_peer_ends_in_time(fake: FakeNccl) -> None:
    config = nccl.CommunicatorConfig("rank 3", 0, 2, fake.library().make_unique_id())
    text = r"^rank 3: NCCL: .* of 2 ranks did not .* 0\.2 s$"
    with leaving_nothing(fake), pytest.raises(CommTimeout, match=text):
        nccl.Communicator(device(0), fake.library(), config, 0.2)


@pytest.mark.parametrize("call", ["ncclGetUniqueId", "ncclCommInitRankConfig"])
def test_meeting_that_fails_names_call_and_code(fake: FakeNccl, call: str) -> None:
    fake.wish(f"fail {call}", 5)
    text = r"5 ncclInvalidUsage \(as NCCL calls it\); as the test wants it$"
    for failure in failures_of(2, meet_over(fake)):
        assert re.search(rf"{call}\(.*\) failed: {text}", failure), failure
    assert fake.num_live() == 0


def no_library() -> nccl.Library:
    return nccl.Library.open("libnone.so")


def test_rank_without_nccl_fails_on_all(fake: FakeNccl) -> None:
    def meet(group: LocalGroup) -> None:
        with network(group, fake, find=no_library if group.rank == 1 else None):
            pass

    reason = "libnone.so cannot be opened: libnone.so: cannot open shared object file"
    first, second, third = failures_of(3, meet)
    assert second.startswith(f"NcclError: {reason}")
    assert "pip install deepcomm[cu12] or deepcomm[cu13]" in second
    for rank, text in ((0, first), (2, third)):
        assert text.startswith(f"CommError: NCCL: rank {rank}: rank 1 failed: {reason}")


def test_versions_that_differ_fail_on_all_rails(fake: FakeNccl) -> None:
    other: Any = SimpleNamespace(version="2.27.3")

    def meet(group: LocalGroup) -> None:
        rail = SubGroup(group, range(group.rank % 2, 4, 2))
        with network(rail, fake, find=(lambda: other) if group.rank == 2 else None):
            pass

    text = "NCCL: version differs between ranks: rank 0 has '2.28.9', rank 2 has '2.27.3'"
    failures = failures_of(4, meet)
    assert failures[0] == failures[2] == f"ConfigMismatch: {text}"
    assert failures[1] == f"CommError: NCCL: rank 1: rank 0 failed: {text}"
    assert failures[3] == f"CommError: NCCL: rank 3: rank 0 failed: {text}"


def test_rail_that_fails_ends_those_that_have_met(fake: FakeNccl) -> None:
    fake.wish("version", 22509)

    def meet(group: LocalGroup) -> None:
        rail = SubGroup(group, [group.rank])
        with network(rail, fake, traffic_class=1 if group.rank == 1 else None):
            pass

    first, second = failures_of(2, meet)
    text = "traffic_class: expected NCCL 2.26.0 or newer, got 2.25.9"
    assert second == f"NcclError: {text}"
    assert first == f"CommError: NCCL: rank 0: rank 1 failed: {text}"
    assert fake.num_live() == 0
