# SPDX-License-Identifier: Apache-2.0
"""Ranks with ``GinNetwork`` over the library and the agents without a GPU."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fake_nccl.agent import AgentRuntime
from fake_nccl.library import FakeNccl
from fake_nccl.ranks import POISON, device, text

from deepcomm.backends.cuda.nccl import NcclOptions
from deepcomm.backends.cuda.network import Message, Network, Span
from deepcomm.backends.cuda.network_choice import open_network

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fake_nccl.agent import World

    from deepcomm.testing import LocalGroup

TIMEOUT_S = 20.0
BLOCK_BYTES = 1 << 15
PROXY = 2


def with_gin() -> FakeNccl:
    """Return an NCCL that has GIN along rails."""
    made = FakeNccl()
    made.wish("version", 23007)
    made.wish("railed gin type", PROXY)
    return made


@dataclass
class End:
    """One rank's network, machine and memory."""

    group: LocalGroup
    network: Network
    runtime: AgentRuntime
    memory: Any

    def span(self, begin: int, num_bytes: int) -> Span:
        return Span(self.memory.address + begin, num_bytes)

    def write(self, begin: int, content: bytes) -> Span:
        ctypes.memmove(self.memory.address + begin, content, len(content))
        return self.span(begin, len(content))

    def read(self, span: Span) -> bytes:
        return ctypes.string_at(span.address, span.num_bytes)

    def move(self, messages: Sequence[Message]) -> None:
        """Move, and wait for the agent, which no stream does here."""
        self.network.move(messages)
        self.runtime.join()


@contextlib.contextmanager
def end_of(
    group: LocalGroup,
    fake: FakeNccl,
    world: World,
    *,
    timeout_s: float = TIMEOUT_S,
    kinds: Sequence[str] = ("gin", "nccl"),
) -> Iterator[End]:
    """Open a network with a block of memory; leave at the end."""
    runtime: Any = AgentRuntime(world, group.rank)
    options = NcclOptions(timeout_s)
    network = open_network(group, runtime, device(group.rank % 2), options, kinds, fake.library)
    memory = runtime.host_memory(BLOCK_BYTES)
    network.register(memory.address, BLOCK_BYTES)
    try:
        yield End(group, network, runtime, memory)
    finally:
        network.close()
        assert all(block.is_closed for block in runtime.blocks)


def exchange(end: End, sizes: Sequence[int]) -> None:
    """Send spans of these sizes from each rank to each other; check what has come."""
    rank, num_ranks = end.group.rank, end.group.size
    begin, messages = 0, []
    for peer in (peer for peer in range(num_ranks) if peer != rank):
        sends, receives = [], []
        for index, size in enumerate(sizes):
            sends.append(end.write(begin, text(rank, peer, index, size)))
            receives.append(end.write(begin + size, POISON * size))
            begin += 2 * size
        messages.append(Message(peer, tuple(sends), tuple(receives)))
    end.move(messages)
    for message in messages:
        for index, span in enumerate(message.receives):
            assert end.read(span) == text(message.peer, rank, index, span.num_bytes)
