# SPDX-License-Identifier: Apache-2.0
"""Streams of one emulated rank that wait for each other: kernels of ``streams.cuh``."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emulated.host_api import KernelArguments
from emulated.network import CComm

from deepcomm.jit import Kernel

if TYPE_CHECKING:
    from emulated.runtime import EmulatedMemory, EmulatedRuntime

SIGNAL = Kernel("stream_signal", "streams.cuh")
WAIT = Kernel("stream_wait", "streams.cuh")


class CStream(KernelArguments):
    """kernels::StreamParams."""

    _fields_ = (
        ("comm", CComm),
        ("word", ctypes.c_void_p),
        ("value", ctypes.c_uint64),
        ("broken", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Mark:
    """A point of a stream."""

    stream: int
    word: EmulatedMemory
    value: int


class StreamOrder:
    """Marks on the streams of one rank.

    A stream that has been stopped is not waited for without end, as it would be elsewhere. So what
    is behind such a wait must not go on: ``broken`` says so to a network. Who waits for that one is
    more patient.
    """

    def __init__(self, runtime: EmulatedRuntime) -> None:
        self._runtime = runtime
        self._marks: dict[int, Mark] = {}
        self._broken: EmulatedMemory | None = None

    @property
    def broken(self) -> EmulatedMemory:
        """A word: not 0 once a wait has not ended."""
        if self._broken is None:
            self._broken = self._runtime.memory(8)
        return self._broken

    def mark(self, stream: int) -> Mark:
        """Mark the end of the work so far of a stream, which is the current one."""
        last = self._marks.get(stream) or Mark(stream, self._runtime.memory(8), 0)
        mark = self._marks[stream] = Mark(stream, last.word, last.value + 1)
        self._launch(SIGNAL, mark, 0)
        return mark

    def reach(self, mark: Mark) -> None:
        """Let a mark be reached that is on no stream, once the work so far has been done."""
        self._launch(SIGNAL, mark, 0)

    def wait(self, mark: Mark, patience_s: float) -> None:
        """Make the current stream wait for a mark."""
        self._launch(WAIT, mark, patience_s)

    def _launch(self, kernel: Kernel, mark: Mark, patience_s: float) -> None:
        params = CStream()
        params.comm.timeout_ns = int(patience_s * 1e9)
        params.word, params.value = mark.word.address, mark.value
        params.broken = self.broken.address
        runtime = self._runtime
        runtime.launch_block(runtime.load_once(kernel), 1, 32, params)
