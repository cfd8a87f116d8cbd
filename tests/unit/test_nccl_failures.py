# SPDX-License-Identifier: Apache-2.0
"""Failures of moves over NCCL, its ends, and what both leave: nothing.

The library has no GPU but really moves bytes between threads and processes.
"""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_nccl.library import FakeNccl
from fake_nccl.ranks import (
    SOON_S,
    STREAM,
    TIMEOUT_S,
    device,
    exchange,
    in_thread,
    leaving_nothing,
    network,
    pair,
    run,
)

from deepcomm._C import nccl
from deepcomm.errors import CommError, CommTimeout, Error, NcclError
from deepcomm.testing import LocalGroup

TESTS = Path(__file__).parents[1]
SIZES = (8, 77)


@pytest.fixture
def fake() -> FakeNccl:
    return FakeNccl()


# Moves that fail


def failing_move(fake: FakeNccl, *, timeout_s: float = TIMEOUT_S) -> BaseException:
    """Return what a move of two ranks raises on rank 0; see that later calls name it."""

    def use(group: LocalGroup) -> BaseException:
        with network(group, fake, timeout_s=timeout_s) as made:
            with pytest.raises(Error) as caught:
                made.move(pair(1 - group.rank))
            assert fake.group_depth() == 0
            with pytest.raises(CommError) as later:
                made.move([])
            assert str(later.value) == (
                f"rank {group.rank}: NCCL: expected a communicator in use, got one that failed: "
                f"{caught.value}"
            )
            made.abort()
            made.abort()
            return caught.value

    with leaving_nothing(fake):
        return run(2, use)[0]


@pytest.mark.parametrize("call", ["ncclGroupStart", "ncclSend", "ncclRecv", "ncclGroupEnd"])
def test_move_that_fails_names_call_and_code(fake: FakeNccl, call: str) -> None:
    fake.wish(f"fail {call}", 1)
    error = failing_move(fake)
    assert isinstance(error, NcclError)
    assert str(error) == (
        f"rank 0: NCCL: {call}() failed: 1 ncclUnhandledCudaError (as NCCL calls it); "
        "as the test wants it"
    )


def test_move_that_hangs_ends_in_time(fake: FakeNccl) -> None:
    fake.wish("hang ncclGroupEnd")
    start = time.monotonic()
    error = failing_move(fake, timeout_s=0.5)
    assert isinstance(error, CommTimeout)
    assert str(error) == "rank 0: NCCL: a move of 2 ranks did not end within 0.5 s"
    assert time.monotonic() - start < SOON_S


@pytest.mark.parametrize(("code", "kind"), [(6, CommError), (2, NcclError)])
def test_errors_of_earlier_moves_are_raised_by_the_next(
    fake: FakeNccl, code: int, kind: type[Error]
) -> None:
    def use(group: LocalGroup) -> None:
        with network(group, fake) as made:
            exchange(group, made, SIZES)
            fake.wish("async error", code)
            with pytest.raises(kind, match=f"^rank 0: NCCL: an earlier move failed: {code} nccl"):
                made.move([])

    run(1, use)
    assert fake.num_live() == 0


def test_peer_that_leaves_is_a_lost_peer(fake: FakeNccl) -> None:
    def use(group: LocalGroup) -> None:
        with network(group, fake) as made:
            if group.rank == 1:
                made.abort()
                return
            with pytest.raises(CommError, match=r"a move failed: 6 ncclRemoteError \(remote"):
                made.move(pair(1))

    run(2, use)


def test_peer_whose_process_dies_is_a_lost_peer(fake: FakeNccl) -> None:
    library = fake.library()
    unique_id = library.make_unique_id()
    command = [sys.executable, TESTS / "fake_nccl" / "mortal.py", fake.path, unique_id.hex()]
    with subprocess.Popen(command, env={"PYTHONPATH": str(TESTS)}) as peer:
        config = nccl.CommunicatorConfig("rank 0", 0, 2, unique_id)
        communicator = nccl.Communicator(device(0), library, config, TIMEOUT_S)
        assert peer.wait() == -signal.SIGKILL
    (message,) = pair(1)
    (span,) = message.receives
    with pytest.raises(CommError, match=r"^rank 0: NCCL: a move failed: 6 ncclRemoteError"):
        communicator.move(STREAM, [], [(1, span.address, span.num_bytes)], TIMEOUT_S)
    assert fake.num_live() == 0


# Abort and close


@pytest.mark.parametrize("stuck", ["hang ncclGroupEnd", "block ncclGroupEnd", "peer"])
def test_abort_from_a_thread_ends_a_stuck_move(fake: FakeNccl, stuck: str) -> None:
    def use(group: LocalGroup) -> None:
        with network(group, fake) as made:
            if group.rank == 0:
                move, raised = in_thread(lambda: made.move(pair(1)))
                move.join(0.2)
                assert move.is_alive()
                made.abort()
                move.join(SOON_S)
                assert not move.is_alive()
                assert [str(error) for error in raised] == [
                    "rank 0: NCCL: expected a communicator in use, got one that was aborted"
                ]
                assert isinstance(raised[0], CommError)
                with pytest.raises(CommError, match=r"got one that was aborted$"):
                    made.move([])
            group.barrier()

    if stuck != "peer":
        fake.wish(stuck)
    start = time.monotonic()
    with leaving_nothing(fake):
        run(2, use)
    assert time.monotonic() - start < SOON_S


def test_watch_ends_a_stuck_move_once_the_rank_has_failed(fake: FakeNccl) -> None:
    def use(group: LocalGroup) -> None:
        has_failed = threading.Event()
        with network(group, fake) as made:
            made.watch(has_failed.is_set, pytest.fail)
            if group.rank == 0:
                move, raised = in_thread(lambda: made.move(pair(1)))
                move.join(0.2)
                assert move.is_alive()
                has_failed.set()
                move.join(SOON_S)
                assert not move.is_alive()
                assert isinstance(raised[0], CommError)
            group.barrier()

    with leaving_nothing(fake):
        run(2, use)


def test_aborts_of_many_threads_are_one(fake: FakeNccl) -> None:
    fake.wish("hang ncclGroupEnd")

    def use(group: LocalGroup) -> None:
        with network(group, fake) as made:
            move, raised = in_thread(lambda: made.move(pair(0)))
            aborts = [in_thread(made.abort) for _ in range(8)]
            for thread, errors in (*aborts, (move, [])):
                thread.join(SOON_S)
                assert not thread.is_alive()
                assert errors == []
            assert len(raised) == 1

    run(1, use)
    assert fake.num_live() == 0


def test_close_is_idempotent_and_final(fake: FakeNccl) -> None:
    def use(group: LocalGroup) -> None:
        with network(group, fake) as made:
            made.close()
            made.close()
            made.abort()
            with pytest.raises(CommError, match=r"in use, got one that was closed$"):
                made.move([])

    run(2, use)
    assert fake.num_live() == 0


@pytest.mark.parametrize(
    ("wish", "value", "text"),
    [
        ("hang ncclCommFinalize", 1, r"ncclCommFinalize\(\) of 1 ranks did not end within 0\.3 s"),
        ("fail ncclCommFinalize", 3, r"ncclCommFinalize\(\) failed: 3 ncclInternalError"),
        ("async error", 6, r"ncclCommFinalize\(\) failed: 6 ncclRemoteError"),
    ],
)
def test_close_that_fails_aborts_and_says_so(
    fake: FakeNccl, caplog: pytest.LogCaptureFixture, wish: str, value: int, text: str
) -> None:
    def use(group: LocalGroup) -> None:
        with network(group, fake, timeout_s=0.3):
            fake.wish(wish, value)

    with caplog.at_level(logging.WARNING, logger="deepcomm"):
        run(1, use)
    (record,) = caplog.records
    assert re.search(rf"closed by force: rank 0: NCCL: {text}", record.getMessage())
    assert fake.num_live() == 0


def test_close_during_a_move_waits_and_then_aborts(fake: FakeNccl) -> None:
    fake.wish("block ncclGroupEnd")

    def use(group: LocalGroup) -> None:
        with network(group, fake, timeout_s=0.2) as made:
            move, raised = in_thread(lambda: made.move(pair(0)))
            move.join(0.1)
            made.close()
            move.join(SOON_S)
            assert "was aborted" in str(raised[0])

    run(1, use)
    assert fake.num_live() == 0


def test_network_that_nobody_closed_is_aborted(
    fake: FakeNccl, capfd: pytest.CaptureFixture[str]
) -> None:
    config = nccl.CommunicatorConfig("rank 0", 0, 1, fake.library().make_unique_id())
    communicator = nccl.Communicator(device(0), fake.library(), config, 9)
    assert fake.num_live() == 1
    fake.wish("fail ncclCommAbort", 2)
    del communicator
    assert fake.num_live() == 0
    assert "ncclCommAbort(comm) failed: 2 ncclSystemError" in capfd.readouterr().err


def test_interrupt_ends_a_move(fake: FakeNccl) -> None:
    fake.wish("hang ncclGroupEnd")
    config = nccl.CommunicatorConfig("rank 0", 0, 1, fake.library().make_unique_id())
    communicator = nccl.Communicator(device(0), fake.library(), config, 9)
    (message,) = pair(0)
    spans = [(0, span.address, span.num_bytes) for span in (*message.sends, *message.receives)]
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        communicator.move(0, spans[:1], spans[1:], TIMEOUT_S)
    timer.join()
    with pytest.raises(CommError, match=r"got one that was interrupted$"):
        communicator.move(0, [], [], TIMEOUT_S)
    assert communicator.close(1.0) == ""
