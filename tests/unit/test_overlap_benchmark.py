# SPDX-License-Identifier: Apache-2.0
"""``benchmarks/overlap.py`` without GPUs: its training step, its figures and its picture."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deepcomm import Buffer
from deepcomm.testing import LocalCluster

if TYPE_CHECKING:
    from types import ModuleType


def small_setting(load_benchmark: Any) -> Any:
    return load_benchmark("overlap_timing").Setting(
        device="cpu",
        num_tokens=24,
        hidden=64,
        num_experts=8,
        num_topk=3,
        num_sms=1,
        gemm=(8, 8, 8),
        dense=32,
        intermediate=16,
        repeats=1,
    )


def check_steps(group: Any, training: Any, setting: Any) -> None:
    with Buffer(
        group,
        num_experts=setting.num_experts,
        num_topk=setting.num_topk,
        hidden=setting.hidden,
        max_tokens_per_rank=setting.num_tokens,
        device=setting.device,
        num_generations=training.NUM_GENERATIONS,
        num_low_latency_slots=0,
    ) as buffer:
        training.check_steps(training.Layer(buffer, setting), setting.num_tokens)


def test_step_schedules_keep_the_order_of_each_micro_batch(load_benchmark: Any) -> None:
    training = load_benchmark("overlap_training")
    for schedule in (training.IN_SEQUENCE, training.OVERLAPPED):
        for index in range(training.NUM_MICRO_BATCHES):
            assert [name for name, of in schedule if of == index] == list(training.CHAIN)


def test_step_equals_autograd_and_both_ways_each_other(load_benchmark: Any) -> None:
    training, setting = load_benchmark("overlap_training"), small_setting(load_benchmark)
    LocalCluster(2).run(partial(check_steps, training=training, setting=setting))


def test_step_check_notices_a_wrong_gradient(
    load_benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, setting = load_benchmark("overlap_training"), small_setting(load_benchmark)
    dense_grad = training.Layer._dense_grad

    def without_residual(layer: Any, m: Any) -> None:
        dense_grad(layer, m)
        m.grad_x = m.grad_x - m.grad_h.x

    monkeypatch.setattr(training.Layer, "_dense_grad", without_residual)
    with pytest.raises(AssertionError, match="result 1: expected autograd's"):
        LocalCluster(1).run(partial(check_steps, training=training, setting=setting))


def samples(gemms: ModuleType, us: dict[str, tuple[float, float]]) -> list[Any]:
    """Return two passes of two samples for each variant."""
    return [[[[*us[v.name], 0.0]] * 2] * 2 for v in gemms.VARIANTS]


def test_gemm_figures_compare_with_what_runs_alone(load_benchmark: Any) -> None:
    gemms = load_benchmark("overlap_gemm")
    us = {variant.name: (1000.0, 100.0) for variant in gemms.VARIANTS}
    us["GEMMs alone, leaving SMs"] = (1100.0, 0.0)
    us["GEMMs beside dispatches"] = (1200.0, 110.0)
    us["GEMMs beside combines"] = (1300.0, 150.0)
    figures = {figure.name: figure for figure in gemms.figures_of(samples(gemms, us), 0.23)}
    dispatches, combines = figures["GEMMs beside dispatches"], figures["GEMMs beside combines"]
    assert dispatches.gemm_slowdown == pytest.approx(0.2)
    assert dispatches.operation_slowdown == pytest.approx(0.1)
    assert dispatches.is_met
    assert combines.gemm_slowdown == pytest.approx(0.3)
    assert combines.is_met is False
    assert figures["GEMMs alone"].operation is None
    assert figures["dispatches alone"].gemms is None
    assert figures["GEMMs alone, leaving SMs"].is_met is None
    json.dumps([asdict(figure) for figure in figures.values()])


def test_operations_beside_gemms_are_those_around_them(load_benchmark: Any) -> None:
    gemms, timing = load_benchmark("overlap_gemm"), load_benchmark("overlap_timing")

    class At(timing.Mark):  # type: ignore[misc,name-defined]
        def __init__(self, us: float) -> None:
            self.us = us

        def us_since(self, earlier: At) -> float:
            return self.us - earlier.us

    def read(turns: list[float], begin: float, end: float) -> list[float]:
        beside = object.__new__(gemms.Beside)
        beside._device = type("Device", (), {"type": "cuda"})
        beside._start, beside._num_ops = At(5), len(turns)
        beside._turns = [At(5 + us) for us in turns]
        beside._span = At(5 + begin), At(5 + end)
        result: list[float] = beside.read()
        return result

    assert read([0, 10, 30, 50, 60], begin=12, end=45) == [33, 20, 5]
    us, _, wanted = read([0, 10, 20], begin=11, end=100)
    assert us == 89
    assert wanted > 15


def test_timelines_are_drawn_on_a_common_axis(load_benchmark: Any, tmp_path: Path) -> None:
    timeline = load_benchmark("timeline")

    def span(name: str, lane: str, begin_us: float, end_us: float) -> Any:
        return timeline.Span(name, lane, 0, name.endswith("grad"), begin_us, end_us)

    spans = (span("dense", "compute", 0, 50), span("dispatch grad", "communication", 50, 60))
    ways = [timeline.Timeline(name, spans) for name in ("in sequence", "overlapped")]
    timeline.write_timelines(tmp_path / "out.png", "A step", ways)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert ways[0].end_us == 60
