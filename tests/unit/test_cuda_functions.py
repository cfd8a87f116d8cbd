# SPDX-License-Identifier: Apache-2.0
"""The kernels that a buffer on GPUs loads when it is made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from deepcomm import jit
from deepcomm._C import kernels
from deepcomm.backends.cuda.domain import Position
from deepcomm.backends.cuda.functions import Functions, LowLatencyFunctions
from deepcomm.config import BufferConfig
from deepcomm.topology import Topology

ALONE = Position()


@dataclass
class RecordingRuntime:
    """Loads nothing, and remembers what it was asked for."""

    asked: list[str] = field(default_factory=list)

    def load(self, kernel: str, spec: dict[str, int]) -> Any:
        (entry,) = (entry for entry in jit.KERNELS if entry.name == kernel)
        assert list(spec) == [parameter.name for parameter in entry.spec]
        self.asked.append(f"{kernel} {spec}")
        return self.asked[-1]


def load(
    rank: int = 0, position: Position = ALONE, ranks_per_node: int = 8, **options: Any
) -> tuple[list[str], Functions, LowLatencyFunctions]:
    sizes = {"num_experts": 64, "num_topk": 4, "hidden": 7168, "max_tokens_per_rank": 128}
    runtime: Any = RecordingRuntime()
    config, topology = BufferConfig(**{**sizes, **options}), Topology(rank, 8, ranks_per_node)
    high_throughput = Functions.load(runtime, config, topology, position)
    return (runtime.asked, high_throughput, LowLatencyFunctions.load(runtime, config, topology))


def names(asked: list[str]) -> dict[str, int]:
    return dict(Counter(kernel.split()[0] for kernel in asked))


HIGH_THROUGHPUT = {"dispatch_count": 1, "dispatch_send": 6, "dispatch_scales": 1, "combine": 2}
LOW_LATENCY = {"low_latency_dispatch": 13, "low_latency_combine": 4, "low_latency_refuse": 1}


def test_construction_loads_every_kernel_once() -> None:
    asked, high_throughput, low_latency = load()
    assert len(set(asked)) == len(asked)
    assert names(asked) == {**HIGH_THROUGHPUT, **LOW_LATENCY, "low_latency_mask": 1}
    assert sorted(high_throughput.send) == sorted(
        (wire, by_expert) for wire in ("bf16", "fp8", "cast") for by_expert in (False, True)
    )
    assert "'by_expert': True" in str(high_throughput.combine[True])
    assert sorted(low_latency.dispatch) == [0, 1, 2, 3, 4]
    for kind, by_phase in low_latency.dispatch.items():
        assert sorted(by_phase) == [1, 2, 3]
        for phase, function in by_phase.items():
            # Rows that are cast travel, and are received, as what they have become.
            rows = kind - 2 if phase == 2 and kind > 2 else kind
            assert f"'rows': {rows}, 'phases': {phase}" in str(function)
    assert all(f"'phases': {phase}" in str(low_latency.combine[phase]) for phase in (1, 2, 3, 67))


def test_construction_over_nodes_loads_phases_that_pass_on() -> None:
    asked, _, low_latency = load(ranks_per_node=4)
    assert names(asked)["low_latency_dispatch"] == 8
    assert "low_latency_refuse {'has_nodes': True}" in asked
    for by_phase in (*low_latency.dispatch.values(), low_latency.combine):
        assert sorted(by_phase) == [1, 2]
        assert all(f"'phases': {phase | 4}" in str(by_phase[phase]) for phase in (1, 2))


@pytest.mark.parametrize("ranks_per_node", [1, 4])
def test_construction_over_a_network_loads_combines_in_parts(ranks_per_node: int) -> None:
    asked, _, low_latency = load(ranks_per_node=ranks_per_node, rail="nccl")
    assert names(asked)["low_latency_combine"] == 4
    assert {"low_latency_refuse_carried {}", "low_latency_mark {}"} <= set(asked)
    assert "low_latency_refuse" not in names(asked)
    for by_phase in low_latency.dispatch.values():
        assert all(f"'phases': {phase | 4}" in str(by_phase[phase]) for phase in (1, 2))
    for phase in (1, 2, 16, 32):
        assert f"'phases': {phase | 4 | 8}" in str(low_latency.combine[phase])


@pytest.mark.parametrize("ranks_per_node", [1, 8])
def test_construction_where_every_way_is_direct_loads_the_same(ranks_per_node: int) -> None:
    asked, _, _ = load(ranks_per_node=ranks_per_node)
    assert asked == load()[0]


def test_construction_leaves_out_fp8_where_rows_do_not_allow_it() -> None:
    asked, high_throughput, low_latency = load(hidden=24)
    assert [wire for wire, _ in high_throughput.send] == ["bf16", "bf16"]
    assert sorted(low_latency.dispatch) == [0]
    assert names(asked)["low_latency_dispatch"] == 3


@pytest.mark.parametrize(
    "options",
    [
        {"num_low_latency_slots": 0},
        {"hidden": kernels.MAX_LOW_LATENCY_HIDDEN + 16},
        {"max_tokens_per_rank": 1 << 20},
    ],
)
def test_construction_leaves_out_low_latency_where_there_is_none(options: dict[str, int]) -> None:
    asked, _, low_latency = load(**options)
    assert names(asked) == {**HIGH_THROUGHPUT, "low_latency_mask": 1}
    assert (low_latency.refuse, low_latency.dispatch, low_latency.combine) == (None, {}, {})


def test_ranks_begin_at_different_kernels() -> None:
    orders = [load(rank)[0] for rank in range(8)]
    assert len({order[0] for order in orders}) == 8
    assert {frozenset(order) for order in orders} == {frozenset(orders[0])}


def test_domains_of_nodes_load_what_their_stage_needs() -> None:
    none = {"num_low_latency_slots": 0}
    rail, _, _ = load(position=Position(0, 4, is_rail=True), **none)
    assert names(rail)["dispatch_send"] == 3
    assert sorted(kernel for kernel in rail if "combine" in kernel) == [
        "combine_nodes {'num_ranks': 8, 'hidden': 7168}",
        "combine_open {'num_ranks': 8}",
    ]
    node, _, _ = load(position=Position(0, 1, num_origins=4), **none)
    assert names(node) == {**HIGH_THROUGHPUT, "low_latency_mask": 1}
    assert "dispatch_count {'num_ranks': 8, 'num_experts': 64, 'num_origins': 4}" in node
    assert all("'num_origins': 4" in kernel for kernel in node if "combine" in kernel)
