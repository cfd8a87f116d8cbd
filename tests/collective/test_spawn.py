# SPDX-License-Identifier: Apache-2.0
"""``run_processes``: results, failures, deaths and deadlines."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from collective import spawn_workers as workers

import deepcomm
from deepcomm import CommError, Error, InvalidArgument
from deepcomm.testing import run_processes

if TYPE_CHECKING:
    from pathlib import Path

PACKAGE_OF_A_RANK = """
import deepcomm
from deepcomm.testing import run_processes

def package(group):
    return deepcomm.__file__

if __name__ == "__main__":
    print(*run_processes(package, 1))
"""


def test_run_processes_returns_results_by_rank() -> None:
    results = run_processes(workers.add_up, 3, torch.tensor([10, 20]))
    pids = {pid for pid, _ in results}
    assert len(pids) == 3
    assert os.getpid() not in pids
    for _, total in results:
        assert total.tolist() == [33, 63]


def test_run_processes_sets_variables_of_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    env = [{"DEEPCOMM_TEST_WHO": "zero"}, {}]
    monkeypatch.setenv("DEEPCOMM_TEST_WHO", "parent")
    assert run_processes(workers.read_variable, 2, "DEEPCOMM_TEST_WHO", env=env) == [
        "zero",
        "parent",
    ]


def test_run_processes_raises_the_cause_and_names_the_rank() -> None:
    with pytest.raises(KeyError, match="the cause") as caught:
        run_processes(workers.fail_on_rank_1, 2)
    notes = "\n".join(getattr(caught.value, "__notes__", ["rank 1 of 2 fail_on_rank_1"]))
    assert "rank 1 of 2" in notes
    assert "fail_on_rank_1" in notes


def test_run_processes_keeps_attributes_of_errors() -> None:
    with pytest.raises(CommError) as caught:
        run_processes(workers.raise_comm_error, 1)
    assert caught.value.peer == 7


def test_run_processes_reports_errors_that_cannot_be_sent() -> None:
    with pytest.raises(Error, match="OddError: 1 and 2"):
        run_processes(workers.raise_odd_error, 1)


def test_run_processes_reports_a_death() -> None:
    with pytest.raises(Error, match="rank 1 of 2: the process ended with code 3"):
        run_processes(workers.leave, 2)


def test_run_processes_allows_a_death_that_is_expected() -> None:
    assert run_processes(workers.leave, 2, may_die={1}) == [5, None]


def test_run_processes_kills_stragglers() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 2"):
        run_processes(workers.hang, 2, timeout_s=3.0)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("options", [{"num_ranks": 0}, {"num_ranks": 2, "env": [{}]}])
def test_run_processes_checks_its_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="num_ranks"):
        run_processes(workers.hang, **options)


@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="Python 3.10 searches the working folder: PYTHONSAFEPATH"
)
def test_run_processes_imports_what_its_caller_did(tmp_path: Path) -> None:
    other = tmp_path / "checkout" / "deepcomm"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    program = tmp_path / "program.py"
    program.write_text(PACKAGE_OF_A_RANK)
    ran = subprocess.run(
        [sys.executable, str(program)], cwd=other.parent, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [deepcomm.__file__]
