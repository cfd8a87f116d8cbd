# SPDX-License-Identifier: Apache-2.0
"""The compatibility tests as one process of several plays them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from compat.places import PLACES_KEY, Place, on_threads

from deepcomm.errors import describe_error
from deepcomm.group import as_group

FOLDER = Path(__file__).parent
OPTIONS = ("-q", "-p", "no:cacheprovider")


def on_rank(group: Any, device: str, function: Any, num_ranks: int) -> list[Any]:
    """Run this process's rank of a group whose other processes do the same; return all results.

    What fails on one rank fails on all, so that they begin the next test together.
    """
    if num_ranks == 1:
        index = f":{torch.cuda.current_device()}" if device == "cuda" else ""
        return on_threads(device + index, function, 1)
    assert num_ranks == dist.get_world_size(group)
    failure: BaseException | None = None
    result = None
    try:
        result = function(group)
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001  # raised below
        failure = error
    message = None if failure is None else describe_error(failure)
    # Not over the group itself, whose payload may travel on GPUs.
    outcomes = as_group(dist.group.WORLD).all_gather((result, message))
    if failure is not None:
        raise failure
    for rank, (_, text) in enumerate(outcomes):
        assert text is None, f"rank {rank}: {text}"
    return [value for value, _ in outcomes]


class Player:
    """A pytest plugin: the only place is this one; notes what became of each test."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.outcomes: dict[str, str] = {}

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[PLACES_KEY] = [pytest.param(self._place, id=self._place.name)]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if "place" in getattr(item, "fixturenames", ())]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.outcomes[report.nodeid] = report.outcome
            if report.failed:
                self.outcomes[report.nodeid] += f": {report.longreprtext}"


def play_files(group: Any, names: tuple[str, ...], device: str, backend: str) -> dict[str, str]:
    """Play files of tests with the other processes; return what became of each test."""
    size = dist.get_world_size(group)
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    if backend != "gloo":
        group = dist.new_group(backend=backend)
    run = functools.partial(on_rank, group, device)
    player = Player(Place("processes", device, size, run, is_cpu=device == "cpu"))
    files = [str(FOLDER / name) for name in names]
    pytest.main([*OPTIONS, "--rootdir", str(FOLDER.parents[1]), *files], plugins=[player])
    return player.outcomes
