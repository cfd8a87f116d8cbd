# SPDX-License-Identifier: Apache-2.0
"""Arguments that differ between ranks: the table of ``test_mismatch``, and what its ranks do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from trap.rounds import (
    Inputs,
    Outcome,
    Place,
    attempt,
    call,
    check_round_trips,
    gather,
    open_buffer,
    outcome_of,
)

from deepcomm import RecvLayout
from deepcomm.group import as_group

if TYPE_CHECKING:
    from collections.abc import Callable

    Arguments = dict[str, Any]
    Change = Callable[[Arguments], Arguments]

ODD_RANK = 1


@dataclass(frozen=True)
class Case:
    """What all ranks change in their arguments, and what the odd rank changes besides."""

    operation: str
    field: str
    odd: Change
    common: Change = lambda _arguments: {}
    odd_operation: str = ""

    @property
    def name(self) -> str:
        return f"{self.operation}-{self.field.replace(' ', '_')}"


def given(**change: Any) -> Change:
    return lambda _arguments: change


def other_handle(arguments: Arguments) -> Arguments:
    return {"y": arguments["other"].x, "handle": arguments["other"].handle}


def rounded(name: str) -> Change:
    return lambda arguments: {name: arguments[name].half()}


def fewer_columns(arguments: Arguments) -> Arguments:
    return {name: arguments[name][:, 1:] for name in ("topk_idx", "topk_weights")}


def cached(key: str) -> Change:
    return lambda a: {"handle": a[key].handle, "topk_idx": None, "topk_weights": None}


def carried(arguments: Arguments) -> Arguments:
    return {"topk_weights": torch.ones(arguments["own"].topk_weights.shape)}


EXPERT = given(recv_layout=RecvLayout.EXPERT)
NO_WEIGHTS = given(topk_weights=None)
HT, LL = "dispatch", "low_latency_dispatch"

CASES = (
    Case(HT, "dtype", rounded("x")),
    Case(HT, "topk_idx", fewer_columns),
    Case(HT, "topk_weights", NO_WEIGHTS),
    Case(HT, "recv_layout", EXPERT),
    Case(HT, "expert_alignment", given(recv_layout=RecvLayout.EXPERT, expert_alignment=8), EXPERT),
    Case(HT, "num_recv_tokens", given(num_recv_tokens=64)),
    Case(HT, "dtype of FP8", given(quantize="fp8_e4m3")),
    Case(HT, "scale_format", given(scale_format="ue8m0"), given(quantize="fp8_e4m3")),
    Case(HT, "handle", cached("other"), cached("own")),
    Case(HT, "operation", other_handle, odd_operation="combine"),
    Case("combine", "dtype", rounded("y")),
    Case("combine", "handle", other_handle),
    Case("combine", "topk_weights", carried),
    Case(LL, "dtype", rounded("x")),
    Case(LL, "topk_idx", fewer_columns),
    Case(LL, "topk_weights", NO_WEIGHTS),
    Case(LL, "recv_layout", given(recv_layout=RecvLayout.TOKEN)),
    Case(LL, "scale_format", given(scale_format="ue8m0"), given(quantize="fp8_e4m3")),
    Case("low_latency_combine", "dtype", rounded("y")),
    Case("low_latency_combine", "handle", other_handle),
    Case("low_latency_combine", "apply_weights", given(apply_weights=False)),
    Case(
        "low_latency_combine",
        "topk_weights",
        lambda arguments: {"topk_weights": torch.ones(arguments["handle"].topk_idx.shape)},
    ),
)


def run_cases(group: Any, place: Place) -> dict[str, list[Outcome]]:
    """Run every case and return all ranks' outcomes."""
    outcomes: dict[str, list[Outcome]] = {}
    with open_buffer(group, place, timeout_s=8.0) as buffer:
        inputs = Inputs(buffer)
        outputs = {
            name: [call(buffer, name, inputs.dispatch_arguments()) for _ in range(2)]
            for name in (HT, LL)
        }
        for case in CASES:
            first = case.operation.replace("combine", "dispatch")
            own, other = outputs[first]
            arguments = inputs.dispatch_arguments()
            if case.operation != first:
                arguments = {"y": own.x, "handle": own.handle}
            arguments |= case.common(arguments | {"own": own})
            operation = case.operation
            if buffer.rank == ODD_RANK:
                change = case.odd(arguments | {"own": own, "other": other})
                if case.odd_operation:
                    operation, arguments = case.odd_operation, change
                arguments |= change
            found = gather(group, attempt(buffer, operation, arguments))
            assert all(outcome.kind != "CommTimeout" for outcome in found), (case.name, found)
            outcomes[case.name] = found
        check_round_trips(buffer, inputs)
    return outcomes


def construct(group: Any, place: Place, odd: Arguments) -> Outcome:
    """Construct a buffer whose configuration differs on one rank; then one that works."""
    rank = as_group(group).rank
    options = odd if rank == ODD_RANK else {}
    outcome = outcome_of(rank, lambda: open_buffer(group, place, **options))
    with open_buffer(group, place) as buffer:
        check_round_trips(buffer, Inputs(buffer))
    return outcome
