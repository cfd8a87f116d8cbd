# SPDX-License-Identifier: Apache-2.0
"""Memory that the rail agent may use: windows, numbered alike on all ranks."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepcomm._C import kernels
from deepcomm.errors import InternalError, InvalidArgument

if TYPE_CHECKING:
    from deepcomm._C import nccl
    from deepcomm.backends.cuda.network import Span
    from deepcomm.backends.cuda.runtime import Runtime

__all__ = ["Windows"]


@dataclass(frozen=True, slots=True)
class _Window:
    address: int
    num_bytes: int
    place: int
    handle: int


class Windows:
    """Those of one rank. The first one stays; the others may come and go.

    Attributes:
        device_address: The list of their handles, as the agent sees it.
    """

    def __init__(self, runtime: Runtime, device: nccl.DeviceCommunicator, timeout_s: float) -> None:
        """Have none yet."""
        self._device = device
        self._timeout_s = timeout_s
        self._memory = runtime.host_memory(8 * kernels.GIN_MOST_WINDOWS)
        self._handles = (ctypes.c_uint64 * kernels.GIN_MOST_WINDOWS).from_address(
            self._memory.address
        )
        self.device_address = self._memory.device_address
        self._windows: list[_Window] = []
        self._num_added = 0

    def add(self, address: int, num_bytes: int) -> None:
        """Register memory; collective.

        Raises:
            NcclError: NCCL cannot reach it.
        """
        number = self._num_added
        self._num_added += 1  # also where this fails: on other ranks it may not
        place = 0 if number == 0 else 1 + (number - 1) % (kernels.GIN_MOST_WINDOWS - 1)
        if self._handles[place] != 0:
            raise InternalError(
                f"windows: expected at most {kernels.GIN_MOST_WINDOWS} that are younger than the "
                "oldest, got one more"
            )
        handle = self._device.register_window(address, num_bytes, self._timeout_s)
        self._handles[place] = handle
        self._windows.append(_Window(address, num_bytes, place, handle))

    def remove(self, address: int) -> None:
        """Give memory back to itself; no rank may be using it."""
        window = next((w for w in self._windows if w.address == address), None)
        if window is None:
            return
        self._windows.remove(window)
        self._handles[window.place] = 0
        self._device.deregister_window(window.handle, self._timeout_s)

    def place(self, span: Span) -> tuple[int, int, int]:
        """Return the place of a span's window, its offset there and its size.

        Raises:
            InvalidArgument: It is in no window.
        """
        for window in reversed(self._windows):
            offset = span.address - window.address
            if offset >= 0 and offset + span.num_bytes <= window.num_bytes:
                return window.place, offset, span.num_bytes
        raise InvalidArgument(
            f"span: expected registered memory, got {span.num_bytes} bytes at {span.address:#x}"
        )
