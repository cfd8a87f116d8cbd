# SPDX-License-Identifier: Apache-2.0
"""What ranks that are threads do when one of them does not come or leaves."""

from __future__ import annotations

from typing import Any

from trap.rounds import (
    OPERATIONS,
    Inputs,
    Outcome,
    Place,
    arguments_of,
    attempt,
    gather,
    open_buffer,
)

VICTIM = 1
TIMEOUT_S = 0.6


def run_without_victim(group: Any, place: Place, operation: str) -> list[Outcome]:
    """Call an operation that the victim does not join; then every operation."""
    with open_buffer(group, place, timeout_s=TIMEOUT_S, late_warning_s=TIMEOUT_S / 4) as buffer:
        inputs = Inputs(buffer)
        valid = {name: arguments_of(buffer, name, inputs) for name in OPERATIONS}
        gather(group, None)
        outcomes = []
        if buffer.rank != VICTIM:
            outcomes = [attempt(buffer, name, valid[name]) for name in (operation, *OPERATIONS)]
        gather(group, None)
    return outcomes


def run_beside_closed_buffer(group: Any, place: Place, operation: str) -> list[Outcome]:
    """Call an operation while the victim closes its buffer; the victim calls it afterwards."""
    with open_buffer(group, place) as buffer:
        arguments = arguments_of(buffer, operation, Inputs(buffer))
        gather(group, None)
        if buffer.rank == VICTIM:
            buffer.close()
        return [attempt(buffer, operation, arguments)]
