# SPDX-License-Identifier: Apache-2.0
"""Every test of the folder that exchanges tokens, with two processes: a GPU each, or on CPUs."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from compat.processes import play_files

from deepcomm.testing import run_processes

NUM_RANKS = 2
LIMIT_S = 200.0
FILES = {  # and how many tests there are at least
    "v1": (("test_v1.py", "test_v1_settings.py", "test_v1_streams.py"), 28),
    "v1-low-latency": (("test_v1_low_latency.py",), 25),
    "v2": (("test_v2.py", "test_v2_handles.py"), 30),
}
two_gpus = pytest.mark.gpu(NUM_RANKS)


def play(files: tuple[str, ...], device: str, backend: str) -> dict[str, str]:
    """Return what became of each test, the same on both ranks."""
    found = run_processes(play_files, NUM_RANKS, files, device, backend, timeout_s=LIMIT_S)
    first, second = (entry or {} for entry in found)
    assert first.keys() == second.keys()
    return {test: max(first[test], second[test], key=len) for test in first}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=two_gpus)])
@pytest.mark.parametrize("files", FILES)
def test_processes_play_all_rows(files: str, device: str) -> None:
    names, at_least = FILES[files]
    check(play(names, device, "gloo"), at_least)


def check(outcomes: dict[str, str], at_least: int) -> None:
    failed = {test: what for test, what in outcomes.items() if what.startswith("failed")}
    assert not failed, "\n\n".join(f"{test} {what}" for test, what in failed.items())
    assert list(outcomes.values()).count("passed") >= at_least


@two_gpus
def test_nccl_group_is_a_group() -> None:
    if not dist.is_nccl_available():
        pytest.skip("torch was built without NCCL")
    check(play(("test_v2.py",), "cuda", "nccl"), at_least=15)
