# SPDX-License-Identifier: Apache-2.0
"""What the ranks of ``test_bad_arguments`` do: each case in turn, then round trips."""

from __future__ import annotations

from typing import Any

from trap.bad_arguments import ALL, DISPATCHES, ident
from trap.rounds import (
    Inputs,
    Outcome,
    Place,
    arguments_of,
    attempt,
    call,
    check_round_trips,
    gather,
    open_buffer,
)


def run_cases(group: Any, place: Place) -> dict[str, tuple[int, list[Outcome]]]:
    """Run every case, on another rank each time; return the bad rank and all outcomes."""
    outcomes: dict[str, tuple[int, list[Outcome]]] = {}
    with open_buffer(group, place, timeout_s=8.0) as buffer:
        inputs = Inputs(buffer)
        handles = [call(buffer, name, inputs.dispatch_arguments()).handle for name in DISPATCHES]
        for index, (operation, case) in enumerate(ALL):
            bad_rank = index % buffer.num_ranks
            arguments = arguments_of(buffer, operation, inputs)
            if buffer.rank == bad_rank:
                arguments |= case.change({**arguments, "handles": handles})
            found = gather(group, attempt(buffer, operation, arguments))
            name = ident(operation, case)
            assert all(outcome.kind != "CommTimeout" for outcome in found), (name, found)
            outcomes[name] = bad_rank, found
        check_round_trips(buffer, inputs)
    return outcomes


def combine_before_hook(group: Any, place: Place) -> Outcome:
    """Combine with a handle whose rows rank 1 has not received yet."""
    with open_buffer(group, place, timeout_s=8.0) as buffer:
        inputs = Inputs(buffer)
        flight = buffer.low_latency_dispatch(**inputs.dispatch_arguments(), return_hook=True)
        assert flight.hook is not None
        arguments = {"y": flight.x, "handle": flight.handle, "apply_weights": False}
        if buffer.rank != 1:
            flight.hook()
        outcome = attempt(buffer, "low_latency_combine", arguments)
        if buffer.rank == 1:
            flight.hook()
        check_round_trips(buffer, inputs)
    return outcome
