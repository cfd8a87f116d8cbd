# SPDX-License-Identifier: Apache-2.0
"""What the streams of a client ask of the operations of one facade on GPUs."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from deepcomm.compat.events import EventOverlap, StreamEvent, event_of, overlap_of, uses_cuda

if TYPE_CHECKING:
    from typing import TypeAlias

    import deepcomm
    from deepcomm.compat.events import EventHandle
    from deepcomm.types import Event

    Point: TypeAlias = EventOverlap | EventHandle | None

__all__ = ["Streams", "ownership"]

_lenders: weakref.WeakSet[deepcomm.Buffer] = weakref.WeakSet()
"""Buffers whose dispatches have given views of symmetric memory to clients."""


def ownership(
    buffer: deepcomm.Buffer, is_async: bool, previous_event: Event | None
) -> dict[str, Any]:
    """Return the options of a dispatch that keep what clients do with the rows of others safe.

    Clients take rows for ordinary tensors: read on any stream that was told to wait, recorded on
    it, and gone when the last reference is. Views are safe for the current stream alone, so a
    client that works with events gets tensors of their own. One that mixes both ways has its
    current stream awaited: what it queued there may read a view that it no longer holds.
    """
    if buffer.device.type != "cuda":
        return {"previous_event": previous_event}
    if not is_async:
        _lenders.add(buffer)
        return {"previous_event": previous_event}
    if buffer in _lenders and previous_event is not None:
        previous_event.current_stream_wait()
        previous_event = None
    return {"previous_event": previous_event, "owned": True}


class Joined:
    """Several events as one."""

    def __init__(self, *events: Event) -> None:
        """Join them."""
        self._events = events

    def synchronize(self) -> None:
        """Block the host until all are complete."""
        for event in self._events:
            event.synchronize()

    def current_stream_wait(self) -> None:
        """Make the current stream wait for all."""
        for event in self._events:
            event.current_stream_wait()

    def query(self) -> bool:
        """Return whether all are complete."""
        return all(event.query() for event in self._events)


class Streams:
    """The stream that a client may ask for, and its order with the operations.

    Operations run on the current stream or, asynchronous ones, on a stream of their buffer: there
    is none on which all of them run. The one handed out is ordered with all of them instead: each
    waits for what the client has put there, and what comes later there waits for it.
    """

    def __init__(self) -> None:
        """Have none until one is asked for."""
        self._stream: torch.cuda.Stream | None = None
        self._last: Event | None = None

    def get(self) -> Any:
        """Return the stream; where CUDA is not in use, the current one of the CPU."""
        if not uses_cuda():
            return torch.cpu.current_stream()
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._follow(self._last)
            self._follow(None)
        return self._stream

    def before(self, previous_event: Point, epilogue_event: Point = None) -> Event | None:
        """Return what an operation is to wait for, besides the current stream if that is None."""
        event, others = event_of(previous_event), [event_of(epilogue_event)]
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                others.append(StreamEvent())
        also = [other for other in others if other is not None]
        if event is not None:
            return Joined(event, *also) if also else event
        for other in also:
            other.current_stream_wait()
        return None

    def after(self, event: Event | None) -> EventOverlap:
        """Wrap the event of an operation, None where it was not asynchronous."""
        self._last = event
        if self._stream is not None:
            self._follow(event)
        return overlap_of(event)

    def _follow(self, event: Event | None) -> None:
        """Let the stream wait for an operation."""
        assert self._stream is not None
        if event is None:
            self._stream.wait_stream(torch.cuda.current_stream())
            return
        with torch.cuda.stream(self._stream):
            event.current_stream_wait()
