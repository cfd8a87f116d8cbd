# SPDX-License-Identifier: Apache-2.0
"""Streams and events of GPUs, played by objects that know what work they come after."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from deepcomm.compat import EPHandle, EventHandle, EventOverlap
from deepcomm.compat.streams import Streams, ownership

if TYPE_CHECKING:
    from collections.abc import Iterator


class Stream:
    """A stream; ``seen`` is the work that its next work comes after."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def wait_event(self, event: Event) -> None:
        self.seen |= event.seen

    def wait_stream(self, other: Stream) -> None:
        self.seen |= other.seen


class Event:
    """A point of the current stream."""

    def record(self) -> None:
        self.seen = set(torch.cuda.current_stream().seen)

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return bool(self.seen)


@pytest.fixture(autouse=True)
def current(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """Let CUDA be in use; return its current stream."""
    streams = [Stream()]

    @contextlib.contextmanager
    def using(stream: Stream) -> Iterator[None]:
        streams.append(stream)
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", using)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return streams[0]


def work(stream: Stream, name: str) -> None:
    stream.seen.add(name)


def operate(streams: Streams, name: str, previous_event: Any, *, on: Stream | None) -> set[str]:
    """Do what a native operation does, on the current stream or ``on`` its own."""
    event = streams.before(previous_event)
    stream = on or torch.cuda.current_stream()
    if event is None:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        if event is not None:
            event.current_stream_wait()
        seen = set(stream.seen)
        work(stream, name)
        done = None if on is None else EventHandle()
    wrapped = streams.after(done)
    assert (wrapped.event is None) == (on is None)
    return seen


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("has_event", [False, True], ids=["plain", "previous"])
def test_communication_stream_is_ordered_with_operations(
    current: Stream, is_async: bool, has_event: bool
) -> None:
    streams, own = Streams(), Stream() if is_async else None
    operate(streams, "first", None, on=own)
    stream = streams.get()
    assert streams.get() is stream
    assert "first" in stream.seen
    work(current, "input")
    event = EventOverlap(EventHandle()) if has_event else None
    work(current, "later")
    work(stream, "mine")
    seen = operate(streams, "second", event, on=own)
    assert {"input", "mine"} <= seen
    assert ("later" in seen) != (is_async and has_event)
    assert "second" in stream.seen


def test_previous_event_is_passed_on_as_it_is() -> None:
    streams = Streams()
    event = EventHandle()
    assert streams.before(EventOverlap(event)) is event
    assert streams.before(event) is event
    assert streams.before(None) is None


def test_both_events_of_an_operation_are_waited_for(current: Stream) -> None:
    points = []
    for name in ("first", "second"):
        stream = Stream()
        work(stream, name)
        with torch.cuda.stream(stream):
            points.append(EventOverlap(EventHandle()))
    joined = Streams().before(*points)
    assert joined is not None
    joined.synchronize()
    assert joined.query()
    own = Stream()
    with torch.cuda.stream(own):
        joined.current_stream_wait()
    assert own.seen == {"first", "second"}
    assert current.seen == set()
    assert Streams().before(None, points[1]) is None
    assert current.seen == {"second"}  # which an operation without an event comes after


class NativeBuffer:
    """As much of one as is asked about."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


def test_rows_of_synchronous_clients_are_views() -> None:
    event = EventHandle()
    for device in ("cpu", "cuda"):
        assert ownership(NativeBuffer(device), False, event) == {"previous_event": event}
    assert ownership(NativeBuffer("cpu"), True, event) == {"previous_event": event}


def test_rows_of_asynchronous_clients_are_their_own(current: Stream) -> None:
    buffer, event = NativeBuffer("cuda"), EventHandle()
    assert ownership(buffer, True, event) == {"previous_event": event, "owned": True}
    assert ownership(buffer, True, None) == {"previous_event": None, "owned": True}
    ownership(buffer, False, None)  # gives a view, which the current stream may be reading
    with torch.cuda.stream(Stream()):
        work(torch.cuda.current_stream(), "input")
        event = EventHandle()
    assert ownership(buffer, True, event) == {"previous_event": None, "owned": True}
    assert "input" in current.seen


@pytest.mark.parametrize(
    "field", ["psum_num_recv_tokens_per_expert", "num_recv_tokens_per_expert_list"]
)
def test_counts_are_not_computed_before_the_dispatch(current: Stream, field: str) -> None:
    own = Stream()
    work(own, "dispatch")
    with torch.cuda.stream(own):
        event = EventHandle()
    counts = torch.tensor([3, 5], dtype=torch.int32)
    output = SimpleNamespace(num_tokens_per_expert=counts, num_recv_tokens=None, event=event)
    routing: Any = SimpleNamespace(handle=SimpleNamespace(capacity=None))
    handle = EPHandle.of(routing, output, {"expert_alignment": 4})  # type: ignore[arg-type]
    assert list(getattr(handle, field)) == ([3, 9] if field.startswith("psum") else [4, 8])
    assert "dispatch" in current.seen
