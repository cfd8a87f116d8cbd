# SPDX-License-Identifier: Apache-2.0
"""What nobody should do and somebody will: no rank hangs, no result is silently wrong."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch

from deepcomm import (
    Buffer,
    CommError,
    ConfigMismatch,
    InvalidArgument,
    RecvLayout,
)
from deepcomm.backends.cpu import CpuBackend
from deepcomm.testing import LocalCluster, LocalGroup

SIZES: dict[str, Any] = {
    "num_experts": 8,
    "num_topk": 2,
    "hidden": 32,
    "max_tokens_per_rank": 4,
    "timeout_s": 10.0,
}
IDS = torch.tensor([[0, 7], [2, 5]])


def make_buffer(group: LocalGroup, **changes: Any) -> Buffer:
    return Buffer(group, device="cpu", **{**SIZES, **changes})


def rows(group: LocalGroup) -> torch.Tensor:
    return torch.full((2, 32), float(group.rank + 1))


def check_works(buffer: Buffer, group: LocalGroup) -> None:
    x = rows(group)
    received = buffer.dispatch(x, IDS)
    owners = IDS // (8 // group.size)
    visits = torch.tensor([len(set(row.tolist())) for row in owners])
    assert buffer.combine(received.x, received.handle).x.equal(x * visits[:, None])


def test_growth_that_fails_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    open_endpoint = CpuBackend._open_endpoint
    refused = []

    def refuse_first_growth(self: CpuBackend, config: Any) -> Any:
        if config.max_tokens_per_rank > 4 and len(refused) < 2:
            refused.append(config)
            raise CommError("no memory")
        return open_endpoint(self, config)

    monkeypatch.setattr(CpuBackend, "_open_endpoint", refuse_first_growth)

    def run(group: LocalGroup) -> None:
        with make_buffer(group, growable=True) as buffer:
            x, topk_idx = torch.ones(3000, 32), torch.zeros(3000, 1, dtype=torch.int64)
            group.barrier()
            with pytest.raises(CommError, match="no memory"):
                buffer.dispatch(x, topk_idx)
            assert buffer.config.max_tokens_per_rank == 4
            received = buffer.dispatch(x, topk_idx)
            assert buffer.config.max_tokens_per_rank == 3000
            assert received.x.shape[0] == (6000 if group.rank == 0 else 0)

    LocalCluster(2).run(run)


def test_hook_of_a_dropped_output_still_has_its_memory() -> None:
    def run(group: LocalGroup) -> None:
        with make_buffer(group) as buffer:
            received = buffer.low_latency_dispatch(rows(group), IDS, torch.ones(2, 2))
            hook = buffer.low_latency_combine(received.x, received.handle, return_hook=True).hook
            filler = [torch.full((2, 32), 5.0) for _ in range(64)]
            assert hook is not None
            hook()
            assert all(tensor.eq(5.0).all() for tensor in filler)
            check_works(buffer, group)

    LocalCluster(2).run(run)


@pytest.mark.parametrize("make", [lambda t: t.T.contiguous().T, lambda t: t[:, :1].expand(2, 32)])
def test_bias_of_any_strides(make: Any) -> None:
    def run(group: LocalGroup) -> None:
        with make_buffer(group) as buffer:
            received = buffer.dispatch(rows(group), IDS)
            bias = make(torch.arange(64.0).view(2, 32))
            got = buffer.combine(received.x, received.handle, bias=bias).x
            plain = buffer.combine(received.x, received.handle).x
            assert got.equal(plain + bias)

    LocalCluster(2).run(run)


@pytest.mark.parametrize("alignment", [2**30, 2**31, 0])
def test_alignment_out_of_reach_is_refused_every_time(alignment: int) -> None:
    def run(group: LocalGroup) -> None:
        with make_buffer(group) as buffer:
            for _ in range(4):
                with pytest.raises((InvalidArgument, CommError), match="expert_alignment"):
                    buffer.dispatch(
                        rows(group),
                        IDS,
                        recv_layout=RecvLayout.EXPERT,
                        expert_alignment=alignment,
                    )
            check_works(buffer, group)

    LocalCluster(2).run(run)


def test_capacities_that_differ_are_a_mismatch() -> None:
    def run(group: LocalGroup) -> None:
        with make_buffer(group) as buffer:
            with pytest.raises(ConfigMismatch, match=r"num_recv_tokens differs .* 16, .* None"):
                buffer.dispatch(rows(group), IDS, num_recv_tokens=None if group.rank else 16)
            check_works(buffer, group)

    LocalCluster(2).run(run)


def test_low_latency_rows_of_different_sizes_are_a_mismatch() -> None:
    def run(group: LocalGroup) -> None:
        with make_buffer(group) as buffer:
            x = rows(group) if group.rank == 0 else rows(group).bfloat16()
            with pytest.raises(ConfigMismatch, match="dtype of the rows differs"):
                buffer.low_latency_dispatch(x, IDS)
            check_works(buffer, group)
            received = buffer.low_latency_dispatch(rows(group), IDS, torch.ones(2, 2))
            y = received.x if group.rank == 0 else received.x.bfloat16()
            with pytest.raises(ConfigMismatch, match="dtype of the rows differs"):
                buffer.low_latency_combine(y, received.handle)
            check_works(buffer, group)

    LocalCluster(2).run(run)


def test_handle_of_another_buffer_is_refused() -> None:
    def run(group: LocalGroup) -> None:
        with make_buffer(group) as one, make_buffer(group, num_topk=1, num_experts=4) as other:
            received = one.dispatch(rows(group), IDS)
            match = "handle: expected one of this buffer"
            with pytest.raises((InvalidArgument, CommError), match=match):
                other.combine(received.x, received.handle)
            with pytest.raises((InvalidArgument, CommError), match=match):
                other.dispatch(rows(group), handle=received.handle)
            check_works(one, group)

    LocalCluster(2).run(run)


def test_local_rank_that_raises_ends_its_peers_at_once() -> None:
    def run(group: LocalGroup) -> None:
        buffer = make_buffer(group, timeout_s=60.0)
        check_works(buffer, group)
        if group.rank == 1:
            raise KeyError("a bug of the user")
        buffer.dispatch(rows(group), IDS)

    start = time.monotonic()
    with pytest.raises(KeyError, match="a bug of the user"):
        LocalCluster(2).run(run)
    assert time.monotonic() - start < 10


def test_forked_child_leaves_the_buffer_alone() -> None:
    def run(group: LocalGroup) -> None:
        buffer = make_buffer(group, num_threads=2)
        check_works(buffer, group)
        group.barrier()
        if group.rank == 0:
            child = os.fork()
            if child == 0:
                buffer.close()
                del buffer
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        group.barrier()
        check_works(buffer, group)
        buffer.close()

    LocalCluster(2).run(run)


def test_masking_blames_the_late_rank_not_one_that_waits() -> None:
    def run(group: LocalGroup) -> torch.Tensor:
        buffer = make_buffer(group, timeout_s=5.0)
        check_works(buffer, group)
        if group.rank == 3:
            buffer._backend._endpoint.fail("failed on purpose", 3)  # type: ignore[attr-defined]
            group.barrier()
            return torch.zeros(4, dtype=torch.bool)
        group.barrier()
        buffer.set_rank_mask(3, True)
        if group.rank == 0:
            time.sleep(0.5)
        buffer.low_latency_dispatch(rows(group), IDS, on_timeout="mask")
        return buffer.rank_mask()

    for mask in LocalCluster(4).run(run)[:3]:
        assert mask.tolist() == [False, False, False, True]
