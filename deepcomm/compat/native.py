# SPDX-License-Identifier: Apache-2.0
"""The deepcomm buffers behind one facade, constructed on first use.

The facades' constructors know neither experts nor, in V1, hidden size and tokens. The first
operation of a shape brings them all: it constructs a buffer, which is collective, as that operation
is itself. Ranks agree on the largest number of tokens and grow together later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deepcomm.buffer import Buffer
from deepcomm.config import DEFAULT_TIMEOUT_S
from deepcomm.errors import CommError
from deepcomm.group import as_group

if TYPE_CHECKING:
    import torch

__all__ = ["NativeBuffers", "Shape"]

NUM_SLOTS = 4
NUM_GENERATIONS = 3
MIN_GENERATIONS = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides which buffer serves an operation.

    Attributes:
        num_tokens: For low latency the exact ``max_tokens_per_rank``, by which shapes go; for high
            throughput a limit that holds for the whole group, or None to agree on one and grow.
    """

    device: torch.device
    num_experts: int
    hidden: int
    num_tokens: int | None
    low_latency: bool = False


class NativeBuffers:
    """Buffers of one group by shape."""

    def __init__(self, group: Any, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Remember the group; nothing is constructed."""
        self._group = group
        self._timeout_s = timeout_s
        self._buffers: dict[Shape, Buffer] = {}
        self._masked: dict[int, bool] = {}
        self._closed = False
        self.num_sms: int | None = None

    def get(self, shape: Shape, num_topk: int, num_tokens: int) -> Buffer:
        """Return the buffer of a shape; the first call of all ranks constructs it.

        Args:
            shape: Alike on all ranks.
            num_topk: K of the operation, alike on all ranks; a larger one than before constructs
                anew, and handles keep the buffer that they are from.
            num_tokens: T of this rank.

        Raises:
            CommError: The facade is destroyed.
        """
        buffer = self._buffers.get(shape)
        if buffer is not None and num_topk <= buffer.config.num_topk:
            return buffer
        if self._closed:
            raise CommError("Buffer: expected an operation before destroy(), got one after it")
        buffer = self._open(shape, num_topk, num_tokens)
        self._buffers[shape] = buffer
        return buffer

    def _open(self, shape: Shape, num_topk: int, num_tokens: int) -> Buffer:
        max_tokens = shape.num_tokens
        if max_tokens is None:
            max_tokens = max(1, *as_group(self._group).all_gather(num_tokens))
        buffer = Buffer(
            self._group,
            num_experts=shape.num_experts,
            num_topk=num_topk,
            hidden=shape.hidden,
            max_tokens_per_rank=max_tokens,
            device=shape.device,
            growable=shape.num_tokens is None,
            num_sms=self.num_sms,
            # The ring of one regime is of no use to the other.
            num_generations=MIN_GENERATIONS if shape.low_latency else NUM_GENERATIONS,
            num_low_latency_slots=NUM_SLOTS if shape.low_latency else 0,
            timeout_s=self._timeout_s,
        )
        for rank, masked in self._masked.items() if shape.low_latency else ():
            buffer.set_rank_mask(rank, masked)
        return buffer

    def set_mask(self, rank: int, masked: bool) -> None:
        """Mask a peer in the low-latency buffers, those to come included."""
        for buffer in self._low_latency_buffers():
            buffer.set_rank_mask(rank, masked)
        self._masked[rank] = masked

    def masked_ranks(self) -> set[int]:
        """Return the peers that are masked, by the user or because they were late."""
        masked = {rank for rank, is_masked in self._masked.items() if is_masked}
        for buffer in self._low_latency_buffers():
            masked.update(buffer.rank_mask().nonzero().flatten().tolist())
        return masked

    def _low_latency_buffers(self) -> list[Buffer]:
        return [buffer for shape, buffer in self._buffers.items() if shape.low_latency]

    def close(self) -> None:
        """Close all buffers; idempotent."""
        self._closed = True
        while self._buffers:
            self._buffers.popitem()[1].close()
