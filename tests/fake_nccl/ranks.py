# SPDX-License-Identifier: Apache-2.0
"""What ranks do with the NCCL without a GPU, as threads or processes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fake_cuda.library import FakeCuda
from fake_nccl.library import FakeNccl

from deepcomm._C import cuda, nccl
from deepcomm.backends.cuda.nccl import NcclNetwork, NcclOptions
from deepcomm.backends.cuda.network import Message, Network, Span
from deepcomm.group import as_group
from deepcomm.testing import LocalCluster, LocalGroup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from deepcomm.group import Group

STREAM = 0xABC
TIMEOUT_S = 30.0
SOON_S = 5.0
"""Less than any deadline that a test does not want to pass."""
LINGER_S = 0.05
"""How much longer the system may list a thread than others wait for it."""
POISON = b"\xee"


def run(num_ranks: int, use: Callable[[LocalGroup], Any]) -> list[Any]:
    """Call ``use`` on ranks that are threads."""
    return LocalCluster(num_ranks, device="cpu").run(use)


@dataclass
class Memory:
    """Bytes of this process, kept while a network may use them."""

    buffers: list[Any] = field(default_factory=list)

    def holding(self, content: bytes) -> Span:
        self.buffers.append(ctypes.create_string_buffer(content, len(content)))
        return Span(ctypes.addressof(self.buffers[-1]), len(content))

    def of(self, num_bytes: int) -> Span:
        return self.holding(POISON * num_bytes)


@functools.cache
def driver() -> cuda.Driver:
    """Return the driver without a GPU, the same at each call."""
    return FakeCuda().driver()


def device(index: int) -> cuda.Device:
    """Return one of its GPUs."""
    return cuda.Device(driver(), index)


SCRATCH = ctypes.create_string_buffer(128)


def pair(peer: int) -> list[Message]:
    """Return some bytes each way, of which nobody asks what they are."""
    begin = ctypes.addressof(SCRATCH)
    return [Message(peer, (Span(begin, 64),), (Span(begin + 64, 64),))]


def content(span: Span) -> bytes:
    return ctypes.string_at(span.address, span.num_bytes)


@contextlib.contextmanager
def network(
    group: Group,
    fake: FakeNccl,
    *,
    timeout_s: float = TIMEOUT_S,
    find: Callable[[], nccl.Library] | None = None,
    **options: Any,
) -> Iterator[NcclNetwork]:
    """Meet the other ranks; leave them at the end."""
    wanted = NcclOptions(timeout_s, **options)
    made = NcclNetwork(group, device(group.rank % 2), lambda: STREAM, wanted, find or fake.library)
    try:
        yield made
    finally:
        made.close()


def text(src: int, dst: int, index: int, num_bytes: int) -> bytes:
    """Return bytes that say where they come from and where they belong."""
    label = f"{src}>{dst}#{index};".encode()
    return (label * (num_bytes // len(label) + 1))[:num_bytes]


def exchange(group: Group, made: Network, sizes: Sequence[int]) -> None:
    """Send spans of these sizes from each rank to each, itself too; check what has come."""
    memory = Memory()
    messages = [
        Message(
            peer,
            tuple(memory.holding(text(group.rank, peer, i, n)) for i, n in enumerate(sizes)),
            tuple(memory.of(n) for n in sizes),
        )
        for peer in range(group.size)
    ]
    made.move(messages)
    for message in messages:
        for index, span in enumerate(message.receives):
            expected = text(message.peer, group.rank, index, span.num_bytes)
            assert content(span) == expected, (message.peer, index)


def held() -> tuple[int, int]:
    """Return what would leak: descriptors and threads."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))  # noqa: PTH208


@contextlib.contextmanager
def leaving_nothing(fake: FakeNccl) -> Iterator[None]:
    """See that no communicator, descriptor or thread is left of what is done inside."""
    time.sleep(LINGER_S)
    before = held()
    yield
    assert fake.num_live() == 0
    time.sleep(LINGER_S)
    assert held() == before


def exchange_in_process(group: Any, sizes: Sequence[int]) -> int:
    """Do it as a process of its own, twice; leave nothing behind."""
    fake, control = FakeNccl(), as_group(group)
    with network(control, fake):  # whatever is opened once a process
        pass
    with leaving_nothing(fake):
        for _ in range(2):
            with network(control, fake) as made:
                exchange(control, made, sizes)
                exchange(control, made, sizes)
    return os.getpid()


def in_thread(call: Callable[[], None]) -> tuple[threading.Thread, list[BaseException]]:
    """Start a call; return its thread and what it will have raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001  # the test looks at it
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised
