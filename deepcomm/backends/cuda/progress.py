# SPDX-License-Identifier: Apache-2.0
"""Whether a network still carries what it was given, as a host sees it that looks now and then."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import TYPE_CHECKING, Final, Protocol

from deepcomm.errors import CommTimeout, Error

if TYPE_CHECKING:
    from collections.abc import Callable

    from deepcomm.backends.cuda.runtime import HostMemory

__all__ = ["PATIENCE", "PROGRESS_BYTES", "Progress", "RailProgress", "watch"]

PATIENCE: Final = 2
"""How many ``timeout_s`` a network may take: its peers may be late by one."""
WATCH_S: Final = 0.2


class Failure(Protocol):
    """What is known of a rank's failure."""

    @property
    def failed(self) -> bool:
        """Whether the buffer can only be closed."""

    def condemn(self, error: Error) -> None:
        """Let later calls raise: the buffer can only be closed."""


class RailProgress(ctypes.Structure):
    """kernels::RailProgress."""

    _fields_ = (("num_gates", ctypes.c_uint32), ("num_deliveries", ctypes.c_uint32))


PROGRESS_BYTES = ctypes.sizeof(RailProgress)


class Progress:
    """Steps of a rail; kernels may all have ended while the network waits for a peer for ever."""

    def __init__(
        self, memory: HostMemory, limit_s: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        """Read what kernels write to ``memory``.

        Args:
            memory: PROGRESS_BYTES.
            limit_s: How long the network may take for a step that has passed its gate.
            now: The clock.
        """
        self._memory = memory
        self._words = RailProgress.from_address(memory.address)
        self._limit_s = limit_s
        self._now = now
        self._seen = (0, 0)
        self._since = now()

    def is_stuck(self) -> bool:
        """Return whether a step has been on its way for longer than the limit."""
        seen = (int(self._words.num_gates), int(self._words.num_deliveries))
        if seen != self._seen:
            self._seen, self._since = seen, self._now()
        num_gates, num_deliveries = seen
        return num_gates != num_deliveries and self._now() - self._since > self._limit_s

    def watcher(self, failure: Failure, where: str) -> Callable[[], bool]:
        """Return what says whether a network is to end: the rank has failed, or it is stuck."""

        def has_failed() -> bool:
            if not failure.failed and self.is_stuck():
                limit = f"{self._limit_s:g} s"
                failure.condemn(CommTimeout(f"{where}: the network did not end in {limit}"))
            return failure.failed

        return has_failed


def watch(
    name: str, has_failed: Callable[[], bool], abort: Callable[[], None], ended: threading.Event
) -> None:
    """Call ``abort`` once ``has_failed()``, unless ``ended`` was set before.

    From a thread: the program may be waiting for the device. What it is given must not keep the
    network alive, whose end sets ``ended``.
    """

    def look() -> None:
        while not ended.wait(WATCH_S):
            if has_failed():
                abort()
                return

    threading.Thread(target=look, name=f"deepcomm-{name}-watch", daemon=True).start()
