# SPDX-License-Identifier: Apache-2.0
"""Ranks that go on without one that was killed."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from collective.case import Case
from collective.session import Session
from trap.faults import kill
from trap.rounds import gather


@dataclass(frozen=True)
class Survival:
    """What a survivor saw: whom it masks, and how long the first operations without it took."""

    mask: list[bool]
    seconds: float
    pid: int


def outlive(group: Any, case: Case, victim: int) -> Survival:
    """Kill the victim between operations; the others mask it and stay equal to the reference."""
    tolerant, masked = {"on_timeout": "mask"}, {victim}
    with Session(group, case) as session:
        session.low_latency_combine(session.low_latency_dispatch(0, **tolerant))
        gather(group, None)
        if session.rank == victim:
            kill()
        start = time.monotonic()
        for round_idx in (1, 2, 3):
            one = session.low_latency_dispatch(round_idx, masked=masked, **tolerant)
            session.low_latency_combine(one, masked=masked, **tolerant)
        seconds = time.monotonic() - start
        return Survival(session.buffer.rank_mask().tolist(), seconds, os.getpid())
