# SPDX-License-Identifier: Apache-2.0
"""``EventHandle`` and ``EventOverlap``: CUDA events where CUDA is in use, else complete at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from deepcomm.errors import InvalidArgument
from deepcomm.event import CompletedEvent

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from deepcomm.types import Event

__all__ = [
    "EventHandle",
    "EventOverlap",
    "StreamEvent",
    "event_of",
    "overlap_of",
    "uses_cuda",
    "wait_for",
]


class StreamEvent:
    """The work that was on the current CUDA stream when this was made."""

    def __init__(self) -> None:
        """Record an event on the current stream."""
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def synchronize(self) -> None:
        """Block the host until the work is complete."""
        self._event.synchronize()

    def current_stream_wait(self) -> None:
        """Make the current stream wait for the work."""
        torch.cuda.current_stream().wait_event(self._event)

    def query(self) -> bool:
        """Return whether the work is complete."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]


class EventHandle:
    """A point in the work of a stream; constructed, it captures the current one."""

    def __init__(self) -> None:
        """Capture the current stream; a process that has not used CUDA has nothing to wait for."""
        self._event: Event = StreamEvent() if uses_cuda() else CompletedEvent()

    @classmethod
    def of(cls, event: Event) -> EventHandle:
        """Return the handle of a deepcomm event."""
        handle = cls.__new__(cls)
        handle._event = event
        return handle

    def current_stream_wait(self) -> None:
        """Make the current stream wait."""
        self._event.current_stream_wait()

    def synchronize(self) -> None:
        """Block the host."""
        self._event.synchronize()

    def query(self) -> bool:
        """Return whether the point is passed."""
        return self._event.query()


class EventOverlap:
    """An event, or none for an operation that was not asynchronous.

    As a context manager it waits on leaving: what runs inside overlaps the operation.

    Attributes:
        event: May be read and assigned.
        extra_tensors: Kept alive as long as this object.
    """

    def __init__(
        self,
        event: EventHandle | None = None,
        extra_tensors: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        """Wrap an event, and keep tensors alive with it."""
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Make the current stream wait for the event; drop it then if asked to.

        Raises:
            InvalidArgument: There is no event: the operation was not asynchronous.
        """
        if self.event is None:
            raise InvalidArgument("event: expected one of an asynchronous operation, got None")
        self.event.current_stream_wait()
        if release_handle:
            self.event = None

    def __enter__(self) -> EventOverlap:
        """Return the event itself."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait, if there is something to wait for."""
        if self.event is not None:
            self.event.current_stream_wait()


def uses_cuda() -> bool:
    """Return whether this process has used CUDA; asking does not initialise it."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def event_of(event: EventOverlap | EventHandle | None) -> Event | None:
    """Return what a deepcomm operation takes as ``previous_event``."""
    return event.event if isinstance(event, EventOverlap) else event


def overlap_of(event: Event | None) -> EventOverlap:
    """Wrap the event of a deepcomm operation, None where it was not asynchronous."""
    return EventOverlap(None if event is None else EventHandle.of(event))


def wait_for(event: EventOverlap | EventHandle | None) -> None:
    """Make the current stream wait for an event, if there is one."""
    point = event_of(event)
    if point is not None:
        point.current_stream_wait()
