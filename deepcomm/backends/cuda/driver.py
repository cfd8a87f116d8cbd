# SPDX-License-Identifier: Apache-2.0
"""CUDA's driver, opened once a process, and streams that are never destroyed."""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Final

import torch

from deepcomm._C import cuda

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HIGH_PRIORITY", "StreamPool", "default_driver", "stream_pool", "wrap_stream"]

HIGH_PRIORITY: Final = -5
"""The driver takes the highest that the device has."""


@functools.cache
def default_driver() -> cuda.Driver:
    """Return the driver of this machine.

    Raises:
        CudaError: There is none, or it is too old.
    """
    return cuda.Driver()


class StreamPool:
    """Streams to borrow and to give back, by device and priority.

    torch's allocator may record an event on a stream long after its user is done with it, so none
    may be destroyed. torch's own pool hands out each of its streams several times, which would let
    one rank's kernels queue behind those of another that wait for them.
    """

    def __init__(self, make: Callable[[int, int], int]) -> None:
        """Keep what ``make(device, priority)`` returns."""
        self._make = make
        # Not a plain lock: streams come back when the collector finds that nobody uses them.
        self._lock = threading.RLock()
        self._free: defaultdict[tuple[int, int], list[int]] = defaultdict(list)

    def take(self, device: int, priority: int) -> int:
        """Return a stream that nobody else has."""
        with self._lock:
            free = self._free[device, priority]
            if free:
                return free.pop()
        return self._make(device, priority)

    def give_back(self, device: int, priority: int, stream: int) -> None:
        """Let others have a stream."""
        with self._lock:
            self._free[device, priority].append(stream)


def _make_stream(device: int, priority: int) -> int:
    return cuda.Device(default_driver(), device).make_stream(priority)


@functools.cache
def stream_pool() -> StreamPool:
    """Return the pool of this process."""
    return StreamPool(_make_stream)


def wrap_stream(stream: int, device: int) -> torch.cuda.Stream:
    """Return a stream as torch knows it."""
    return torch.cuda.ExternalStream(stream, device=device)  # type: ignore[no-untyped-call]
