# SPDX-License-Identifier: Apache-2.0
"""V1 low latency, as clients call it, against the reference, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from collective.case import Case
from compat.places import Place
from compat.play import PADDED, Rank, play, v1_dispatch

from deepcomm import InvalidArgument, ScaledTensor, reference
from deepcomm.compat import Buffer
from deepcomm.fp8 import dequantize_fp8
from deepcomm.group import as_group


def cases(place: Place, **fields: Any) -> Case:
    shape = {"num_ranks": place.num_ranks, "hidden": 256, "num_topk": 3, "layout": PADDED}
    return Case(device=place.device, **{**shape, **fields})


def low_latency_dispatch(buffer: Buffer, rank: Rank, **options: Any) -> tuple[Any, ...]:
    case = rank.case
    return buffer.low_latency_dispatch(
        rank.x, rank.ids, case.num_tokens, case.num_experts, **options
    )


@pytest.mark.parametrize(
    ("wire", "options"),
    [
        ("bf16", {"use_fp8": False}),
        ("fp8", {}),
        ("fp8_ue8m0", {"round_scale": True, "use_ue8m0": True}),
    ],
)
@pytest.mark.parametrize("hook", [False, True], ids=["whole", "hook"])
def test_dispatch_five_results(
    place: Place, wire: Any, options: dict[str, Any], hook: bool
) -> None:
    def run(rank: Rank) -> None:
        buffer = Buffer(group=rank.group, low_latency_mode=True)
        rows, counts, handle, event, receive = low_latency_dispatch(
            buffer, rank, return_recv_hook=hook, **options
        )
        assert (receive is None) != hook
        if hook:
            receive()
        rank.assert_received(rows)
        assert counts.dtype == torch.int32
        assert torch.equal(counts.cpu(), rank.expected[rank.rank].num_tokens_per_expert)
        assert event.event is None
        assert handle[2:] == (rank.case.num_tokens, rank.case.hidden, rank.case.num_experts)

    play(place, cases(place, wire=wire), run, low_latency=True)


def test_dispatch_with_scales_of_powers_of_two_in_fp32(place: Place) -> None:
    def run(rank: Rank) -> None:
        (data, scales), counts, *_ = low_latency_dispatch(
            Buffer(rank.group), rank, round_scale=True
        )
        expected = rank.expected[rank.rank]
        assert scales.dtype == torch.float32
        assert scales.stride(-2) == 1
        wanted = dequantize_fp8(ScaledTensor(expected.x, expected.scales))
        actual = dequantize_fp8(ScaledTensor(data.cpu(), scales.cpu()))
        for expert, count in enumerate(counts.tolist()):
            assert torch.equal(actual[expert, :count], wanted[expert, :count])

    play(place, cases(place, wire="fp8_ue8m0"), run, low_latency=True)


def test_dispatch_statistics_are_added(place: Place) -> None:
    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group)
        received = torch.full((2,), 5, dtype=torch.int32, device=place.device)
        waited = torch.zeros(place.num_ranks, dtype=torch.int64, device=place.device)
        for _ in range(2):
            low_latency_dispatch(
                buffer,
                rank,
                cumulative_local_expert_recv_stats=received,
                dispatch_wait_recv_cost_stats=waited,
            )
        expected = 5 + 2 * rank.expected[rank.rank].num_tokens_per_expert
        assert torch.equal(received.cpu(), expected)
        assert (waited >= 0).all()

    play(place, cases(place, wire="fp8"), run, low_latency=True)


@pytest.mark.parametrize("hook", [False, True], ids=["whole", "hook"])
@pytest.mark.parametrize("in_out", [False, True], ids=["fresh", "out"])
def test_combine_three_results(place: Place, hook: bool, in_out: bool) -> None:
    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group)
        _, _, handle, *_ = low_latency_dispatch(buffer, rank, use_fp8=False)
        ys = rank.outputs()
        out = torch.empty_like(rank.x) if in_out else None
        waited = torch.zeros(place.num_ranks, dtype=torch.int64, device=place.device)
        total, event, receive = buffer.low_latency_combine(
            rank.own(ys),
            rank.ids,
            rank.weights,
            handle,
            return_recv_hook=hook,
            out=out,
            combine_wait_recv_cost_stats=waited,
        )
        if hook:
            receive()
        assert (receive is None) != hook
        assert event.event is None
        assert out is None or total.data_ptr() == out.data_ptr()
        expected = rank.combined(ys, source_weights=rank.inputs.weights)
        assert torch.equal(total.cpu(), expected.x)

    play(place, cases(place), run, low_latency=True)


def test_operations_async(place: Place) -> None:
    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group)
        rows, _, handle, event, hook = low_latency_dispatch(
            buffer, rank, use_fp8=False, async_finish=True
        )
        assert hook is None
        event.current_stream_wait()
        rank.assert_received(rows)
        ys = rank.outputs()
        total, event, hook = buffer.low_latency_combine(
            x=rank.own(ys),
            topk_idx=rank.ids,
            topk_weights=rank.weights,
            handle=handle,
            async_finish=True,
        )
        assert hook is None
        event.current_stream_wait()
        expected = rank.combined(ys, source_weights=rank.inputs.weights)
        assert torch.equal(total.cpu(), expected.x)
        with pytest.raises(InvalidArgument, match="async_finish: expected False beside"):
            low_latency_dispatch(buffer, rank, async_finish=True, return_recv_hook=True)

    play(place, cases(place), run, low_latency=True)


def test_combine_zero_copy(place: Place) -> None:
    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group)
        rows, _, handle, *_ = low_latency_dispatch(buffer, rank, use_fp8=False)
        ys = rank.outputs()
        with pytest.raises(InvalidArgument, match="get_next_low_latency_combine_buffer"):
            buffer.low_latency_combine(rows, rank.ids, rank.weights, handle, zero_copy=True)
        outputs = buffer.get_next_low_latency_combine_buffer(handle)
        assert outputs.shape == rows.shape
        assert outputs.dtype == rows.dtype
        assert buffer.get_next_low_latency_combine_buffer(handle) is outputs
        outputs[:, :, :] = rank.own(ys)
        ignored = torch.full_like(rows, torch.nan)
        total, *_ = buffer.low_latency_combine(
            ignored, rank.ids, rank.weights, handle, zero_copy=True
        )
        expected = rank.combined(ys, source_weights=rank.inputs.weights)
        assert torch.equal(total.cpu(), expected.x)

    play(place, cases(place), run, low_latency=True)


def test_combine_with_ids_of_its_own(place: Place) -> None:
    """An id that is -1 now counts as none; any other than was sent spoils its token alone."""

    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group)
        _, _, handle, *_ = low_latency_dispatch(buffer, rank, use_fp8=False)
        ys, ids, weights = rank.outputs(), rank.ids, rank.weights

        def total_of(ids: torch.Tensor) -> torch.Tensor:
            return buffer.low_latency_combine(rank.own(ys), ids, weights, handle)[0]

        plain = total_of(ids)
        assert torch.equal(total_of(ids.clone()), plain)
        masked = ids.clone()
        masked[:, 0] = -1
        zeroed = [w.clone() for w in rank.inputs.weights]
        for entry in zeroed:
            entry[:, 0] = 0
        expected = rank.combined(ys, source_weights=zeroed)
        assert torch.equal(total_of(masked).cpu(), expected.x)
        other = ids.clone()
        other[:1, 0] = (other[:1, 0] + 1) % rank.case.num_experts
        spoilt = total_of(other)
        has_row = (ids[:1] >= 0).any(1)
        assert torch.equal(spoilt[:1].isnan().all(1), has_row)
        assert torch.equal(spoilt[1:], plain[1:])
        changed = ids.clone()
        _, _, handle, *_ = buffer.low_latency_dispatch(
            rank.x, changed, rank.case.num_tokens, rank.case.num_experts, use_fp8=False
        )
        changed.copy_(other)  # the same tensor, but not the same ids
        assert torch.equal(total_of(changed).isnan(), spoilt.isnan())

    play(place, cases(place), run, low_latency=True)


def test_combine_in_inference_mode(place: Place) -> None:
    def run(rank: Rank) -> None:
        with torch.inference_mode():
            buffer = Buffer(rank.group)
            ids = rank.ids.clone()
            assert ids.is_inference()
            _, _, handle, *_ = buffer.low_latency_dispatch(
                rank.x, ids, rank.case.num_tokens, rank.case.num_experts, use_fp8=False
            )
            ys = rank.outputs()
            expected = rank.combined(ys, source_weights=rank.inputs.weights)
            for given in (ids, ids.clone()):
                total, *_ = buffer.low_latency_combine(rank.own(ys), given, rank.weights, handle)
                assert torch.equal(total.cpu(), expected.x)

    play(place, cases(place), run, low_latency=True)


def test_operations_in_flight(place: Place) -> None:
    """Two batches overlap: the hooks of one run after the sends of the other."""

    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group)
        flying = [
            low_latency_dispatch(buffer, rank, use_fp8=False, return_recv_hook=True)
            for _ in range(2)
        ]
        ys = rank.outputs()
        totals = []
        for rows, _, handle, _, hook in flying:
            hook()
            rank.assert_received(rows)
            totals.append(
                buffer.low_latency_combine(
                    rank.own(ys), rank.ids, rank.weights, handle, return_recv_hook=True
                )
            )
        expected = rank.combined(ys, source_weights=rank.inputs.weights)
        for total, _, hook in totals:
            hook()
            assert torch.equal(total.cpu(), expected.x)

    play(place, cases(place), run, low_latency=True)


def test_regimes_alternate_in_one_buffer(place: Place) -> None:
    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group, low_latency_mode=True)
        case = rank.case
        for _ in range(2):
            rows, *_, handle, _ = v1_dispatch(buffer, rank)
            buffer.combine(rows, handle)
            buffer.clean_low_latency_buffer(case.num_tokens, case.hidden, case.num_experts)
            received = low_latency_dispatch(buffer, rank, use_fp8=False)
            rank.assert_received(received[0])

    play(place, cases(place), run, low_latency=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_nvfp4": True}, r"use_nvfp4: .*pass use_fp8=True"),
        ({"x_global_scale": torch.ones(1)}, "use_nvfp4"),
    ],
)
def test_dispatch_names_what_is_not_supported(
    place: Place, options: dict[str, Any], message: str
) -> None:
    def run(rank: Rank) -> None:
        with pytest.raises(NotImplementedError, match=message):
            low_latency_dispatch(Buffer(rank.group), rank, **options)

    play(place, cases(place), run, low_latency=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_logfmt": True}, r"use_logfmt: .*leave it False"),
        ({"overlap": True, "src_signals": None}, r"overlap .*return_recv_hook"),
        ({"overlap": True, "packed_recv_count": None, "block_m": 64, "threshold": 9}, "overlap"),
    ],
)
def test_combine_names_what_is_not_supported(
    place: Place, options: dict[str, Any], message: str
) -> None:
    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group)
        rows, _, handle, *_ = low_latency_dispatch(buffer, rank, use_fp8=False)
        with pytest.raises(NotImplementedError, match=message):
            buffer.low_latency_combine(rows, rank.ids, rank.weights, handle, **options)
        with pytest.raises(InvalidArgument, match="topk_idx: expected"):
            buffer.low_latency_combine(rows, rank.ids[:, :1], rank.weights, handle)

    play(place, cases(place), run, low_latency=True)


def test_scale_options_are_checked(place: Place) -> None:
    def run(rank: Rank) -> None:
        with pytest.raises(InvalidArgument, match="round_scale: expected True with use_ue8m0"):
            low_latency_dispatch(Buffer(rank.group), rank, use_ue8m0=True)

    play(place, cases(place), run, low_latency=True)


# ---- Masks ---------------------------------------------------------------------------------------


def test_masks_are_kept_queried_and_cleaned(place: Place) -> None:
    last = place.num_ranks - 1

    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group, low_latency_mode=True, enable_shrink=True)
        alive = [0] * last
        status = torch.full((last + 1,), 9, dtype=torch.int32, device=place.device)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [*alive, 0]
        for wrong in (rank.rank, last + 1, -1):
            with pytest.raises(InvalidArgument, match="rank_to_mask: expected a peer"):
                buffer.low_latency_update_mask_buffer(wrong, True)
        if rank.is_last:
            return
        buffer.low_latency_update_mask_buffer(last, True)
        buffer.low_latency_query_mask_buffer(mask_status=status)
        assert status.tolist() == [*alive, 1]

    play(place, cases(place), run, low_latency=True)


def test_masked_peer_is_left_out(place: Place) -> None:
    """The last rank takes part in the first exchange only; the others go on without it."""
    last = place.num_ranks - 1

    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group, low_latency_mode=True, enable_shrink=True)
        low_latency_dispatch(buffer, rank, use_fp8=False)
        rank.control.all_gather(None)
        if rank.is_last:
            return
        buffer.low_latency_update_mask_buffer(rank_to_mask=last, mask=True)
        rows, _, handle, *_ = low_latency_dispatch(buffer, rank, use_fp8=False)
        inputs = rank.inputs
        expected = reference.low_latency_dispatch(
            inputs.xs, inputs.ids, inputs.weights, config=rank.case.config, masked={last}
        )
        rank.expected = expected
        rank.assert_received(rows)
        total, *_ = buffer.low_latency_combine(rows, rank.ids, rank.weights, handle)
        ys = [entry if entry is None else entry.x for entry in expected]
        handles = [entry if entry is None else entry.handle for entry in expected]
        wanted = reference.low_latency_combine(
            ys, handles, source_weights=inputs.weights, masked={last}
        )[rank.rank]
        assert torch.equal(total.cpu(), wanted.x)
        status = torch.zeros(last + 1, dtype=torch.int32, device=place.device)
        buffer.low_latency_clean_mask_buffer()
        buffer.low_latency_query_mask_buffer(status)
        assert not status.any()

    play(place, cases(place), run, low_latency=True)


def test_late_peer_is_masked_with_enable_shrink(place: Place) -> None:
    def run(group: Any) -> list[int] | None:
        buffer = Buffer(group, low_latency_mode=True, enable_shrink=True)
        buffer._native._timeout_s = 1.0
        ids = torch.zeros(2, 1, dtype=torch.int64, device=place.device)
        x = torch.ones(2, 256, dtype=torch.bfloat16, device=place.device)
        buffer.low_latency_dispatch(x, ids, 2, 2)
        if as_group(group).rank == 1:
            return None
        buffer.low_latency_dispatch(x, ids, 2, 2)
        status = torch.zeros(2, dtype=torch.int32, device=place.device)
        buffer.low_latency_query_mask_buffer(status)
        return status.tolist()

    assert place.run(run, 2) == [[0, 1], None]
