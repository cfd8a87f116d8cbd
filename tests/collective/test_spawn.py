# SPDX-License-Identifier: Apache-2.0
"""``run_processes``: results, failures, deaths and deadlines."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepcomm import CommError, Error, InvalidArgument
from deepcomm.testing import run_processes


def add_up(group: dist.ProcessGroup, start: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = start + dist.get_rank(group)
    dist.all_reduce(total, group=group)
    return os.getpid(), total


def test_run_processes_returns_results_by_rank() -> None:
    results = run_processes(add_up, 3, torch.tensor([10, 20]))
    pids = {pid for pid, _ in results}
    assert len(pids) == 3
    assert os.getpid() not in pids
    for _, total in results:
        assert total.tolist() == [33, 63]


def read_variable(_group: dist.ProcessGroup, name: str) -> str | None:
    return os.environ.get(name)


def test_run_processes_sets_variables_of_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    env = [{"DEEPCOMM_TEST_WHO": "zero"}, {}]
    monkeypatch.setenv("DEEPCOMM_TEST_WHO", "parent")
    assert run_processes(read_variable, 2, "DEEPCOMM_TEST_WHO", env=env) == ["zero", "parent"]


def fail_on_rank_1(group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) == 1:
        time.sleep(0.2)  # rank 0 fails first, but only because rank 1 does
        raise KeyError("the cause")
    raise CommError("a consequence", 1)


def test_run_processes_raises_the_cause_and_names_the_rank() -> None:
    with pytest.raises(KeyError, match="the cause") as caught:
        run_processes(fail_on_rank_1, 2)
    notes = "\n".join(getattr(caught.value, "__notes__", ["rank 1 of 2 fail_on_rank_1"]))
    assert "rank 1 of 2" in notes
    assert "fail_on_rank_1" in notes


def raise_comm_error(_group: dist.ProcessGroup) -> None:
    raise CommError("lost", 7)


def test_run_processes_keeps_attributes_of_errors() -> None:
    with pytest.raises(CommError) as caught:
        run_processes(raise_comm_error, 1)
    assert caught.value.peer == 7


class OddError(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def raise_odd_error(_group: dist.ProcessGroup) -> None:
    raise OddError(1, 2)


def test_run_processes_reports_errors_that_cannot_be_sent() -> None:
    with pytest.raises(Error, match="OddError: 1 and 2"):
        run_processes(raise_odd_error, 1)


def leave(group: dist.ProcessGroup) -> int:
    if dist.get_rank(group) == 1:
        os._exit(3)
    return 5


def test_run_processes_reports_a_death() -> None:
    with pytest.raises(Error, match="rank 1 of 2: the process ended with code 3"):
        run_processes(leave, 2)


def test_run_processes_allows_a_death_that_is_expected() -> None:
    assert run_processes(leave, 2, may_die={1}) == [5, None]


def hang(group: dist.ProcessGroup) -> int:
    if dist.get_rank(group) == 0:
        time.sleep(600)
    return os.getpid()


def test_run_processes_kills_stragglers() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 2"):
        run_processes(hang, 2, timeout_s=3.0)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("options", [{"num_ranks": 0}, {"num_ranks": 2, "env": [{}]}])
def test_run_processes_checks_its_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="num_ranks"):
        run_processes(hang, **options)
