# SPDX-License-Identifier: Apache-2.0
"""A wait whose peer never comes ends by its deadline, says so, and leaves the context usable."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
TIMEOUT_S = 0.25  # as in absent_peer.py
MARGIN_S = 0.25
GIVE_UP_S = 0.2  # far less than the deadline of 10 s in absent_peer.py

# csrc/layout/error_record.hpp
COMPLETE, TIMEOUT, OPERATION_PROBE = 2, 0, 0
SEND, RECEIVE, MEET = 1, 2, 5

# Where rank 0 of 2 may give up: (role, peer).
SITES = {
    "signal": {(RECEIVE, 1)},
    "bulk_put": {(RECEIVE, 1)},
    "bulk_copy": {(RECEIVE, 1)},
    "ring": {(SEND, 1), (RECEIVE, 1)},
    "barrier_fold": {(MEET, 1), (MEET, -1)},  # -1: a block that waits for the one that waits
    "packet": {(RECEIVE, 1)},
}


@cache
def results(num_devices: int) -> dict[str, dict[str, Any]]:
    """Run all probes in a process of their own, which a broken context may end."""
    command = [sys.executable, "-m", "gpu.absent_peer", str(num_devices)]
    done = subprocess.run(
        command, cwd=TESTS, capture_output=True, text=True, check=False, timeout=120
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, f"after {[line['probe'] for line in lines]}: {done.stderr}"
    return {line["probe"]: line for line in lines}


def assert_ends_by_deadline(num_devices: int, probe: str) -> None:
    result = results(num_devices)[probe]
    assert TIMEOUT_S <= result["elapsed_s"] < TIMEOUT_S + MARGIN_S
    assert list(result["records"]) == ["0"]
    record = result["records"]["0"]
    assert (record["state"], record["kind"]) == (COMPLETE, TIMEOUT)
    assert (record["operation"], record["rank"]) == (OPERATION_PROBE, 0)
    assert (record["role"], record["peer"]) in SITES[probe]
    assert 0 <= record["block"] < result["grid"]
    assert record["expected"] != record["observed"]
    assert result["computes"]


def assert_gives_up(num_devices: int, probe: str) -> None:
    after = results(num_devices)[probe]["after_failure"]
    assert after["elapsed_s"] < GIVE_UP_S
    first = {"state": COMPLETE} | dict.fromkeys(after["records"]["0"].keys() - {"state"}, 0)
    assert after["records"] == {"0": first}, "the first failure's record was changed"


@pytest.mark.gpu(1)
@pytest.mark.parametrize("probe", SITES)
def test_absent_peer_ends_the_wait_on_one_device(probe: str) -> None:
    assert_ends_by_deadline(1, probe)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("probe", SITES)
def test_absent_peer_ends_the_wait_across_devices(probe: str) -> None:
    assert_ends_by_deadline(2, probe)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("probe", SITES)
def test_absent_peer_is_not_awaited_after_a_failure_on_one_device(probe: str) -> None:
    assert_gives_up(1, probe)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("probe", SITES)
def test_absent_peer_is_not_awaited_after_a_failure_across_devices(probe: str) -> None:
    assert_gives_up(2, probe)
