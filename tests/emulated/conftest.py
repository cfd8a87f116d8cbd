# SPDX-License-Identifier: Apache-2.0
"""How many seeds the emulated tests run, the programs they share, schedules of operations."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from emulated.build import PLAIN, Program, Variant, build, prune
from emulated.cluster import Settings

DEFAULT_SEEDS = 1_000
DEFAULT_OPERATION_SEEDS = 2
DEFAULT_SURVIVOR_ROUNDS = 1

Builder = Callable[..., Program]
Schedules = Callable[..., list[Settings]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulated-seeds",
        type=int,
        default=DEFAULT_SEEDS,
        help="seeds of every correct protocol and shape under the emulator (default: %(default)s, "
        ".ci/run takes 10000); known only where tests/emulated is named on the command line",
    )
    parser.addoption(
        "--operation-seeds",
        type=int,
        default=DEFAULT_OPERATION_SEEDS,
        help="seeds of every case of the backend's operations (default: %(default)s)",
    )
    parser.addoption(
        "--first-operation-seed", type=int, default=0, help="where they begin (default: 0)"
    )
    parser.addoption(
        "--survivor-rounds",
        type=int,
        default=DEFAULT_SURVIVOR_ROUNDS,
        help="how often mutants of operations that are known to survive are tried with every "
        "scenario (default: %(default)s)",
    )
    parser.addoption(
        "--trace-operations", action="store_true", help="print every emulated event to stderr"
    )


def pytest_collection_finish() -> None:
    """Spare the garbage collector what imports have left: torch's objects were 5 % of a run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def num_seeds(pytestconfig: pytest.Config) -> int:
    """Seeds for each correct case."""
    return int(pytestconfig.getoption("--emulated-seeds", default=DEFAULT_SEEDS))


@pytest.fixture(scope="session")
def survivor_rounds(pytestconfig: pytest.Config) -> int:
    """Rounds of attacks that listed survivors must survive."""
    return int(pytestconfig.getoption("--survivor-rounds", default=DEFAULT_SURVIVOR_ROUNDS))


@pytest.fixture(scope="session")
def program() -> Builder:
    """Build a test program once a session; forget what earlier sources left behind."""
    prune()

    @cache
    def get(name: str, variant: Variant = PLAIN) -> Program:
        return build(name, variant)

    return get


@pytest.fixture
def schedules(request: pytest.FixtureRequest) -> Schedules:
    """Return the settings of each run of a test of operations: one a seed."""
    option = request.config.getoption
    first = int(option("--first-operation-seed", default=0))
    count = int(option("--operation-seeds", default=DEFAULT_OPERATION_SEEDS))
    trace = bool(option("--trace-operations", default=False))
    torch.set_num_threads(1)  # ranks are threads that take turns

    def vary(**fields: Any) -> list[Settings]:
        replay = (
            f"pytest '{request.node.nodeid}' --first-operation-seed {{}} --operation-seeds 1 "
            "--trace-operations"
        )
        return [
            Settings(seed=seed, trace=trace, replay=replay.format(seed), **fields)
            for seed in range(first, first + count)
        ]

    return vary
