# SPDX-License-Identifier: Apache-2.0
"""``deepcomm.backends.cuda.network.Network`` on the emulator: ``network.cuh`` between its ranks."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emulated.host_api import KernelArguments

from deepcomm.jit import Kernel

if TYPE_CHECKING:
    from emulated.runtime import EmulatedMemory, EmulatedRuntime

    from deepcomm.backends.cuda.network import Message, Span
    from deepcomm.errors import Error
    from deepcomm.group import Group

MAX_SPANS = 5
MAX_PEERS = 8
MOST_BYTES = 1 << 18
"""Of a message between two ranks."""

PATIENCE_S = 60.0
"""Of virtual time. NCCL has any amount of it."""

KERNEL = Kernel("network_move", "network.cuh")


class CComm(ctypes.Structure):
    """kernels::CommParams."""

    _fields_ = (
        ("rank", ctypes.c_int32),
        ("num_ranks", ctypes.c_int32),
        ("names", ctypes.c_int32 * 2),
        ("timeout_ns", ctypes.c_uint64),
        ("unused", ctypes.c_void_p * 3),
    )


class CSpan(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("num_bytes", ctypes.c_uint64))


class CPeer(ctypes.Structure):
    _fields_ = (
        ("rank", ctypes.c_int32),
        ("number", ctypes.c_uint32),
        ("num_sends", ctypes.c_int32),
        ("num_receives", ctypes.c_int32),
        ("sends", CSpan * MAX_SPANS),
        ("receives", CSpan * MAX_SPANS),
        ("staging", ctypes.c_void_p),
        ("inbox_there", ctypes.c_void_p),
        ("inbox", ctypes.c_void_p),
        ("sent_there", ctypes.c_void_p),
        ("sent", ctypes.c_void_p),
        ("read_there", ctypes.c_void_p),
        ("read", ctypes.c_void_p),
    )


class CParams(KernelArguments):
    _fields_ = (
        ("comm", CComm),
        ("num_peers", ctypes.c_int32),
        ("peers", CPeer * MAX_PEERS),
        ("broken", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Lane:
    """What a rank has for one peer; its words are alone in theirs, as other ranks write to them."""

    staging: EmulatedMemory
    inbox: EmulatedMemory
    sent: EmulatedMemory
    read: EmulatedMemory


class EmulatedNetwork:
    """One rank's end of it."""

    def __init__(
        self,
        runtime: EmulatedRuntime,
        group: Group,
        timeout_s: float,
        traffic_class: int | None,
    ) -> None:
        self._runtime = runtime
        self._traffic_class = traffic_class
        self._timeout_ns = int(max(timeout_s, PATIENCE_S) * 1e9)
        self._rank = group.rank
        self._numbers = [0] * group.size
        lanes = [
            Lane(*(runtime.memory(size) for size in (MOST_BYTES, MOST_BYTES, 8, 8)))
            for _ in range(group.size)
        ]
        self._lanes: list[list[Lane]] = group.all_gather(lanes)
        self._kernel = runtime.load_once(KERNEL)
        self.registered: dict[int, int] = {}
        self.num_moves = 0
        self.is_closed = False

    def move(self, messages: Sequence[Message]) -> None:
        assert not self.is_closed
        for span in (span for m in messages for span in (*m.sends, *m.receives)):
            assert any(
                base <= span.address and span.address + span.num_bytes <= base + num_bytes
                for base, num_bytes in self.registered.items()
            ), "memory that is not registered"
        params = CParams()
        params.comm.rank = self._rank
        params.comm.timeout_ns = self._timeout_ns
        params.num_peers = len(messages)
        params.broken = self._runtime.broken_address
        for entry, message in zip(params.peers, messages, strict=False):
            self._fill(entry, message)
        self._runtime.launch_block(self._kernel, 1, 32 * len(messages), params)
        self.num_moves += 1

    def _fill(self, entry: CPeer, message: Message) -> None:
        peer = message.peer
        self._numbers[peer] += 1
        here, there = self._lanes[self._rank][peer], self._lanes[peer][self._rank]
        entry.rank, entry.number = peer, self._numbers[peer]
        entry.num_sends = fill_spans(entry.sends, message.sends)
        entry.num_receives = fill_spans(entry.receives, message.receives)
        entry.staging, entry.inbox_there = here.staging.address, there.inbox.address
        entry.inbox = here.inbox.address
        entry.sent_there, entry.sent = there.sent.address, here.sent.address
        entry.read_there, entry.read = there.read.address, here.read.address

    @property
    def name(self) -> str:
        return "nccl"

    def register(self, address: int, num_bytes: int) -> None:
        self.registered[address] = num_bytes

    def deregister(self, address: int) -> None:
        del self.registered[address]

    def fail_with(self, address: int) -> None:
        """Receivers alone write to their memory."""

    def watch(self, has_failed: Callable[[], bool], condemn: Callable[[Error], None]) -> None:
        """Moves have deadlines of their own."""

    def abort(self) -> None:
        """Likewise."""

    def close(self) -> None:
        self.is_closed = True

    def describe(self) -> str:
        return f"the emulated network, traffic class {self._traffic_class}"


def fill_spans(entries: Any, spans: Sequence[Span]) -> int:
    used = [span for span in spans if span.num_bytes]
    assert sum(span.num_bytes for span in used) <= MOST_BYTES
    for entry, span in zip(entries, used, strict=False):
        assert span.num_bytes % 4 == 0
        entry.begin, entry.num_bytes = span.address, span.num_bytes
    return len(used)
