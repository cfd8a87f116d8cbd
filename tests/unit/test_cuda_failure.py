# SPDX-License-Identifier: Apache-2.0
"""Which exception the calls of a buffer that has failed raise."""

from __future__ import annotations

import ctypes

import pytest
from fake_nccl.agent import HostBytes

from deepcomm import CommError, CommTimeout
from deepcomm.backends.cuda.failure import ErrorRecord, Failure, FailureMemory, Trouble

COMPLETE = 2


def make_failure() -> tuple[Failure, ErrorRecord]:
    sizes = ctypes.sizeof(ErrorRecord), ctypes.sizeof(Trouble), 16
    memory = FailureMemory(*map(HostBytes, sizes))
    return Failure(0, 8, memory), ErrorRecord.from_address(memory.record.address)


def assert_unusable_for_good(failure: Failure, cause: str) -> None:
    for _ in range(2):
        with pytest.raises(CommError, match=f"combine: rank 0: .* only be closed: .*{cause}"):
            failure.check_usable("combine")


def test_what_a_watcher_has_found_is_raised_as_it_is_and_then_named() -> None:
    failure, record = make_failure()
    failure.check_usable("dispatch")
    assert not record.is_condemned
    late = CommTimeout("the network did not end", 1)
    failure.condemn(late)
    failure.condemn(CommError("found later"))
    assert failure.failed
    assert record.is_condemned
    with pytest.raises(CommTimeout) as caught:
        failure.check_usable("dispatch")
    assert caught.value is late
    assert_unusable_for_good(failure, "the network did not end")


def test_wait_that_ran_out_is_raised_once_as_a_timeout() -> None:
    failure, record = make_failure()
    record.state, record.operation, record.peer, record.slot = COMPLETE, 2, 1, -1
    with pytest.raises(CommTimeout, match="dispatch: rank 0, count: rank 1 did not come"):
        failure.check_usable("synchronize")
    assert_unusable_for_good(failure, "rank 1 did not come")


def test_what_a_call_has_raised_is_not_raised_again() -> None:
    failure, _ = make_failure()
    with pytest.raises(CommTimeout):
        failure.raise_fatal(CommTimeout("no verdict"))
    assert_unusable_for_good(failure, "no verdict")


def test_cause_that_a_kernel_has_recorded_goes_before_what_follows_from_it() -> None:
    failure, record = make_failure()
    record.state, record.operation, record.peer, record.slot = COMPLETE, 2, 1, -1
    failure.condemn(CommError("the network was aborted"))
    with pytest.raises(CommTimeout, match="rank 1 did not come"):
        failure.check_usable("synchronize")
    assert_unusable_for_good(failure, "rank 1 did not come")


def test_cause_that_a_watcher_has_found_goes_before_what_a_call_runs_into() -> None:
    failure, _ = make_failure()
    late = CommTimeout("the network did not end", 1)
    failure.condemn(late)
    with pytest.raises(CommTimeout) as caught:
        failure.raise_fatal(CommError("the network was aborted"))
    assert caught.value is late
    assert str(caught.value.__cause__) == "the network was aborted"
    assert_unusable_for_good(failure, "the network did not end")
