# SPDX-License-Identifier: Apache-2.0
"""Which generation of the ring a dispatch lands in: never one that a view or a graph counts on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepcomm.backends.cuda.runtime import SymmetricMemory

__all__ = ["Generations", "Landing"]


@dataclass(frozen=True, slots=True)
class Landing:
    """A generation chosen for one dispatch.

    Attributes:
        generation: Its index.
        may_lease: Whether a view may keep it: one generation always stays free.
    """

    generation: int
    may_lease: bool


class Generations:
    """The ring of one buffer at one size.

    A captured dispatch lands in the same generation at every replay, whenever that is and whatever
    became of its results. So the generation is reserved, for as long as the memory lives: nothing
    says when a graph is destroyed. Graphs share it, unless they still hold views of it: their
    replays are in the order of the stream. Dispatches outside of graphs may pass through it, but
    leave no view there.
    """

    def __init__(self, memory: SymmetricMemory, count: int) -> None:
        """Have ``count`` of them in ``memory``, which knows the leases."""
        self._memory = memory
        self._count = count
        self._reserved: set[int] = set()

    @property
    def num_reserved(self) -> int:
        """How many are reserved for graphs."""
        return len(self._reserved)

    def choose(self, is_capturing: bool) -> Landing:
        """Return where the next dispatch lands; reserve it for graphs if one is captured."""
        free = [g for g in range(self._count) if self._memory.num_leases(g) == 0]
        wanted = [g for g in free if (g in self._reserved) == is_capturing]
        landing = (wanted or free)[0]
        if is_capturing:
            self._reserved.add(landing)
            return Landing(landing, len(free) > 1)
        return Landing(landing, len(free) > 1 and landing not in self._reserved)
