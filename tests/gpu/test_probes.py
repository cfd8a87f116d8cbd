# SPDX-License-Identifier: Apache-2.0
"""Every probe kernel on GPUs, from the sources that the emulator runs, over many fresh launches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from gpu.launch import World
from gpu.probes import FIXED_RANKS, PROBES, Setup, run_probe

REPEATS = 300
ONE_DEVICE_RANKS = (2, 3, 8)

ONE_DEVICE = [
    pytest.param(name, num_ranks, id=f"{name}-{num_ranks}")
    for name in PROBES
    for num_ranks in ONE_DEVICE_RANKS
    if FIXED_RANKS.get(name, num_ranks) == num_ranks
]


@pytest.fixture(scope="module")
def one_device() -> Callable[[int], World]:
    return cache(World.on_one_device)


@pytest.fixture(scope="module")
def two_devices() -> World:
    return World.across_devices(2)


def repeat(world: World, name: str) -> None:
    for seed in range(REPEATS):
        setup = Setup(world, np.random.default_rng(seed))
        try:
            run_probe(setup, PROBES[name])
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.gpu(1)
@pytest.mark.parametrize(("name", "num_ranks"), ONE_DEVICE)
def test_probe_holds_between_ranks_of_one_device(
    one_device: Callable[[int], World], name: str, num_ranks: int
) -> None:
    repeat(one_device(num_ranks), name)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("name", PROBES)
def test_probe_holds_between_two_devices(two_devices: World, name: str) -> None:
    repeat(two_devices, name)
