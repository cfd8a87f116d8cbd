# SPDX-License-Identifier: Apache-2.0
"""Turns of low-latency operations: their numbers, and credits that later operations give."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from collective.case import Case
from emulated.build import build_library
from emulated.cluster import Settings
from emulated.host_api import Faults
from emulated.low_latency import LowLatencySession, fly_beside, play, use_small_blocks

from deepcomm import RecvLayout
from deepcomm.config import BufferConfig

pytestmark = pytest.mark.emulated_backend

SEEDS = 6
NUM_TAGS = 2**32 - 1
SMALL = Case(
    num_ranks=2,
    num_tokens=5,
    hidden=64,
    num_topk=3,
    experts_per_rank=2,
    layout=RecvLayout.EXPERT_PADDED,
)
THREE = Case(num_ranks=3, num_tokens=4, hidden=64, layout=RecvLayout.EXPERT_PADDED, wire="fp8")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


@pytest.fixture
def any_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let buffers have fewer slots than callers may ask for."""
    monkeypatch.setattr(BufferConfig, "check", lambda *_: None)


# ---- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_slots", [1, 2, 3, 4, 5, 7, 48, 63, 64])
def test_turns_are_those_of_plain_division(num_slots: int) -> None:
    highs = [*range(4), 0x7FFF, 0xFFFF, 0x10000]  # of what a counter of units can come to
    around = [high * cycle for high in highs for cycle in (2**32, NUM_TAGS)]
    numbers = [1, 2, *(base + step for base in around for step in range(-70, 71))]
    given = np.array([number for number in numbers if number > 0], np.uint64)
    tags, slots = np.zeros(len(given), np.uint32), np.zeros(len(given), np.int32)
    turns = ctypes.CDLL(str(build_library("arithmetic"))).deepcomm_turns
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (given, tags, slots))
    turns(num_slots, ctypes.c_int64(len(given)), *pointers)
    expected = [int(number) - 1 for number in given]
    assert tags.tolist() == [before % NUM_TAGS + 1 for before in expected]
    assert slots.tolist() == [before % num_slots for before in expected]


# ---- credits -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("any_slots")
@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("case", [SMALL, THREE], ids=["small", "three"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_all_slots_in_flight_are_used_again(seed: int, case: Case, num_slots: int) -> None:
    """Each operation needs the slot of the one before its flight, whose credit it gives itself."""

    def body(session: LowLatencySession) -> None:
        for round_idx in range(3):
            flying = [session.low_latency_dispatch(i, return_hook=True) for i in range(num_slots)]
            for one in reversed(flying):
                one.finish()
            back = [session.low_latency_combine(one, return_hook=True) for one in flying]
            for one in back[1:] + back[:1]:
                one.finish()
            joined = session.low_latency_dispatch(round_idx)
            session.low_latency_combine(joined, override=True)

    faults = Faults(delay_rank=seed % 2, delay_from_ns=20_000 * seed, delay_for_ns=300_000)
    settings = Settings(seed, faults if seed % 3 else Faults(), num_sms=1 + seed % 3)
    play(case, body, settings, num_low_latency_slots=num_slots)


@pytest.mark.usefixtures("any_slots")
@pytest.mark.parametrize("num_slots", [1, 3])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_hooks_may_run_beside_later_operations(seed: int, num_slots: int) -> None:
    settings = Settings(seed, num_sms=1 + seed % 3, has_network=True)
    play(SMALL, fly_beside, settings, num_low_latency_slots=num_slots)
