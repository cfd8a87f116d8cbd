# SPDX-License-Identifier: Apache-2.0
"""Where the ranks of the compatibility tests are: the tests are the same in all places."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from deepcomm.testing import LocalCluster

if TYPE_CHECKING:
    from collections.abc import Callable


class Runner(Protocol):
    """Calls a function with its group on every rank, and returns the results by rank."""

    def __call__(self, function: Callable[[Any], Any], num_ranks: int) -> list[Any]: ...


@dataclass(frozen=True, eq=False)
class Place:
    """Ranks, and where their tensors are.

    Attributes:
        device: Of tensors; "cuda" is the current one of each rank.
        num_ranks: Of the cases.
        is_cpu: Whether the CPU backend runs, which has more dtypes.
    """

    name: str
    device: str
    num_ranks: int
    run_ranks: Runner
    is_cpu: bool = False

    def run(self, function: Callable[[Any], Any], num_ranks: int | None = None) -> list[Any]:
        """Call ``function(group)`` on every rank; return the results by rank."""
        return self.run_ranks(function, num_ranks or self.num_ranks)


def on_threads(device: str, function: Callable[[Any], Any], num_ranks: int) -> list[Any]:
    """Run ranks as threads; on GPUs rank i is on GPU i, starting again where there are fewer."""
    return LocalCluster(num_ranks, device=device).run(function)


def on_emulator(function: Callable[[Any], Any], num_ranks: int) -> list[Any]:
    """Run ranks as threads whose kernels run on the emulator."""
    from emulated.runtime import run_emulated

    return run_emulated(function, num_ranks)


CPU = Place("cpu", "cpu", 4, functools.partial(on_threads, "cpu"), is_cpu=True)
GPUS = Place("cuda", "cuda", 4, functools.partial(on_threads, "cuda"))
EMULATED = Place("emulated", "cpu", 2, on_emulator)

PLACES = [
    pytest.param(CPU, id=CPU.name),
    pytest.param(GPUS, id=GPUS.name, marks=pytest.mark.gpu),
    pytest.param(EMULATED, id=EMULATED.name, marks=pytest.mark.emulated_backend),
]
PLACES_KEY = pytest.StashKey[list[Any]]()
"""Other places than ``PLACES``, in the stash of a process of several."""
