# SPDX-License-Identifier: Apache-2.0
"""A machine without a GPU for ``GinNetwork``: its agent is a thread that moves bytes of the host.

The agents of a world do what ``kernels/gin/agent.cuh`` does, from the same words in memory: tell
peers where their bytes go, wait, put, count. ``csrc/layout/gin.hpp`` draws those words.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import struct
import threading
import time
from collections import defaultdict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from deepcomm._C import cuda, kernels
from deepcomm.backends.cuda.failure import COMPLETE, ErrorRecord

if TYPE_CHECKING:
    from collections.abc import Callable

SPAN_WORDS = 3
MOVE = 6
ROLES = {"meet": 5, "receive": 2}
CHECK = 1


def synthetic_constants() -> dict[str, bytes]:
    """Return what the compiled agent would say of the structs of ``fake_nccl/nccl.cpp``."""
    requirements = [32, 0xBEEF, 0, 4, 0, 0, 0, 0]
    properties = [32, 0, 0, 0, 0, 0, 0, 0]

    def copies(first: list[int], fields: dict[int, int]) -> bytes:
        changed = [[fields[at] if i == at else v for i, v in enumerate(first)] for at in fields]
        return b"".join(struct.pack("<8i", *words) for words in (first, *changed))

    return {
        "gin_numbers": struct.pack("<6I", 23007, 24, 32, 32, 1, 2),
        "gin_requirements": copies(requirements, {3: 1, 4: 1, 5: 1, 6: 1}),
        "gin_properties": copies(properties, {2: 1, 6: 1, 4: 2, 3: 1, 5: 2}),
    }


class HostBytes:
    """Memory of any kind."""

    def __init__(self, num_bytes: int, content: bytes = b"") -> None:
        self._buffer = ctypes.create_string_buffer(content, num_bytes)
        self.address = self.device_address = ctypes.addressof(self._buffer)
        self.num_bytes = num_bytes
        self.bases = (self.address,)
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class World:
    """What the agents of all ranks share: tables on their way, and signals."""

    def __init__(self) -> None:
        self.tables: dict[tuple[int, int], queue.Queue[Any]] = defaultdict(queue.Queue)
        self.data: dict[tuple[int, int], int] = defaultdict(int)
        self.lock = threading.Lock()


class AgentRuntime:
    """One rank's machine."""

    def __init__(self, world: World, rank: int) -> None:
        self.world = world
        self.rank = rank
        self.launched: list[threading.Thread] = []
        self.moves: list[Move] = []
        self.blocks: list[HostBytes] = []

    def load(self, kernel: str, spec: dict[str, int]) -> Any:
        assert (kernel, spec) == ("gin_move", {})
        return SimpleNamespace(name=kernel, max_threads=256, constants=synthetic_constants())

    def raw_stream(self) -> int:
        return 0xABC

    def symmetric_memory(self, group: Any, num_bytes: int, timeout_s: float) -> HostBytes:
        del timeout_s
        group.all_gather(None)
        self.blocks.append(HostBytes(num_bytes))
        return self.blocks[-1]

    def host_memory(self, num_bytes: int) -> HostBytes:
        return HostBytes(num_bytes)

    def upload(self, content: bytes) -> HostBytes:
        return HostBytes(len(content), content)

    def flush(self) -> None:
        """Agents run by themselves."""

    def wait_word(self, address: int, expected: int, record: int, timeout_s: float) -> bool:
        return cuda.wait_word(address, expected, record, timeout_s)

    def launch(self, function: Any, grid: int, params: Any) -> None:
        """Run the agent after those before it."""
        assert (function.name, grid) == ("gin_move", 1)
        before = self.launched[-1] if self.launched else None
        self.moves.append(Move(params))
        arguments = (self.moves[-1], before)
        thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        self.launched.append(thread)
        thread.start()

    def _run(self, move: Move, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        with contextlib.suppress(Left):
            move.run(self)
        ctypes.c_uint64.from_address(move.done).value = move.number

    def join(self) -> None:
        for thread in self.launched:
            thread.join(30)
            assert not thread.is_alive()


class Left(Exception):
    """The agent leaves: something has failed."""


class Move:
    """What one launch is told, read when it is launched."""

    def __init__(self, params: Any) -> None:
        self.number, self.done, self.windows = params.number, params.done, params.windows
        self.record_address, self.timeout_s = params.record, params.timeout_ns / 1e9
        self.peers = [
            Peer(params.peers + index * kernels.GIN_PEER_BYTES) for index in range(params.num_peers)
        ]

    def run(self, runtime: AgentRuntime) -> None:
        world, rank = runtime.world, runtime.rank
        if ErrorRecord.from_address(self.record_address).state != 0:
            raise Left
        for peer in self.peers:
            if peer.receives:
                places = [self.address(span) for span in peer.receives]
                sizes = [size for _, _, size in peer.receives]
                world.tables[rank, peer.rank].put((peer.num_data, places, sizes))
        for peer in self.peers:
            if peer.sends:
                self.send(world, rank, peer)
        for peer in self.peers:
            if peer.receives:
                key = (peer.rank, rank)
                self.wait(rank, "receive", peer, lambda key=key: world.data[key], peer.num_data)

    def address(self, span: tuple[int, int, int]) -> int:
        window, offset, _ = span
        place = self.windows + 8 * window
        handle = ctypes.c_uint64.from_address(place).value
        address = ctypes.c_uint64.from_address(handle).value  # of the library's WindowObject
        return int(address + offset)

    def send(self, world: World, rank: int, peer: Peer) -> None:
        tables = world.tables[peer.rank, rank]
        self.wait(rank, "meet", peer, lambda: int(not tables.empty()), 1)
        number, places, sizes = tables.get_nowait()
        mine = [size for _, _, size in peer.sends]
        self.check(rank, peer, -2, peer.num_ready, number)
        self.check(rank, peer, -3, len(mine), len(sizes))
        for index, (size, theirs) in enumerate(zip(mine, sizes, strict=True)):
            self.check(rank, peer, index, size, theirs)
        for span, place in zip(peer.sends, places, strict=True):
            ctypes.memmove(place, self.address(span), span[2])
        with world.lock:
            world.data[rank, peer.rank] += 1

    def wait(
        self, rank: int, role: str, peer: Peer, read: Callable[[], int], expected: int
    ) -> None:
        end = time.monotonic() + self.timeout_s
        record = ErrorRecord.from_address(self.record_address)
        while (observed := read()) < expected:
            if record.state != 0:
                raise Left
            if time.monotonic() > end:
                self.fail((rank, peer.rank, ROLES[role], 0, -1), expected, observed)
            time.sleep(0.0002)

    def check(self, rank: int, peer: Peer, slot: int, expected: int, observed: int) -> None:
        if expected != observed:
            self.fail((rank, peer.rank, 1, CHECK, slot), expected, observed)

    def fail(self, where: tuple[int, int, int, int, int], expected: int, observed: int) -> None:
        record = ErrorRecord.from_address(self.record_address)
        record.rank, record.peer, record.role, record.kind, record.slot = where
        record.operation = MOVE
        record.expected, record.observed = expected, observed
        record.state = COMPLETE
        raise Left


class Peer:
    """layout::GinPeer."""

    def __init__(self, address: int) -> None:
        content = ctypes.string_at(address, kernels.GIN_PEER_BYTES)
        head = struct.unpack_from("<ihhQQQ", content)
        self.rank, num_sends, num_receives, self.num_puts, self.num_ready, self.num_data = head
        words = struct.unpack_from(f"<{2 * SPAN_WORDS * kernels.GIN_MOST_SPANS}q", content, 32)
        spans = [words[i : i + SPAN_WORDS] for i in range(0, len(words), SPAN_WORDS)]
        self.sends = spans[:num_sends]
        self.receives = spans[kernels.GIN_MOST_SPANS :][:num_receives]
