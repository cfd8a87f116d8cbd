# SPDX-License-Identifier: Apache-2.0
"""Streams as V1 clients use them; on CPUs everything is complete at once."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from collective.case import Case
from compat.play import Rank, play, v1_dispatch

from deepcomm.compat import Buffer

if TYPE_CHECKING:
    from collections.abc import Callable

    from compat.places import Place

SLEEP_CYCLES = 20_000_000


def case_of(place: Place) -> Case:
    return Case(num_ranks=place.num_ranks, hidden=256, num_topk=3, device=place.device)


def be_busy(place: Place) -> None:
    """Keep the current stream from what comes next, for some milliseconds."""
    if place.device == "cuda":
        torch.cuda._sleep(SLEEP_CYCLES)


def dispatcher(buffer: Buffer, rank: Rank) -> Callable[..., Any]:
    """Return a dispatch of rows and options that waits for no copy of the routing."""
    ids = rank.ids
    counts = buffer.get_dispatch_layout(ids, rank.case.num_experts)[2]

    def dispatch(x: torch.Tensor, **options: Any) -> Any:
        return buffer.dispatch(x, topk_idx=ids, num_tokens_per_expert=counts, **options)

    return dispatch


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("has_event", [False, True], ids=["plain", "previous"])
def test_communication_stream_is_ordered_with_operations(
    place: Place, is_async: bool, has_event: bool
) -> None:
    def run(rank: Rank) -> None:
        buffer, x = Buffer(rank.group), rank.x
        dispatch, late = dispatcher(buffer, rank), torch.zeros_like(x)
        stream = buffer.get_comm_stream()
        on_stream = contextlib.nullcontext()
        if place.device == "cuda":
            stream.wait_stream(torch.cuda.current_stream())
            on_stream = torch.cuda.stream(stream)
        event = Buffer.capture() if has_event else None
        with on_stream:
            be_busy(place)
            late.copy_(x)
        rows, *_, event = dispatch(late, async_finish=is_async, previous_event=event)
        with on_stream:
            seen = rows.clone()
        if place.device == "cuda":
            torch.cuda.synchronize()
        rank.assert_received(seen)
        assert (event.event is None) != is_async

    play(place, case_of(place), run)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_rows_that_are_gone_may_still_be_read(place: Place, is_async: bool) -> None:
    """An event of before the reader does not let the next dispatch overtake it."""

    def run(rank: Rank) -> None:
        buffer, zeros = Buffer(rank.group), torch.zeros_like(rank.x)
        dispatch = dispatcher(buffer, rank)
        before = Buffer.capture()
        received = v1_dispatch(buffer, rank, async_finish=is_async)
        if is_async:
            received[5].current_stream_wait()
        be_busy(place)
        kept = received[0].clone()
        del received
        again = dispatch(zeros, async_finish=True, previous_event=before)
        again[5].current_stream_wait()
        assert not again[0].any()
        rank.assert_received(kept)

    play(place, case_of(place), run)
