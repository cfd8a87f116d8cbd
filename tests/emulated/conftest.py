# SPDX-License-Identifier: Apache-2.0
"""How many seeds the emulated tests run, and the programs that they share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from emulated.build import PLAIN, Program, Variant, build, prune

DEFAULT_SEEDS = 10_000

Builder = Callable[..., Program]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulated-seeds",
        type=int,
        default=DEFAULT_SEEDS,
        help="seeds of every correct protocol and shape under the emulator (default: %(default)s); "
        "known only where tests/emulated is named on the command line",
    )


@pytest.fixture(scope="session")
def num_seeds(pytestconfig: pytest.Config) -> int:
    """Seeds for each correct case."""
    return int(pytestconfig.getoption("--emulated-seeds", default=DEFAULT_SEEDS))


@pytest.fixture(scope="session")
def program() -> Builder:
    """Build a test program once a session; forget what earlier sources left behind."""
    prune()

    @cache
    def get(name: str, variant: Variant = PLAIN) -> Program:
        return build(name, variant)

    return get
