# SPDX-License-Identifier: Apache-2.0
"""Low-latency calls that native code repeats: which ones, and what it does for them."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepcomm._C import kernels, slots
from deepcomm.backends.base import CombineRequest, DispatchRequest, low_latency_fields
from deepcomm.backends.cuda.failure import ErrorRecord
from deepcomm.errors import CommError
from deepcomm.types import RecvLayout, ScaledTensor

COMPLETE = 2  # layout::RecordState
OFFSETS = kernels.WordOffsets(counts=4, topk_idx=8, topk_weights=12, out_topk_weights=16)
LAYOUT = RecvLayout.EXPERT_PADDED
MAP = object()

DISPATCH: dict[str, Any] = {
    "x": torch.zeros(4, 8),
    "topk_idx": torch.zeros(4, 2, dtype=torch.int64),
    "topk_weights": None,
    "quantize": "fp8_e4m3",
    "scale_format": "fp32",
    "recv_layout": LAYOUT,
    "zero_padding": False,
    "out": None,
    "return_hook": False,
    "async_op": False,
    "previous_event": None,
    "on_timeout": "raise",
    "expert_token_stats": None,
    "wait_us_stats": None,
}
COMBINE: dict[str, Any] = {
    "y": torch.zeros(4, 8),
    "handle": None,
    "topk_weights": None,
    "apply_weights": True,
    "bias": None,
    "out": None,
    "return_hook": False,
    "async_op": False,
    "previous_event": None,
    "on_timeout": "raise",
    "wait_us_stats": None,
}
OTHER_DISPATCHES: dict[str, Any] = {
    "x": torch.zeros(5, 8),
    "topk_idx": torch.zeros(4, 2, dtype=torch.int32),
    "topk_weights": torch.zeros(4, 2),
    "quantize": None,
    "scale_format": "ue8m0",
    "recv_layout": RecvLayout.TOKEN,
    "zero_padding": True,
    "out": torch.zeros(1),
    "return_hook": True,
    "async_op": True,
    "previous_event": object(),
    "on_timeout": "mask",
    "expert_token_stats": torch.zeros(1),
    "wait_us_stats": torch.zeros(1),
}
OTHER_COMBINES: dict[str, Any] = {
    "y": torch.zeros(5, 8),
    "topk_weights": torch.zeros(4, 2),
    "apply_weights": False,
    "bias": torch.zeros(4, 8),
    "out": torch.zeros(4, 8),
    "return_hook": 1,
    "async_op": None,
    "previous_event": object(),
    "on_timeout": "mask",
    "wait_us_stats": torch.zeros(1),
}


@dataclass(slots=True, eq=False)
class Record:
    buffer_id: bytes
    words: torch.Tensor
    map: object
    is_complete: bool = False


@dataclass(slots=True, eq=False)
class Handle:
    records: Any


@dataclass(slots=True, eq=False)
class Output:
    handle: Handle
    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None


@dataclass(slots=True, eq=False)
class Sums:
    x: torch.Tensor


@dataclass
class Machine:
    """Plans of one dispatch and one combine, and all that is called for them."""

    shows_ranges: bool = True
    calls: list[str] = field(default_factory=list)
    fails: dict[str, BaseException] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.buffer_id = bytes(range(20))
        self.status = (ctypes.c_uint32 * (kernels.LOW_LATENCY_STATUS_BYTES // 4))()
        self.failure = ErrorRecord()
        self.turns, self.counts = kernels.LowLatencyTurns(2), kernels.OperationCounts()
        self.dispatches, self.combines = (kernels.LowLatencyPlans(most=8) for _ in range(2))
        self.params = kernels.LowLatencyDispatchParams()
        self.sums = kernels.LowLatencyCombineParams()
        self.outputs = (torch.zeros(8), None, None, torch.zeros(64, dtype=torch.int32))
        self.out = torch.zeros(4, 8)
        self.dispatch_plan = SimpleNamespace(
            repeat=kernels.LowLatencyDispatchRepeat(
                params=self.params,
                allocate=self.noted("allocate", self.outputs),
                offsets=OFFSETS,
                map=MAP,
                num_tokens=4,
            )
        )
        self.combine_plan = SimpleNamespace(
            repeat=kernels.LowLatencyCombineRepeat(
                params=self.sums, allocate=self.noted("allocate", self.out), offsets=OFFSETS
            )
        )
        for plan in (self.dispatch_plan, self.combine_plan):
            plan.repeat.launch = self.noted("launch")
        self.keep(DISPATCH["x"], None, is_scaled=False)
        inputs, others = (COMBINE["y"], None, None), (None, None)
        self.combines.keep(self.combine_plan, self.sums, inputs, others, (MAP, True, "raise"))
        self.repeats = self.make_repeats()

    def keep(self, x: torch.Tensor, scales: torch.Tensor | None, *, is_scaled: bool) -> None:
        self.dispatches.keep(
            self.dispatch_plan,
            self.params,
            (x, scales, DISPATCH["topk_idx"], None),
            (None, None, None),
            (is_scaled, LAYOUT, "fp8_e4m3", "fp32", False, "raise"),
        )

    def make_repeats(self) -> kernels.LowLatencyRepeats:
        return kernels.LowLatencyRepeats(
            kept=kernels.LowLatencyKept(
                dispatches=self.dispatches,
                combines=self.combines,
                turns=self.turns,
                counts=self.counts,
                status=ctypes.addressof(self.status),
                failure=ctypes.addressof(self.failure),
                owners=(self.status, self.failure),
            ),
            makers=kernels.LowLatencyMakers(
                buffer_id=self.buffer_id,
                record=slots.maker(
                    Record, ["words", "map"], {"buffer_id": self.buffer_id, "is_complete": True}
                ),
                handle=slots.maker(Handle, ["records"]),
                output=slots.maker(Output, ["handle", "x", "scales", "topk_idx"]),
                sums=slots.maker(Sums, ["x"]),
            ),
            callbacks=kernels.LowLatencyCallbacks(
                raise_earlier=self.noted("raise"),
                push_range=self.noted("push") if self.shows_ranges else None,
                pop_range=self.noted("pop") if self.shows_ranges else None,
            ),
        )

    def noted(self, name: str, result: Any = None) -> Any:
        def call(*_: Any) -> Any:
            self.calls.append(name)
            if name in self.fails:
                raise self.fails[name]
            return result

        return call

    def dispatch(self, **changes: Any) -> Any:
        return self.repeats.dispatch(tuple({**DISPATCH, **changes}.values()))

    def combine(self, **changes: Any) -> Any:
        handle = Handle(Record(self.buffer_id, self.outputs[3], MAP, True))  # type: ignore[arg-type]
        return self.repeats.combine(tuple({**COMBINE, "handle": handle, **changes}.values()))

    def counted(self) -> tuple[int, ...]:
        counts, slot = self.counts, self.turns.next_slot
        return counts.num_dispatches, counts.num_combines, counts.tokens_sent, slot


def test_fields_are_those_of_requests() -> None:
    assert tuple(DISPATCH) == low_latency_fields(DispatchRequest) == kernels.DISPATCH_FIELDS
    assert tuple(COMBINE) == low_latency_fields(CombineRequest) == kernels.COMBINE_FIELDS


def test_dispatch_is_repeated() -> None:
    machine = Machine()
    x, ids = torch.ones(4, 8), torch.ones(4, 2, dtype=torch.int64)
    got = machine.dispatch(x=x, topk_idx=ids)
    assert machine.calls == ["push", "allocate", "launch", "pop"]
    out, _, _, words = machine.outputs
    assert (got.x, got.scales, got.topk_idx) == (out, None, None)
    record = got.handle.records
    assert type(record) is Record
    assert record.buffer_id is machine.buffer_id
    assert (record.words, record.map, record.is_complete) == (words, MAP, True)
    params = machine.params
    assert (params.x, params.topk_idx) == (x.data_ptr(), ids.data_ptr())
    assert (params.out_x, params.base.record) == (out.data_ptr(), words.data_ptr())
    assert params.counts == words.data_ptr() + 4 * OFFSETS.counts
    assert machine.counted() == (1, 0, 4, 1)


def test_combine_is_repeated() -> None:
    machine = Machine()
    y = torch.ones(4, 8)
    got = machine.combine(y=y)
    assert machine.calls == ["push", "allocate", "launch", "pop"]
    assert got.x is machine.out
    params, words = machine.sums, machine.outputs[3]
    assert (params.y, params.out) == (y.data_ptr(), machine.out.data_ptr())
    assert params.base.record == words.data_ptr()
    assert params.topk_idx == words.data_ptr() + 4 * OFFSETS.topk_idx
    assert machine.counted() == (0, 1, 0, 1)


def test_scaled_rows_are_repeated_as_what_they_are() -> None:
    machine = Machine()
    data, scales = torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4, 1)
    scaled = ScaledTensor(data, scales)
    assert machine.dispatch(x=scaled) is None
    machine.keep(data, scales, is_scaled=True)
    assert machine.dispatch(x=scaled) is not None
    assert (machine.params.x, machine.params.scales) == (data.data_ptr(), scales.data_ptr())


@pytest.mark.parametrize("name", OTHER_DISPATCHES)
def test_other_dispatches_are_not(name: str) -> None:
    machine = Machine()
    assert machine.dispatch(**{name: OTHER_DISPATCHES[name]}) is None
    assert machine.calls == []
    assert machine.counted() == (0, 0, 0, 0)
    assert machine.dispatch() is not None


@pytest.mark.parametrize("name", OTHER_COMBINES)
def test_other_combines_are_not(name: str) -> None:
    machine = Machine()
    assert machine.combine(**{name: OTHER_COMBINES[name]}) is None
    assert machine.calls == []
    assert machine.counted() == (0, 0, 0, 0)
    assert machine.combine() is not None


@pytest.mark.parametrize(
    "records",
    [
        None,
        SimpleNamespace(),
        Record(bytes(range(20)), torch.zeros(8, dtype=torch.int32), MAP, True),  # alike, another's
        Record(b"other", torch.zeros(8, dtype=torch.int32), MAP, True),
    ],
)
def test_handles_of_others_are_looked_at(records: Any) -> None:
    machine = Machine()
    assert machine.combine(handle=Handle(records)) is None
    assert machine.combine(handle=records) is None
    unfinished = Record(machine.buffer_id, torch.zeros(8, dtype=torch.int32), MAP)
    assert machine.combine(handle=Handle(unfinished)) is None
    assert "launch" not in machine.calls


class Reluctant:
    """Raises whatever it is asked."""

    def __bool__(self) -> bool:
        raise ValueError("neither")

    def __getattr__(self, name: str) -> Any:
        raise ValueError(name)


def test_peers_hear_of_arguments_that_raise_errors() -> None:
    """From Python, which finds them again."""
    machine, reluctant = Machine(), Reluctant()
    for name in ("zero_padding", "x", "topk_idx", "topk_weights", "out", "return_hook"):
        assert machine.dispatch(**{name: reluctant}) is None
    for name in ("apply_weights", "y", "handle", "bias", "async_op"):
        assert machine.combine(**{name: reluctant}) is None
    assert machine.combine(handle=Handle(reluctant)) is None
    assert "push" not in machine.calls


def test_wrong_numbers_of_arguments_are_looked_at() -> None:
    repeats = Machine().repeats
    assert repeats.dispatch(()) is None
    assert repeats.combine((None,)) is None


def test_what_was_never_launched_as_a_whole_is_not_repeated() -> None:
    machine = Machine()
    machine.dispatch_plan.repeat.launch = machine.combine_plan.repeat.launch = None
    assert machine.dispatch() is None
    assert machine.combine() is None
    assert "push" not in machine.calls


def test_nothing_is_repeated_while_all_slots_are_in_flight() -> None:
    machine = Machine()
    numbers = [machine.turns.open() for _ in range(2)]
    for number in numbers:
        machine.turns.leave_in_flight(number)
    assert machine.turns.num_in_flight == 2
    assert machine.dispatch() is None
    assert machine.combine() is None
    machine.turns.settle(numbers[1])  # the oldest has the slot that comes next
    assert machine.dispatch() is None
    machine.turns.settle(numbers[0])
    assert machine.dispatch() is not None
    assert machine.turns.next_slot == 1


@pytest.mark.parametrize("name", ["state", "is_condemned"])
def test_nothing_is_repeated_once_the_buffer_has_failed(name: str) -> None:
    machine = Machine()
    setattr(machine.failure, name, COMPLETE)
    assert machine.dispatch() is machine.combine() is None
    assert machine.calls == []
    assert machine.counted() == (0, 0, 0, 0)


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_ranges_are_left_out_where_nobody_looks_at_them(operation: str) -> None:
    machine = Machine(shows_ranges=False)
    assert getattr(machine, operation)() is not None
    assert machine.calls == ["allocate", "launch"]


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_peers_hear_of_missing_memory(operation: str) -> None:
    """From Python, which finds it missing again."""
    machine = Machine(fails={"allocate": torch.OutOfMemoryError()})
    assert getattr(machine, operation)() is None
    assert machine.calls == ["push", "allocate", "pop"]
    assert machine.counted() == (0, 0, 0, 0)


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
@pytest.mark.parametrize(
    ("step", "calls"),
    [
        ("push", ["push"]),
        ("allocate", ["push", "allocate", "pop"]),
        ("launch", ["push", "allocate", "launch", "pop"]),
    ],
)
def test_what_is_raised_on_the_way_comes_out(operation: str, step: str, calls: list[str]) -> None:
    machine = Machine(fails={step: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        getattr(machine, operation)()
    assert machine.calls == calls
    assert machine.turns.next_slot == 0


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_earlier_errors_are_raised_behind_the_turn(operation: str) -> None:
    machine = Machine(fails={"raise": CommError("earlier", 1)})
    machine.status[0] = COMPLETE
    with pytest.raises(CommError, match="earlier"):
        getattr(machine, operation)()
    assert machine.calls == ["push", "allocate", "launch", "raise", "pop"]
    assert machine.turns.next_slot == 1
    del machine.fails["raise"]  # as in a capture
    assert getattr(machine, operation)() is not None


def test_profiler_that_fails_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(fails={"pop": RuntimeError("no range")})
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: told.append(args.exc_value))
    assert machine.dispatch() is not None
    assert told == [machine.fails["pop"]]
