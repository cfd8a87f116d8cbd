# SPDX-License-Identifier: Apache-2.0
"""What can be refused without a group: configurations, sizes, groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import deepcomm
from deepcomm import (
    BufferConfig,
    CommError,
    CommTimeout,
    ConfigMismatch,
    CudaError,
    Error,
    Event,
    InternalError,
    InvalidArgument,
    NcclError,
)
from deepcomm.event import CompletedEvent
from deepcomm.group import as_group, check_equal
from deepcomm.testing import LocalCluster, LocalGroup

GOOD = BufferConfig(num_experts=8, num_topk=2, hidden=64, max_tokens_per_rank=16)


def test_config_good_one_is_accepted() -> None:
    GOOD.check(num_ranks=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 6}, r"num_experts: expected a multiple of the group's 4 ranks, got 6"),
        ({"num_experts": 0}, r"num_experts: expected 1\.\.\d+, got 0"),
        ({"num_topk": 33}, r"num_topk: expected 1\.\.32, got 33"),
        ({"num_topk": 9}, r"num_topk: expected at most num_experts = 8, got 9"),
        ({"num_topk": True}, r"num_topk: expected an int, got True"),
        ({"hidden": 12}, r"hidden: expected rows of a multiple of 16 bytes .*, got 12"),
        ({"hidden": 64.0}, r"hidden: expected an int, got 64\.0"),
        ({"max_tokens_per_rank": 0}, r"max_tokens_per_rank: expected 1\.\.\d+, got 0"),
        ({"num_generations": 1}, r"num_generations: expected 2\.\.64, got 1"),
        ({"num_low_latency_slots": 2}, r"expected 0 or at least 3, got 2"),
        ({"traffic_class": -1}, r"traffic_class: expected 0\.\.\d+, got -1"),
        ({"ranks_per_node": 3}, r"ranks_per_node: expected a divisor of .* 4 ranks, got 3"),
        ({"timeout_s": 0.0}, r"timeout_s: expected a positive number of seconds, got 0\.0"),
        ({"late_warning_s": -1.0}, r"late_warning_s: expected a positive number"),
    ],
)
def test_config_out_of_range_names_field_and_values(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        replace(GOOD, **changes).check(num_ranks=4)


def test_config_traffic_class_is_nothing_that_gloo_has() -> None:
    def make(group: LocalGroup) -> None:
        sizes = {"num_experts": 2, "num_topk": 1, "hidden": 64, "max_tokens_per_rank": 4}
        with pytest.raises(
            InvalidArgument, match=r"traffic_class: expected None on CPUs .*, got 3"
        ):
            deepcomm.Buffer(group, device="cpu", **sizes, traffic_class=3)

    LocalCluster(2).run(make)


def test_config_local_fields_may_differ_between_ranks() -> None:
    one = replace(GOOD, timeout_s=1.0, num_threads=2).shared_fields()
    assert one == GOOD.shared_fields()
    with pytest.raises(ConfigMismatch, match=r"hidden differs .* rank 0 has 64, rank 1 has 128"):
        check_equal("Buffer", [one, replace(GOOD, hidden=128).shared_fields()])


def test_errors_have_one_base_and_their_kinds() -> None:
    kinds = (CommError, CommTimeout, ConfigMismatch, CudaError, InternalError, NcclError)
    assert all(issubclass(kind, Error) for kind in (*kinds, InvalidArgument))
    assert issubclass(InvalidArgument, ValueError)
    assert CommTimeout("late", 3).peer == 3
    assert CommError("refused").peer is None


def test_event_of_a_finished_operation_is_complete() -> None:
    event: Event = CompletedEvent()
    event.synchronize()
    event.current_stream_wait()
    assert event.query()


def test_group_of_another_kind_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"group: expected a torch\.distributed .* got int"):
        as_group(5)


def test_local_group_is_a_group_by_itself() -> None:
    def gather(group: LocalGroup) -> list[int]:
        assert as_group(group) is group
        return group.all_gather(group.rank * 10)

    assert LocalCluster(3).run(gather) == [[0, 10, 20]] * 3


def test_buffer_bytes_grow_with_tokens_and_need_no_group() -> None:
    def total(max_tokens_per_rank: int) -> int:
        sizes = deepcomm.buffer_bytes(
            num_ranks=8,
            num_experts=256,
            num_topk=8,
            hidden=7168,
            max_tokens_per_rank=max_tokens_per_rank,
        )
        assert sizes.total == sizes.high_throughput + sizes.low_latency
        return sizes.total

    rows = 8 * 128 * 7168 * 2
    assert 7 * rows < total(128) < 8 * rows  # three generations and four slots, and their metadata
    assert total(256) > 1.9 * total(128)
    with pytest.raises(InvalidArgument, match="num_ranks: expected at least 1, got 0"):
        deepcomm.buffer_bytes(
            num_ranks=0, num_experts=8, num_topk=2, hidden=64, max_tokens_per_rank=16
        )


def test_low_latency_bytes_on_gpus_are_those_of_the_layouts_example() -> None:
    sizes = {"num_experts": 256, "num_topk": 8, "hidden": 7168, "max_tokens_per_rank": 128}

    def low_latency(ranks_per_node: int | None) -> int:
        every = {**sizes, "ranks_per_node": ranks_per_node}
        return deepcomm.buffer_bytes(num_ranks=8, device="cuda", **every).low_latency

    assert low_latency(None) == low_latency(8) == low_latency(1) == 59_450_112
    assert low_latency(4) == 99_304_704


def test_buffer_on_an_unknown_device_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="device: expected cpu or cuda, got meta"):
        deepcomm.Buffer(
            None,
            device=torch.device("meta"),
            num_experts=8,
            num_topk=2,
            hidden=64,
            max_tokens_per_rank=16,
        )
