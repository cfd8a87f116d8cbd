# SPDX-License-Identifier: Apache-2.0
"""``GinNetwork`` on the emulator: its host code and its agent, over ``gin/nccl_device.h``."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from deepcomm.backends.cuda.gin import Endpoint, GinNetwork

if TYPE_CHECKING:
    from collections.abc import Callable

    from emulated.runtime import EmulatedMemory, EmulatedRuntime

    from deepcomm.errors import Error
    from deepcomm.group import Group

MAX_RANKS = 8


class CWindow(ctypes.Structure):
    """EmulatedWindow."""

    _fields_ = (("num_bytes", ctypes.c_size_t), ("bases", ctypes.c_void_p * MAX_RANKS))


class CDevComm(ctypes.Structure):
    """ncclDevComm."""

    _fields_ = (
        ("rank", ctypes.c_int),
        ("num_ranks", ctypes.c_int),
        ("num_signals", ctypes.c_uint32),
        ("num_counters", ctypes.c_uint32),
        ("signals", ctypes.c_void_p * MAX_RANKS),
        ("counters", ctypes.c_void_p),
        ("awaited", ctypes.c_void_p),
    )


class EmulatedDeviceCommunicator:
    """``deepcomm._C.nccl.DeviceCommunicator``, as far as a network uses it."""

    def __init__(self, runtime: EmulatedRuntime, group: Group) -> None:
        self._runtime, self._group = runtime, group
        self._signals = runtime.memory(2 * 8 * group.size)
        self._counters = runtime.memory(8 * group.size)
        self.windows: dict[int, EmulatedMemory] = {}
        self._reached: list[Any] = []
        self.is_closed = False

    def dev_comm(self) -> bytes:
        size = self._group.size
        comm = CDevComm(self._group.rank, size, 2 * size, size)
        comm.signals[:size] = self._group.all_gather(self._signals.address)
        comm.counters = self._counters.address
        return bytes(comm)

    def register_window(self, address: int, num_bytes: int, timeout_s: float) -> int:
        del timeout_s
        assert not self.is_closed
        window = CWindow(num_bytes)
        meeting: list[Any] = self._group.all_gather((address, num_bytes))
        assert {theirs for _, theirs in meeting} == {num_bytes}
        window.bases[: self._group.size] = [base for base, _ in meeting]
        self._reached.append(self._runtime.reserved_at(address))
        memory = self._runtime.upload(bytes(window))
        self.windows[memory.address] = memory
        return memory.address

    def deregister_window(self, handle: int, timeout_s: float) -> None:
        del timeout_s
        del self.windows[handle]

    def close(self, timeout_s: float) -> None:
        del timeout_s
        self.is_closed = True

    def abort(self) -> None:
        """A late put to what is no window any more is refused: here nobody else gets the memory."""
        self._runtime.keep(self._reached, [self._signals, self._counters])


class EmulatedCommunicator:
    """``deepcomm._C.nccl.Communicator``, likewise."""

    def __init__(self, device: EmulatedDeviceCommunicator) -> None:
        self._device = device

    def abort(self) -> None:
        self._device.abort()

    def close(self, timeout_s: float) -> str:
        del timeout_s
        return ""


class EmulatedGinNetwork(GinNetwork):
    """One rank's end of it."""

    def __init__(
        self,
        runtime: EmulatedRuntime,
        group: Group,
        timeout_s: float,
        traffic_class: int | None,
    ) -> None:
        device = EmulatedDeviceCommunicator(runtime, group)
        endpoint: Any = Endpoint(
            EmulatedCommunicator(device),
            device,
            device.dev_comm(),
            f"the emulated network, traffic class {traffic_class}",
        )
        agent: Any = runtime.load("gin_move", {})
        super().__init__(group, runtime, endpoint, agent, timeout_s)  # type: ignore[arg-type]
        # A stopped rank closes nothing, and the memory of its cluster is the next one's.
        self._finalizer.detach()

    def watch(self, has_failed: Callable[[], bool], condemn: Callable[[Error], None]) -> None:
        """Moves have deadlines of their own, and real time means nothing here."""
