# SPDX-License-Identifier: Apache-2.0
"""The header of a low-latency dispatch counts tokens in turns: as many as their marks have room."""

from __future__ import annotations

from dataclasses import replace

import pytest
from collective.case import Case
from emulated.cluster import Settings
from emulated.low_latency import COUNTED_IN_TURNS, LowLatencySession, play, use_small_blocks

from deepcomm import CommError, InvalidArgument, RecvLayout

pytestmark = pytest.mark.emulated_backend

TOKEN, _, PADDED = RecvLayout
CASES = [
    COUNTED_IN_TURNS,
    replace(COUNTED_IN_TURNS, layout=TOKEN),
    replace(COUNTED_IN_TURNS, num_tokens=64),
    replace(COUNTED_IN_TURNS, num_tokens=5, num_topk=12, experts_per_rank=8),
    replace(COUNTED_IN_TURNS, num_tokens=37, num_topk=3, experts_per_rank=7),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("seed", range(2))
def test_counts_equal_the_reference(case: Case, seed: int) -> None:
    def body(session: LowLatencySession) -> None:
        for use_hook in (False, True):
            one = session.low_latency_dispatch(seed, return_hook=use_hook)
            one.finish()
            session.low_latency_combine(one)

    play(case, body, Settings(seed))


@pytest.mark.parametrize("token", [0, 63, 64, 69])
def test_wrong_ids_are_named_whichever_turn_counts_them(token: int) -> None:
    def body(session: LowLatencySession) -> None:
        inputs = session.inputs(1)
        ids = inputs.ids[session.rank].clone()
        ids[:, 0], ids[:, 1] = 511, -1
        error, text = CommError, "rank 0 refused"
        if session.rank == 0:
            ids[token, 1] = 511
            error, text = InvalidArgument, rf"distinct ids in a row, got 511 at \[{token}, 1\]"
        with pytest.raises(error, match=text):
            session.buffer.low_latency_dispatch(inputs.xs[session.rank], ids)
        session.low_latency_combine(session.low_latency_dispatch(2))

    play(COUNTED_IN_TURNS, body)
