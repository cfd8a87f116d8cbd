# SPDX-License-Identifier: Apache-2.0
"""V1 dispatch and combine, as clients call them, against the reference, bit for bit."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from collective.case import Case
from compat import workers
from compat.places import CPU, Place
from compat.play import Rank, play, row_counts, v1_dispatch

from deepcomm import CommError, InvalidArgument
from deepcomm.compat import Buffer, EventOverlap
from deepcomm.testing import LocalCluster, run_processes

WIRES = ("bf16", "scaled", "scaled_ue8m0")


def cases(place: Place, **fields: Any) -> Case:
    shape = {"num_ranks": place.num_ranks, "hidden": 256, "num_topk": 3}
    return Case(device=place.device, **{**shape, **fields})


# ---- Layout --------------------------------------------------------------------------------------


def test_layout_counts_tokens(place: Place) -> None:
    def run(rank: Rank) -> None:
        num_experts, num_ranks = rank.case.num_experts, rank.case.num_ranks
        ids = rank.ids.cpu()
        result = Buffer(rank.group).get_dispatch_layout(topk_idx=rank.ids, num_experts=num_experts)
        per_rank, per_node, per_expert, in_rank, event = result
        local = num_experts // num_ranks
        expected = torch.tensor(
            [[r in (row[row >= 0] // local) for r in range(num_ranks)] for row in ids]
        ).reshape(-1, num_ranks)
        assert torch.equal(in_rank.cpu(), expected.bool())
        assert per_rank.tolist() == expected.sum(0).tolist()
        assert per_expert.tolist() == [int((ids == e).sum()) for e in range(num_experts)]
        assert (per_rank.dtype, per_expert.dtype) == (torch.int32, torch.int32)
        assert per_node is None
        assert event.event is None

    play(place, cases(place), run)


def test_layout_counts_nodes_of_eight() -> None:
    ids = torch.tensor([[0, 1, 9], [15, -1, -1]])
    counts = LocalCluster(16, device="cpu").run(
        lambda group: Buffer(group).get_dispatch_layout(ids, 16)[1]
    )[0]
    assert counts is not None
    assert counts.tolist() == [1, 2]


def test_layout_event_and_errors(place: Place) -> None:
    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group)
        layout = buffer.get_dispatch_layout(
            rank.ids, 8, Buffer.capture(), async_finish=True, allocate_on_comm_stream=True
        )
        layout[4].current_stream_wait()
        with pytest.raises(InvalidArgument, match="num_experts: expected a multiple"):
            buffer.get_dispatch_layout(rank.ids, 7)
        with pytest.raises(InvalidArgument, match="topk_idx: expected"):
            buffer.get_dispatch_layout(rank.ids[:, 0], 8)

    play(place, cases(place), run)


# ---- Dispatch ------------------------------------------------------------------------------------


def play_dispatch(place: Place, wire: Any, alignment: int) -> None:
    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group)
        config = Buffer.get_dispatch_config(rank.case.num_ranks)
        rows, ids, weights, counts, handle, event = v1_dispatch(
            buffer, rank, expert_alignment=alignment, config=config
        )
        rank.assert_received(rows, topk_idx=ids, topk_weights=weights)
        assert type(counts) is list
        assert counts == row_counts(rank.expected[rank.rank], alignment)
        assert ids.dtype == torch.int64
        assert not weights[ids == -1].any()
        assert all(isinstance(entry, torch.Tensor) for entry in handle)
        assert len(handle) == 6
        assert isinstance(event, EventOverlap)
        assert event.event is None

    play(place, cases(place, wire=wire), run)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("alignment", [1, 128])
def test_dispatch_six_results(place: Place, wire: Any, alignment: int) -> None:
    play_dispatch(place, wire, alignment)


@pytest.mark.parametrize("alignment", [1, 128])
def test_dispatch_float32_rows_on_cpus(alignment: int) -> None:
    play_dispatch(CPU, "fp32", alignment)


def test_dispatch_async_and_previous_event(place: Place) -> None:
    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group)
        rows, *_, handle, event = v1_dispatch(
            buffer, rank, async_finish=True, allocate_on_comm_stream=True
        )
        event.current_stream_wait()
        rank.assert_received(rows)
        *_, event = buffer.combine(rows, handle, previous_event=event, async_finish=True)
        with event:
            pass
        *_, event = buffer.combine(rows, handle, previous_event=buffer.capture())
        assert event.event is None

    play(place, cases(place), run)


def test_dispatch_without_weights(place: Place) -> None:
    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group)
        counts = buffer.get_dispatch_layout(rank.ids, rank.case.num_experts)[2]
        received = buffer.dispatch(rank.x, topk_idx=rank.ids, num_tokens_per_expert=counts)
        rank.assert_received(received[0], topk_idx=received[1])
        assert received[2] is None

    play(place, cases(place), run)


def test_dispatch_worst_tokens(place: Place) -> None:
    capacity = place.num_ranks * 16

    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group)
        rows, ids, weights, counts, handle, _ = v1_dispatch(buffer, rank, num_worst_tokens=capacity)
        assert rows.shape[0] == ids.shape[0] == capacity
        assert counts == []
        rank.assert_received(rows, topk_idx=ids, topk_weights=weights)
        total, carried, _ = buffer.combine(rows, handle, topk_weights=weights)
        assert torch.equal(carried.cpu(), rank.weights.cpu().where(rank.ids.cpu() >= 0, 0))
        rank.assert_received(buffer.dispatch(rank.x, handle=handle)[0])
        assert torch.isfinite(total).all()

    play(place, cases(place), run, capacities=[capacity] * place.num_ranks)


@pytest.mark.parametrize("as_plain_tuple", [False, True], ids=["handle", "tensors"])
def test_dispatch_cached(place: Place, as_plain_tuple: bool) -> None:
    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group)
        *_, handle, _ = v1_dispatch(buffer, rank)
        handle = tuple(handle) if as_plain_tuple else handle
        again = buffer.dispatch(
            rank.x,
            handle=handle,
            num_tokens_per_rank=None,
            num_tokens_per_rdma_rank=None,
            is_token_in_rank=None,
            num_tokens_per_expert=None,
            topk_idx=None,
            topk_weights=None,
            config=None,
        )
        rank.assert_received(again[0])
        assert again[1:5] == (None, None, None, None)
        assert isinstance(again[5], EventOverlap)
        with pytest.raises(InvalidArgument, match="expected None beside handle"):
            buffer.dispatch(rank.x, handle=handle, topk_idx=rank.ids)

    play(place, cases(place), run)


def test_dispatch_refuses_what_it_cannot_know(place: Place) -> None:
    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group)
        counts = torch.zeros(rank.case.num_experts, dtype=torch.int32)
        with pytest.raises(NotImplementedError, match=r"without topk_idx.*pass the ids"):
            buffer.dispatch(rank.x, num_tokens_per_expert=counts)
        with pytest.raises(InvalidArgument, match="num_tokens_per_expert: expected what"):
            buffer.dispatch(rank.x, topk_idx=rank.ids)
        with pytest.raises(InvalidArgument, match="x: expected rows"):
            buffer.dispatch((rank.x,), topk_idx=rank.ids, num_tokens_per_expert=counts)

    play(place, cases(place), run)


# ---- Combine -------------------------------------------------------------------------------------


def test_combine_with_weights_and_biases(place: Place) -> None:
    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group)
        _, _, weights, _, handle, _ = v1_dispatch(buffer, rank)
        ys = rank.outputs()
        y = rank.own(ys)
        total, carried, event = buffer.combine(
            y, handle, topk_weights=weights, config=Buffer.get_combine_config(place.num_ranks)
        )
        assert torch.equal(total.cpu(), rank.combined(ys).x)
        expected = rank.weights.where(rank.ids >= 0, 0)
        assert torch.equal(carried, expected)
        assert event.event is None
        biases = [torch.randn(rank.x.shape, device=place.device).to(y.dtype) for _ in range(2)]
        gathered = rank.control.all_gather([bias.cpu() for bias in biases])
        one = buffer.combine(x=y, handle=handle, bias=biases[0])
        assert torch.equal(one[0].cpu(), rank.combined(ys, biases=[b[0] for b in gathered]).x)
        assert one[1] is None
        both = buffer.combine(y, handle, bias=(biases[0], biases[1]))[0]
        sums = [(first.float() + second.float()).to(first.dtype) for first, second in gathered]
        assert torch.equal(both.cpu(), rank.combined(ys, biases=sums).x)

    play(place, cases(place), run)


class SavedHandle(torch.autograd.Function):
    """What xtuner does: the handle's tensors are saved, and come back as a plain tuple."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, buffer: Buffer, received: tuple[Any, ...]) -> Any:
        assert len(received[0]) <= len(x) * buffer.group_size or not len(x)
        ctx.buffer = buffer
        ctx.save_for_backward(*received[4])
        return received[0].clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.buffer.combine(grad.contiguous(), ctx.saved_tensors)[0], None, None


@pytest.mark.parametrize("hooks", [False, True], ids=["plain", "packed"])
def test_handle_through_save_for_backward(place: Place, hooks: bool) -> None:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if hooks else tensor

    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group)
        x = (rank.x.float() if place.is_cpu else rank.x).requires_grad_()
        counts = buffer.get_dispatch_layout(rank.ids, rank.case.num_experts)
        received = buffer.dispatch(x.detach(), topk_idx=rank.ids, num_tokens_per_expert=counts[2])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            SavedHandle.apply(x, buffer, received).sum().backward()
        ranks_of_token = counts[3].sum(1, keepdim=True).to(x.dtype)
        assert torch.equal(x.grad, ranks_of_token.expand_as(x))

    play(place, cases(place), run)


def test_handle_is_freed_with_its_tensors(place: Place) -> None:
    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group)
        *_, handle, _ = v1_dispatch(buffer, rank)
        copy = handle[0].clone()
        buffer.dispatch(rank.x, handle=(copy,))
        del handle
        gc.collect()
        rank.control.all_gather(None)
        with pytest.raises(InvalidArgument, match="handle: expected one of dispatch"):
            buffer.dispatch(rank.x, handle=(copy,))
        with pytest.raises(InvalidArgument, match="handle: expected one of dispatch"):
            buffer.combine(rank.x, None)

    play(place, cases(place), run)


def test_handle_outlives_the_buffer_it_came_from(place: Place) -> None:
    """Megatron makes a new buffer when gradients are wider than the activations."""

    def run(rank: Rank) -> None:
        rows, *_, handle, _ = v1_dispatch(Buffer(rank.group), rank)
        gc.collect()
        other = Buffer(rank.group)
        assert torch.equal(other.dispatch(rank.x, handle=handle)[0], rows)
        other.combine(rows, handle)

    play(place, cases(place), run)


# ---- Buffers that grow ---------------------------------------------------------------------------


SHAPES = (
    (3, 1, 256, 8),
    (40, 1, 256, 8),  # more tokens
    (7, 3, 256, 8),  # more experts a token
    (7, 2, 128, 8),  # another hidden size
    (5, 2, 256, 16),  # other experts
    (90, 3, 256, 8),  # more tokens than any buffer of that shape
)


def test_buffer_grows_with_tokens_topk_and_shapes(place: Place) -> None:
    def run(rank: Rank) -> list[int]:
        buffer, sizes = Buffer(rank.group), []
        for tokens, topk, hidden, experts in SHAPES:
            mine = tokens if rank.is_last else rank.rank
            generator = torch.Generator().manual_seed(rank.rank)
            ids = torch.rand(mine, experts, generator=generator).topk(topk).indices.to(place.device)
            x = torch.randn(mine, hidden, generator=generator).bfloat16().to(place.device)
            layout = buffer.get_dispatch_layout(ids, experts)
            received = buffer.dispatch(x, topk_idx=ids, num_tokens_per_expert=layout[2])
            total = buffer.combine(received[0], received[4])[0]
            expected = x.float() * layout[3].sum(1, keepdim=True)
            assert torch.equal(total.float(), expected.bfloat16().float())
            sizes.append(received[4].routing.buffer.config.max_tokens_per_rank)
        return sizes

    sizes = play(place, cases(place), run)
    assert all(entry == sizes[0] for entry in sizes)
    assert sizes[0][0] == 3
    assert sizes[0][1] >= 40
    assert sizes[0][-1] >= 90


def test_buffer_after_destroy_is_refused(place: Place) -> None:
    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group)
        rows, *_, handle, _ = v1_dispatch(buffer, rank)
        rank.control.all_gather(None)
        buffer.destroy()
        buffer.destroy()
        with pytest.raises(CommError):
            v1_dispatch(buffer, rank)
        with pytest.raises(CommError):
            buffer.combine(rows, handle)

    play(place, cases(place), run)


@pytest.mark.parametrize("use_communicator", [False, True], ids=["gloo", "mpi4py"])
def test_buffer_of_processes(use_communicator: bool) -> None:
    assert run_processes(workers.exchange, 3, use_communicator) == [0.0] * 3


def test_buffer_of_several_nodes_is_transparent(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nodes are discovered: where a host plays two, the facade's results are those of two."""
    size = place.num_ranks // 2
    from deepcomm.compat import native

    original = native.Buffer
    monkeypatch.setattr(native, "Buffer", lambda *a, **k: original(*a, ranks_per_node=size, **k))

    def run(rank: Rank) -> None:
        buffer = Buffer(rank.group)
        rows, ids, weights, _, handle, _ = v1_dispatch(buffer, rank)
        rank.assert_received(rows, topk_idx=ids, topk_weights=weights)
        ys = rank.outputs()
        assert torch.equal(buffer.combine(rank.own(ys), handle)[0].cpu(), rank.combined(ys).x)
        assert handle.routing.buffer.ranks_per_node == size

    play(place, replace(cases(place), ranks_per_node=size), run)
