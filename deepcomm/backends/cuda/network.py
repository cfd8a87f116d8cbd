# SPDX-License-Identifier: Apache-2.0
"""What carries bytes to ranks that loads and stores do not reach: launched by the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deepcomm.errors import Error

__all__ = ["Message", "Network", "Span"]


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of device memory."""

    address: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Message:
    """What goes to a peer and what comes from it, in one move.

    Attributes:
        peer: Rank in the network's group.
        sends: In the order of the peer's ``receives``.
        receives: In the order of the peer's ``sends``.
    """

    peer: int
    sends: tuple[Span, ...]
    receives: tuple[Span, ...]


class Network(Protocol):
    """The ranks of a group, which call ``register`` and ``move`` alike."""

    @property
    def name(self) -> str:
        """The ``rail`` of a buffer that this is."""

    def register(self, address: int, num_bytes: int) -> None:
        """Let moves use memory, as much on every rank; collective.

        Raises:
            NcclError: The network cannot reach it.
            CommTimeout: The ranks did not meet in time.
            CommError: A peer failed; names it.
        """

    def deregister(self, address: int) -> None:
        """Wait for moves under way; use the memory no more. Nothing to do after ``close``."""

    def move(self, messages: Sequence[Message]) -> None:
        """Launch all sends and receives on the current stream, as one group.

        Spans between two ranks match in order; empty spans are skipped on both sides. They lie in
        registered memory.

        Raises:
            InvalidArgument: A message is wrong; nothing has been launched.
            CommTimeout: The launch did not come about in time; only ``close`` works afterwards.
            CommError: A peer is lost, or the network was ended; likewise.
            NcclError: NCCL failed; likewise.
        """

    def abort(self) -> None:
        """End moves under way; from any thread; idempotent. Nothing but ``close`` works then."""

    def fail_with(self, address: int) -> None:
        """Set a word on the device, too, where a move does not come about.

        Peers may then still write to this rank, and the network may still read what it sends: what
        is queued behind the move must do neither.
        """

    def watch(self, has_failed: Callable[[], bool], condemn: Callable[[Error], None]) -> None:
        """Abort once ``has_failed()``: nobody else may notice that a move does not end.

        Args:
            has_failed: Whether the rank has failed elsewhere.
            condemn: Hears of what a move has run into on the device.
        """

    def close(self) -> None:
        """Wait for this rank's moves and leave; idempotent."""

    def describe(self) -> str:
        """Return what it is, for ``explain()``."""
