# SPDX-License-Identifier: Apache-2.0
"""What carries a rail whose ranks do not reach each other's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
    """

    peer: int
    sends: tuple[Span, ...]
    receives: tuple[Span, ...]


class Network(Protocol):
    """A transport between the GPUs of a group."""

    def move(self, messages: Sequence[Message]) -> None:
        """Launch all sends and receives as one group, on the current stream.

        Spans between two ranks match in order; empty ones are skipped on both sides.

        Raises:
            CommError: The network has failed or was ended.
            CommTimeout: It did not take the group in time.
        """

    def abort(self) -> None:
        """End moves under way; from any thread; idempotent. Nothing but close works afterwards."""

    def watch(self, has_failed: Callable[[], bool]) -> None:
        """Abort by itself once ``has_failed()``: nobody else may notice that a move never ends."""

    def close(self) -> None:
        """Release everything; idempotent."""

    def describe(self) -> str:
        """Say what it is, for ``explain()``."""
