# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a network do that has no buffer yet: ``test_gin``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.dlpack import from_dlpack

from deepcomm.backends.cuda.device import CudaRuntime
from deepcomm.backends.cuda.network import Message, Network, Span
from deepcomm.errors import CommError, CommTimeout
from deepcomm.group import alone_of, as_group

if TYPE_CHECKING:
    from collections.abc import Sequence

TIMEOUT_S = 20.0
MISMATCH_TIMEOUT_S = 8.0  # time enough to open the network
SIZES = (0, 16, 80, 1 << 20, (1 << 24) + 48)
NUM_ROUNDS = 50


@dataclass
class Ends:
    """This rank's network, and memory to send from and to receive in."""

    network: Network
    sent: torch.Tensor
    received: torch.Tensor
    peer: int

    def move(self, sends: Sequence[int], receives: Sequence[int]) -> None:
        """Send and receive spans of so many bytes, one after the other."""
        both = [
            tuple(
                Span(memory.data_ptr() + sum(sizes[:index]), size)
                for index, size in enumerate(sizes)
            )
            for memory, sizes in ((self.sent, sends), (self.received, receives))
        ]
        self.network.move([Message(self.peer, *both)])


def open_ends(group: Any, kinds: Sequence[str], timeout_s: float) -> Ends:
    """Open a network of two ranks with memory; collective."""
    control = as_group(group)
    runtime = CudaRuntime()
    network = runtime.network(control, timeout_s, None, kinds)
    num_bytes = 2 * sum(SIZES)
    memory = runtime.symmetric_memory(alone_of(control), num_bytes, timeout_s)
    network.register(memory.bases[0], num_bytes)
    whole = from_dlpack(memory.lease(0, 0, num_bytes))
    return Ends(network, whole[: sum(SIZES)], whole[sum(SIZES) :], 1 - control.rank)


def coded(src: int, round_idx: int) -> torch.Tensor:
    numbers = torch.arange(sum(SIZES), dtype=torch.int64, device="cuda")
    return ((numbers * 31 + 7 * src + 13 * round_idx) % 251).to(torch.uint8)


def move_bytes(group: Any, kinds: Sequence[str]) -> str:
    """Move bytes both ways and one way, back to back; return the kind of network."""
    rank = as_group(group).rank
    ends = open_ends(group, kinds, TIMEOUT_S)
    for round_idx in range(NUM_ROUNDS):
        ends.sent.copy_(coded(rank, round_idx))
        ends.received.fill_(0xEE)
        ends.move(SIZES, SIZES)
        assert torch.equal(ends.received, coded(1 - rank, round_idx)), round_idx
        # To rank 1 only; then nothing at all.
        ends.received.fill_(0xEE)
        ends.move(SIZES if rank == 0 else (), () if rank == 0 else SIZES)
        ends.move((), ())
        expected = torch.full_like(ends.received, 0xEE) if rank == 0 else coded(0, round_idx)
        assert torch.equal(ends.received, expected), round_idx
    torch.cuda.current_stream().synchronize()
    as_group(group).all_gather(None)
    ends.network.close()
    return ends.network.name


def move_different_sizes(group: Any) -> None:
    """Expect fewer bytes than are sent: nothing is written, and both ranks hear of it."""
    control = as_group(group)
    ends = open_ends(group, ("gin",), MISMATCH_TIMEOUT_S)
    ends.received.fill_(0xEE)
    torch.cuda.current_stream().synchronize()
    if control.rank == 0:
        ends.move((64,), ())
    else:
        ends.move((), (48,))
    torch.cuda.current_stream().synchronize()
    reason = "rank 1 expects other bytes than it is sent: size of span 0: expected 64, got 48"
    raised = CommError if control.rank == 0 else CommTimeout
    with pytest.raises(raised, match=reason if control.rank == 0 else "rank 0 did not send"):
        ends.move((16,), (16,))
    assert bool((ends.received == 0xEE).all())
    control.all_gather(None)
    ends.network.close()


def abort_a_move(group: Any) -> None:
    """Abort what waits for a peer; the context is well, and so is the peer."""
    control = as_group(group)
    ends = open_ends(group, ("gin",), TIMEOUT_S)
    ends.move((64,), (64,))
    stream = torch.cuda.current_stream()
    stream.synchronize()
    control.all_gather(None)
    if control.rank == 0:
        ends.move((), (64,))
        time.sleep(0.2)
        assert not stream.query()
        start = time.monotonic()
        ends.network.abort()
        stream.synchronize()
        assert time.monotonic() - start < TIMEOUT_S / 4
        with pytest.raises(CommError, match="aborted"):
            ends.move((64,), (64,))
    control.all_gather(None)
    ends.network.abort()
    ends.network.close()
    assert torch.ones(3, device="cuda").sum().item() == 3, "the context is well"
