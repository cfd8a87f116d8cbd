# SPDX-License-Identifier: Apache-2.0
"""V2, as clients call it, against the reference, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from collective.case import Case
from compat.places import Place
from compat.play import (
    EXPERT,
    TOKEN,
    Rank,
    ends_of_groups,
    open_elastic,
    play,
    row_counts,
    v2_dispatch,
)

from deepcomm.compat import ElasticBuffer, EventHandle, EventOverlap, topk_idx_t
from deepcomm.group import as_group
from deepcomm.testing import LocalCluster


def cases(place: Place, **fields: Any) -> Case:
    shape = {"num_ranks": place.num_ranks, "hidden": 256, "num_topk": 3}
    return Case(device=place.device, **{**shape, **fields})


# ---- Construction --------------------------------------------------------------------------------


def test_constructor_of_torchtitan() -> None:
    def run(group: Any) -> None:
        needed = ElasticBuffer.get_buffer_size_hint(
            group, 64, 256, num_topk=4, use_fp8_dispatch=False
        )
        buffer = ElasticBuffer(
            group,
            num_bytes=needed,
            num_max_tokens_per_rank=64,
            hidden=256,
            num_topk=4,
            use_fp8_dispatch=False,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            explicitly_destroy=True,
        )
        assert buffer.group == group
        assert buffer.num_bytes == needed > 0
        assert buffer.num_max_tokens_per_rank == 64
        more = ElasticBuffer.get_buffer_size_hint(group, 128, 256, num_topk=4)
        assert more > needed
        assert buffer.get_theoretical_num_sms(8, 4) > 0
        assert buffer.get_theoretical_num_sms(num_experts=8, num_topk=4) > 0

    LocalCluster(2, device="cpu").run(run)


def test_constructor_keywords_of_the_others() -> None:
    def run(group: Any) -> None:
        shape = {"num_max_tokens_per_rank": 64, "hidden": 256, "num_topk": 4}
        deepspeed = ElasticBuffer(
            group,
            **shape,
            use_fp8_dispatch=False,
            num_allocated_qps=16,
            allow_hybrid_mode=True,
            explicitly_destroy=True,
        )
        assert deepspeed.num_allocated_qps == 16
        assert deepspeed.num_bytes == ElasticBuffer.get_buffer_size_hint(group, 64, 256, 4)
        sglang = ElasticBuffer(
            group,
            **shape,
            sl_idx=0,
            prefer_overlap_with_compute=False,
            allow_multiple_reduction=False,
        )
        assert sglang.num_bytes > 0
        automodel = ElasticBuffer(group, **shape, num_gpu_timeout_secs=1200)
        automodel.destroy()
        assert ElasticBuffer.get_buffer_size_hint(group, 64, 256) > deepspeed.num_bytes
        with pytest.raises(NotImplementedError, match=r"num_cpu_bytes.*tensors of your own"):
            ElasticBuffer(group, num_cpu_bytes=1, **shape)

    LocalCluster(2, device="cpu").run(run)


def test_timeouts_reach_the_buffer(place: Place) -> None:
    def run(rank: Rank) -> None:
        buffer = open_elastic(rank, num_gpu_timeout_secs=1200)
        handle = v2_dispatch(buffer, rank)[3]
        assert handle._routing.buffer.config.timeout_s == 1200

    play(place, cases(place), run)


def test_small_calls(place: Place) -> None:
    def run(rank: Rank) -> None:
        buffer = open_elastic(rank)
        assert isinstance(ElasticBuffer.capture(), EventHandle)
        assert isinstance(buffer.capture(), EventHandle)
        assert buffer.get_comm_stream() is not None
        buffer.barrier()
        buffer.barrier(use_comm_stream=False, with_cpu_sync=True)
        buffer.destroy()
        buffer.destroy()

    play(place, cases(place), run)


# ---- Compact -------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [None, 128])
def test_dispatch_compact(place: Place, alignment: int | None) -> None:
    def run(rank: Rank) -> None:
        buffer, expected = open_elastic(rank), rank.expected[rank.rank]
        rows, ids, weights, handle, event = v2_dispatch(
            buffer, rank, num_sms=24, expert_alignment=alignment
        )
        rank.assert_received(rows, topk_idx=ids, topk_weights=weights)
        assert (handle.do_expand, handle.num_sms, handle.num_experts) == (
            *(False, 24),
            rank.case.num_experts,
        )
        assert handle.num_recv_tokens_per_expert_list == row_counts(expected, alignment or 1)
        assert handle.num_recv_tokens == int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        assert handle.num_recv_tokens == len(rows)
        assert torch.equal(handle.topk_idx, rank.ids)
        ends = ends_of_groups(None, expected, alignment or 1)
        assert handle.psum_num_recv_tokens_per_expert.tolist() == ends
        assert isinstance(event, EventOverlap)
        assert event.event is None
        ys = rank.outputs()
        total, carried, event = buffer.combine(
            rank.own(ys), handle=handle, topk_weights=weights, num_sms=24, num_qps=9
        )
        assert torch.equal(total.cpu(), rank.combined(ys).x)
        assert torch.equal(carried, rank.weights.where(rank.ids >= 0, 0))
        assert event.event is None

    play(place, cases(place), run)


def test_dispatch_compact_without_cpu_sync(place: Place) -> None:
    """VLLM decodes so: rows for the worst case, of which the last count says how many are there."""
    bucket = 20
    capacity = place.num_ranks * bucket

    def run(rank: Rank) -> None:
        buffer = open_elastic(rank, num_max_tokens_per_rank=32)
        rows, ids, weights, handle, _ = v2_dispatch(
            buffer, rank, do_cpu_sync=False, num_max_tokens_per_rank=bucket
        )
        assert rows.shape[0] == capacity
        rank.assert_received(rows, topk_idx=ids, topk_weights=weights)
        assert handle.num_recv_tokens_per_expert_list == []
        count = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        assert (ids[count:] == -1).all()
        ys = rank.outputs()
        y = rank.own(ys)
        expected = rank.combined(ys).x
        assert torch.equal(buffer.combine(y, handle)[0].cpu(), expected)
        short = buffer.combine(y[:count].contiguous(), handle, topk_weights=weights[:count])
        assert torch.equal(short[0].cpu(), expected)

    play(place, cases(place), run, capacities=[capacity] * place.num_ranks)


def test_combine_shows_rows_left_out(place: Place) -> None:
    def run(group: Any) -> list[bool]:
        buffer = ElasticBuffer(group, num_max_tokens_per_rank=4)
        ids = torch.full((3, 1), 1 - as_group(group).rank, dtype=torch.int64, device=place.device)
        x = torch.ones(3, 256, dtype=torch.bfloat16, device=place.device)
        rows, *_, handle, _ = buffer.dispatch(x, ids, num_experts=2, do_cpu_sync=False)
        return buffer.combine(rows[:2], handle)[0].isnan().all(1).tolist()

    assert place.run(run, 2) == [[False, False, True]] * 2


# ---- Expanded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [1, 128])
def test_dispatch_expanded(place: Place, alignment: int) -> None:
    def run(rank: Rank) -> None:
        buffer, expected = open_elastic(rank), rank.expected[rank.rank]
        rows, ids, weights, handle, _ = buffer.dispatch(
            rank.x,
            topk_idx=rank.ids.to(topk_idx_t),
            topk_weights=rank.weights,
            num_experts=rank.case.num_experts,
            do_expand=True,
            expert_alignment=alignment,
            num_sms=12,
        )
        rank.assert_received(rows, topk_weights=weights)
        assert ids is None
        assert weights.shape == (len(rows),)
        ends = ends_of_groups(handle, expected, alignment)
        assert handle.psum_num_recv_tokens_per_expert.tolist() == ends
        assert handle.do_expand is True
        assert handle.num_recv_tokens_per_expert_list == row_counts(expected, alignment)
        counts = handle.num_unaligned_recv_tokens_per_expert
        assert torch.equal(counts.cpu(), expected.num_tokens_per_expert)
        ys = rank.outputs()
        total, carried, _ = buffer.combine(rank.own(ys), handle=handle, topk_weights=weights)
        assert torch.equal(total.cpu(), rank.combined(ys).x)
        assert torch.equal(carried, rank.weights.where(rank.ids >= 0, 0))
        with pytest.raises(NotImplementedError, match="read num_expanded_tokens"):
            handle.psum_num_recv_tokens_per_scaleup_rank  # noqa: B018

    play(place, cases(place, layout=EXPERT, alignment=alignment), run, expert_alignment=alignment)


def test_dispatch_expanded_pads_with_zeros(place: Place) -> None:
    def run(rank: Rank) -> None:
        rows, _, weights, handle, _ = v2_dispatch(
            open_elastic(rank), rank, do_expand=True, expert_alignment=16
        )
        start = 0
        for end, size in zip(
            handle.psum_num_recv_tokens_per_expert.tolist(),
            handle.num_recv_tokens_per_expert_list,
            strict=True,
        ):
            start += size
            assert not rows[end:start].any()
            assert not weights[end:start].any()

    play(place, cases(place, layout=EXPERT, alignment=16), run, expert_alignment=16)


@pytest.mark.parametrize("alignment", [1, 128])
def test_dispatch_expanded_without_cpu_sync(place: Place, alignment: int) -> None:
    """SGLang decodes so: expanded, rows for the worst case, counts on the device."""
    rows = place.num_ranks * 16 * 2 + 2 * (alignment - 1)
    capacity = -(-rows // alignment) * alignment

    def run(rank: Rank) -> None:
        buffer = open_elastic(rank)
        rows, _, weights, handle, event = v2_dispatch(
            buffer,
            rank,
            num_max_tokens_per_rank=16,
            do_expand=True,
            do_cpu_sync=False,
            expert_alignment=alignment,
            do_zero_padding=True,
        )
        assert event.event is None
        assert handle.num_expanded_tokens == len(rows) == len(weights) == capacity
        rank.assert_received(rows, topk_weights=weights)
        ends = ends_of_groups(None, rank.expected[rank.rank], alignment)
        assert handle.psum_num_recv_tokens_per_expert.tolist() == ends
        assert not rows[ends[-1] :].any()
        ys = rank.outputs()
        assert torch.equal(buffer.combine(rank.own(ys), handle)[0].cpu(), rank.combined(ys).x)

    play(
        place,
        cases(place, layout=EXPERT, alignment=alignment),
        run,
        expert_alignment=alignment,
        capacities=[capacity] * place.num_ranks,
    )


@pytest.mark.parametrize("layout", [TOKEN, EXPERT], ids=["compact", "expanded"])
@pytest.mark.parametrize("wire", ["scaled", "scaled_ue8m0"])
@pytest.mark.parametrize("columns", [False, True], ids=["row-major", "column-major"])
def test_dispatch_fp8_scales(place: Place, layout: Any, wire: Any, columns: bool) -> None:
    def run(rank: Rank) -> None:
        buffer = open_elastic(rank, use_fp8_dispatch=True)
        (data, scales), *_ = v2_dispatch(
            buffer, rank, do_expand=layout is EXPERT, use_tma_aligned_col_major_sf=columns
        )
        expected = rank.expected[rank.rank]
        assert torch.equal(data.cpu().view(torch.uint8), expected.x.view(torch.uint8))
        assert torch.equal(scales.cpu(), expected.scales)
        if columns:
            assert scales.stride() == (1, -(-len(data) // 4) * 4)
        else:
            assert scales.is_contiguous()

    play(place, cases(place, layout=layout, wire=wire), run)
