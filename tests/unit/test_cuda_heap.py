# SPDX-License-Identifier: Apache-2.0
"""Symmetric memory handed round: within a process, between processes, over a fabric, and failures.

The driver has no GPU but really shares memory.
"""

from __future__ import annotations

import os
import socket
import threading
from array import array
from dataclasses import replace
from typing import Any

import pytest
from fake_cuda.library import FakeCuda
from fake_cuda.ranks import (
    TIMEOUT_S,
    exchange_in_process,
    exchange_words,
    expected_words,
    open_descriptors,
)

from deepcomm._C import cuda
from deepcomm.backends.cuda import heap as heaps
from deepcomm.backends.cuda.mailbox import Address, Mailbox
from deepcomm.errors import CommError, CommTimeout, ConfigMismatch, CudaError
from deepcomm.group import SubGroup
from deepcomm.testing import LocalCluster, LocalGroup, run_processes


@pytest.fixture
def fake() -> FakeCuda:
    return FakeCuda()


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_heap_is_mapped_by_the_ranks_of_a_process(fake: FakeCuda, num_ranks: int) -> None:
    driver, descriptors = fake.driver(), open_descriptors()
    words = LocalCluster(num_ranks, device="cpu").run(lambda group: exchange_words(group, driver))
    assert words == expected_words(num_ranks)
    assert fake.num_calls("cuMemExportToShareableHandle") == 0
    assert fake.num_calls("cuMemMap") == num_ranks, "they share the addresses"
    assert fake.live() == {}
    assert open_descriptors() == descriptors
    assert heaps._shared == {}


class EachAlone(LocalGroup):
    """A rank that takes its peers for other processes."""

    def all_gather(self, value: Any) -> list[Any]:
        values = LocalGroup.all_gather(self, value)
        return [distinct(rank, entry) for rank, entry in enumerate(values)]


def distinct(rank: int, entry: Any) -> Any:
    place = entry[0] if isinstance(entry, tuple) else None
    if not isinstance(place, heaps._Place):
        return entry
    return (replace(place, process=f"{rank}"), *entry[1:])


def alone(group: LocalGroup) -> EachAlone:
    return EachAlone(group.rank, group.size, group._meeting)


@pytest.mark.parametrize("num_ranks", [2, 5, 16])
def test_heap_travels_as_a_descriptor(fake: FakeCuda, num_ranks: int) -> None:
    driver, descriptors = fake.driver(), open_descriptors()
    words = LocalCluster(num_ranks, device="cpu").run(
        lambda group: exchange_words(alone(group), driver)
    )
    assert words == expected_words(num_ranks)
    assert fake.num_calls("cuMemExportToShareableHandle") == num_ranks
    assert fake.live() == {}
    assert open_descriptors() == descriptors


def test_heap_travels_over_a_fabric_where_descriptors_do_not(fake: FakeCuda) -> None:
    for device in range(2):
        fake.set_attribute(device, cuda.POSIX_FD_SUPPORTED, 0)
        fake.set_attribute(device, cuda.FABRIC_SUPPORTED, 1)
    driver = fake.driver()
    words = LocalCluster(3, device="cpu").run(lambda group: exchange_words(alone(group), driver))
    assert words == expected_words(3)
    assert fake.live() == {}


def test_heap_that_can_travel_in_no_way_is_explained(fake: FakeCuda) -> None:
    fake.set_attribute(1, cuda.POSIX_FD_SUPPORTED, 0)
    driver = fake.driver()
    message = (
        r"rank . on cuda:. \(Fake GPU\) cannot map the memory of rank . on cuda:. \(Fake GPU\): it "
        r"is in another process, not both devices can export file descriptors, nor do both"
    )
    with pytest.raises(CudaError, match=message):
        LocalCluster(2, device="cpu").run(lambda group: exchange_words(alone(group), driver))
    assert fake.live() == {}


def test_heap_needs_peer_access(fake: FakeCuda) -> None:
    fake.set_peer_access(False)
    driver = fake.driver()
    message = r"cuda:(.) \(Fake GPU\) of rank \1 cannot access cuda:(.) \(Fake GPU\) of rank \2"
    with pytest.raises(CudaError, match=message):
        LocalCluster(2, device="cpu").run(lambda group: exchange_words(group, driver))
    words = LocalCluster(2, device="cpu").run(lambda group: exchange_words(group, driver, device=1))
    assert words == expected_words(2), "ranks of one device need none"


def test_heap_is_refused_where_ranks_want_different_sizes(fake: FakeCuda) -> None:
    driver = fake.driver()

    def use(group: LocalGroup) -> None:
        with pytest.raises(ConfigMismatch, match="num_bytes differs between ranks"):
            heaps.open_heap(
                group, driver, cuda.Device(driver, 0), 1 + group.rank * 100_000, TIMEOUT_S
            )

    LocalCluster(2, device="cpu").run(use)
    assert fake.live() == {}


def test_heap_gives_up_on_a_silent_rank_after_the_buffers_timeout(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, exchange = fake.driver(), Mailbox.exchange

    def answer(mailbox: Mailbox, rank: int, *args: Any) -> dict[int, int]:
        return {} if rank == 1 else exchange(mailbox, rank, *args)

    monkeypatch.setattr(Mailbox, "exchange", answer)

    def use(group: LocalGroup) -> str:
        device = cuda.Device(driver, group.rank)
        with pytest.raises((CommTimeout, CommError, CudaError)) as caught:
            heaps.open_heap(alone(group), driver, device, 1000, 0.2)
        return str(caught.value)

    first, _ = LocalCluster(2, device="cpu").run(use)
    assert "rank 0: no descriptor exchanged with rank 1 within 0.2 s" in first
    assert fake.live() == {}


def test_heap_of_some_ranks_names_them_as_the_whole_does(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, exchange = fake.driver(), Mailbox.exchange

    def answer(mailbox: Mailbox, rank: int, *args: Any) -> dict[int, int]:
        return {} if rank == 3 else exchange(mailbox, rank, *args)

    monkeypatch.setattr(Mailbox, "exchange", answer)

    def use(group: LocalGroup) -> tuple[str, int | None]:
        rail = SubGroup(alone(group), (group.rank % 2, group.rank % 2 + 2))
        device = cuda.Device(driver, group.rank % 2)
        with pytest.raises((CommTimeout, CommError, CudaError)) as caught:
            heaps.open_heap(rail, driver, device, 1000, 0.2)
        return str(caught.value), getattr(caught.value, "peer", None)

    outcomes = LocalCluster(4, device="cpu").run(use)
    assert "rank 1: no descriptor exchanged with rank 3 within 0.2 s" in outcomes[1][0]
    assert outcomes[1][1] == 3
    assert fake.live() == {}


@pytest.mark.parametrize("kind", ["process", "descriptor"])
def test_heap_leaves_nothing_behind_whatever_call_fails(fake: FakeCuda, kind: str) -> None:
    driver, descriptors = fake.driver(), open_descriptors()
    num_failures = 0

    def use(group: LocalGroup) -> str:
        device = cuda.Device(driver, group.rank % 2)
        group.barrier()
        if group.rank == 0:
            fake.fail_after(num_failures)
        group.barrier()
        try:
            heap, _ = heaps.open_heap(
                alone(group) if kind == "descriptor" else group, driver, device, 1000, TIMEOUT_S
            )
        except (CommError, CudaError) as error:
            return type(error).__name__
        heap.close([])
        return ""

    while any(outcome := LocalCluster(3, device="cpu").run(use)):
        # One rank failed; the others learnt of it.
        assert sorted(outcome) == ["CommError", "CommError", "CudaError"]
        assert fake.live() == {}, outcome
        assert open_descriptors() == descriptors
        assert heaps._shared == {}
        num_failures += 1
    assert num_failures >= 3 * (8 if kind == "process" else 12)


@pytest.mark.parametrize(
    "attributes",
    [
        pytest.param({}, id="descriptor"),
        pytest.param({cuda.POSIX_FD_SUPPORTED: 0, cuda.FABRIC_SUPPORTED: 1}, id="fabric"),
    ],
)
def test_heap_is_mapped_by_processes(attributes: dict[int, int]) -> None:
    assert run_processes(exchange_in_process, 3, attributes) == expected_words(3)


def test_mailboxes_ignore_strangers() -> None:
    first, second = Mailbox(), Mailbox()
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    descriptors = open_descriptors()
    with open(os.devnull) as null:  # noqa: PTH123 - a descriptor
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [null.fileno()]))]
        for message in (b"", b"x" * 20, bytes(16) + b"\1\0\0\0", b"y" * 500):
            stranger.sendmsg([message], rights, 0, first.address.name)
        stranger.sendto(first.address.secret + b"\1\0\0\0", first.address.name)  # no descriptor
        results: dict[int, dict[int, int]] = {}

        def play(rank: int, own: Mailbox, other: Mailbox) -> None:
            results[rank] = own.exchange(rank, null.fileno(), {1 - rank: other.address}, 20.0)

        thread = threading.Thread(target=play, args=(1, second, first))
        thread.start()
        play(0, first, second)
        thread.join()
    for received in results.values():
        ((_, descriptor),) = received.items()
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)
    assert results.keys() == {0, 1}
    assert open_descriptors() == descriptors
    for box in (first, second):
        box.close()
        box.close()
    stranger.close()


def test_mailbox_gives_up_on_a_silent_peer_and_names_it() -> None:
    own, silent = Mailbox(), Mailbox()
    descriptors = open_descriptors()
    with pytest.raises(CommTimeout, match=r"rank 0: no descriptor exchanged with rank 3 within"):
        own.exchange(0, 0, {3: silent.address}, 0.05)
    own_address = Address(silent.address.name, silent.address.secret)
    silent.close()
    with pytest.raises(CommError, match="rank 0: rank 3 is gone") as caught:
        own.exchange(0, 0, {3: own_address}, 20.0)
    assert caught.value.peer == 3
    own.close()
    assert len(open_descriptors()) == len(descriptors) - 2
