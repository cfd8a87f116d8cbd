# SPDX-License-Identifier: Apache-2.0
"""V2 handles, events, limits: as clients use them, against the reference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from collective.case import Case
from compat.places import Place
from compat.play import (
    EXPERT,
    TOKEN,
    Rank,
    open_elastic,
    play,
    row_counts,
    v2_dispatch,
)

from deepcomm import InvalidArgument
from deepcomm.compat import ElasticBuffer, EPHandle, EventHandle, EventOverlap


def cases(place: Place, **fields: Any) -> Case:
    shape = {"num_ranks": place.num_ranks, "hidden": 256, "num_topk": 3}
    return Case(device=place.device, **{**shape, **fields})


# ---- Cached --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [TOKEN, EXPERT], ids=["compact", "expanded"])
def test_dispatch_cached_infers_what_is_not_given(place: Place, layout: Any) -> None:
    """Torchtitan repeats a compact handle, DeepSpeed an expanded one, here without arguments."""
    alignment = 8 if layout is EXPERT else 1

    def run(rank: Rank) -> None:
        buffer = open_elastic(rank)
        expand = layout is EXPERT
        rows, _, weights, handle, _ = v2_dispatch(
            buffer, rank, do_expand=expand, expert_alignment=alignment
        )
        again, ids, nothing, same, _ = buffer.dispatch(rank.x, handle=handle)
        assert torch.equal(again, rows)
        assert nothing is None
        assert (ids is None) == expand
        assert same is handle
        given = buffer.dispatch(
            rank.x,
            handle=handle,
            topk_weights=rank.weights,
            num_sms=handle.num_sms,
            do_expand=handle.do_expand,
            do_cpu_sync=False,
        )
        rank.assert_received(given[0], topk_weights=given[2])
        assert torch.equal(given[2], weights)

    play(place, cases(place, layout=layout, alignment=alignment), run, expert_alignment=alignment)


def test_dispatch_cached_refuses_another_layout(place: Place) -> None:
    def run(rank: Rank) -> None:
        buffer = open_elastic(rank)
        handle = v2_dispatch(buffer, rank, do_expand=True)[3]
        with pytest.raises(NotImplementedError, match=r"do_expand=False.*leave do_expand out"):
            buffer.dispatch(rank.x, handle=handle, do_expand=False)
        with pytest.raises(NotImplementedError, match="expert_alignment=128"):
            buffer.dispatch(rank.x, handle=handle, expert_alignment=128)
        with pytest.raises(InvalidArgument, match="topk_idx: expected None beside handle"):
            buffer.dispatch(rank.x, rank.ids, handle=handle)

    play(place, cases(place), run)


# ---- Handles -------------------------------------------------------------------------------------

FIELDS = (
    "do_expand",
    "num_experts",
    "expert_alignment",
    "num_max_tokens_per_rank",
    "num_sms",
    "topk_idx",
    "num_recv_tokens",
    "num_expanded_tokens",
    "num_recv_tokens_per_expert_list",
    "psum_num_recv_tokens_per_scaleup_rank",
    "psum_num_recv_tokens_per_expert",
    "num_unaligned_recv_tokens_per_expert",
    "recv_src_metadata",
    "dst_buffer_slot_idx",
    "token_metadata_at_forward",
    "channel_linked_list",
)


def test_handle_fields_can_be_read_assigned_and_reassembled(place: Place) -> None:
    """A checkpoint takes a handle apart and puts its tensors, or clones, back."""

    def run(rank: Rank) -> None:
        buffer = open_elastic(rank)
        rows, _, _, handle, _ = v2_dispatch(buffer, rank)
        fields = {name: getattr(handle, name) for name in FIELDS}
        for name in ("token_metadata_at_forward", "channel_linked_list"):
            assert fields[name] is None
        assembled = EPHandle(**fields)
        assert torch.equal(buffer.dispatch(rank.x, handle=assembled)[0], rows)
        other = copy.copy(handle)
        for name, value in fields.items():
            setattr(other, name, value.clone() if isinstance(value, torch.Tensor) else value)
            assert getattr(other, name) is not None or value is None
        other.num_unaligned_recv_tokens_per_expert = None
        assert torch.equal(buffer.dispatch(rank.x, handle=other)[0], rows)
        assert torch.equal(buffer.combine(rows, other)[0], buffer.combine(rows, handle)[0])

    play(place, cases(place), run)


# ---- The rest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("expand", [False, True], ids=["compact", "expanded"])
def test_operations_async(place: Place, expand: bool) -> None:
    def run(rank: Rank) -> None:
        buffer = open_elastic(rank)
        rows, *_, handle, event = v2_dispatch(
            buffer,
            rank,
            do_expand=expand,
            previous_event=buffer.capture(),
            previous_event_before_epilogue=EventOverlap(EventHandle()),
            async_with_compute_stream=True,
            allocate_on_comm_stream=True,
        )
        assert event.event is not None
        event.current_stream_wait()
        rank.assert_received(rows)
        expected = rank.expected[rank.rank]
        assert handle.num_recv_tokens_per_expert_list == row_counts(expected, 1)
        total, _, event = buffer.combine(
            rows, handle=handle, topk_weights=None, async_with_compute_stream=True
        )
        event.current_stream_wait()
        assert torch.isfinite(total).all()

    play(place, cases(place, layout=EXPERT if expand else TOKEN), run)


def test_statistics_and_biases(place: Place) -> None:
    def run(rank: Rank) -> None:
        buffer = open_elastic(rank)
        stats = torch.ones(2, dtype=torch.int32, device=place.device)
        for is_async in (False, True):
            _, _, _, handle, event = v2_dispatch(
                buffer,
                rank,
                cumulative_local_expert_recv_stats=stats,
                async_with_compute_stream=is_async,
            )
            assert (event.event is not None) == is_async
        counts = rank.expected[rank.rank].num_tokens_per_expert
        assert torch.equal(stats.cpu(), 1 + 2 * counts)
        bias = torch.full_like(rank.x, 0.5)
        ys = rank.outputs()
        biases = [torch.full_like(x, 0.5) for x in rank.inputs.xs]
        total = buffer.combine(rank.own(ys), handle, bias=bias)[0]
        assert torch.equal(total.cpu(), rank.combined(ys, biases=biases).x)

    play(place, cases(place), run)


def test_buffer_without_limits_grows(place: Place) -> None:
    def run(rank: Rank) -> None:
        buffer = ElasticBuffer(rank.group)
        assert buffer.num_bytes == 0
        for tokens in (2, 50):
            ids = torch.arange(tokens, device=place.device).remainder(8)[:, None]
            x = torch.ones(tokens, 256, dtype=torch.bfloat16, device=place.device)
            rows, *_, handle, _ = buffer.dispatch(x, ids, num_experts=8)
            assert torch.equal(buffer.combine(rows, handle)[0], x)
        with pytest.raises(InvalidArgument, match="num_max_tokens_per_rank: expected it"):
            buffer.dispatch(x, ids, num_experts=8, do_cpu_sync=False)
        with pytest.raises(InvalidArgument, match="num_experts: expected it"):
            buffer.dispatch(x, ids)
        with pytest.raises(InvalidArgument, match="topk_idx: expected it"):
            buffer.dispatch(x, num_experts=8)

    play(place, cases(place), run)


def test_more_tokens_than_the_limit_are_refused(place: Place) -> None:
    def run(rank: Rank) -> None:
        buffer = ElasticBuffer(rank.group, num_max_tokens_per_rank=4)
        ids = torch.zeros(5, 1, dtype=torch.int64, device=place.device)
        x = torch.ones(5, 256, dtype=torch.bfloat16, device=place.device)
        with pytest.raises(InvalidArgument, match="max_tokens_per_rank"):
            buffer.dispatch(x, ids, num_experts=4)
        received = buffer.dispatch(x[:4], ids[:4], num_experts=4)
        assert len(received[0]) == (4 * place.num_ranks if rank.rank == 0 else 0)

    play(place, cases(place), run)


def test_idle_rank_needs_no_dummy_token(place: Place) -> None:
    """Rank 1 of every case here brings no tokens at all, also where counts are synchronised."""

    def run(rank: Rank) -> None:
        assert (rank.rank == 1) == (len(rank.x) == 0)
        for expand in (False, True):
            rows, *_, handle, _ = v2_dispatch(open_elastic(rank), rank, do_expand=expand)
            assert len(rows) == sum(handle.num_recv_tokens_per_expert_list) or not expand

    play(place, cases(place), run)


def test_many_buffers_in_one_process(place: Place) -> None:
    """DeepEP's 28th buffer fails; memory is the limit here."""

    def run(group: Any) -> int:
        kept = []
        for _ in range(30):
            buffer = ElasticBuffer(group, num_max_tokens_per_rank=4)
            ids = torch.zeros(1, 1, dtype=torch.int64, device=place.device)
            x = torch.ones(1, 256, dtype=torch.bfloat16, device=place.device)
            kept.append((buffer, buffer.dispatch(x, ids, num_experts=2)))
        return len(kept)

    assert place.run(run, 2) == [30, 30]
