# SPDX-License-Identifier: Apache-2.0
"""What orders low latency over carried rails is needed: on the device, and on the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from collective.case import Case
from emulated.build import PLAIN, Variant
from emulated.cluster import Settings
from emulated.low_latency import LowLatencySession, flights, refusal, use_small_blocks
from emulated.mutants import LOW_LATENCY as FOLDER
from emulated.mutants import Mutant, Twin, mutate
from emulated.test_low_latency import combine_unaware
from emulated.test_low_latency_mutants import goes_wrong

from deepcomm import CommError, InvalidArgument, RecvLayout
from deepcomm.backends.cuda.low_latency_carrier import SlotCarrier

pytestmark = [pytest.mark.emulated_backend, pytest.mark.slow]

MAX_SEEDS = 8
PATHS = (FOLDER + "combine_carried.cuh", FOLDER + "refuse_carried.cuh")
NODES = Case(
    num_ranks=4,
    ranks_per_node=2,
    num_tokens=3,
    hidden=64,
    num_topk=3,
    experts_per_rank=2,
    layout=RecvLayout.EXPERT_PADDED,
    routing="uniform",
    even=True,
)

TWINS = [
    Twin(
        "hears of ranks whose headers are yet to come",
        case="flights",
        path=PATHS[0],
        find="params.source_weights != nullptr ||\n           rank",
        part="params.source_weights != nullptr",
        replace="true",
    ),
    Twin(
        "sums for other nodes whatever its own says",
        case="refusals",
        path=PATHS[0],
        find="find_culprit(base, shared.refusals) != layout::kNoPeer",
        part="find_culprit(base, shared.refusals) != layout::kNoPeer",
        replace="false",
    ),
    Twin(
        "leaves the turn of a combine without a dispatch to the next one",
        case="refusals",
        path=PATHS[0],
        find="finish_send<kPhases>(params, block, shared.peers.turn);\n    }\n    if constexpr",
        part="finish_send<kPhases>(params, block, shared.peers.turn)",
        replace="static_cast<void>(*params.turn = shared.peers.turn)",
    ),
    Twin(
        "refuses without passing on",
        case="refusals",
        path=PATHS[1],
        find="} else if (is_awaited) {\n        pass_on",
        part="is_awaited",
        replace="false",
    ),
]


def refusals(session: LowLatencySession) -> None:
    """Of dispatches, of combines in both ways, and of combines of refused dispatches."""
    refusal(session)
    one = session.low_latency_dispatch(0)
    inputs, is_wrong = session.inputs(1), session.rank == 1
    y, handle, rank = one.actual.x, one.actual.handle, session.rank
    for weights in (None, inputs.weights[rank]):
        with pytest.raises((InvalidArgument, CommError)):
            session.buffer.low_latency_combine(
                y[:1] if is_wrong else y,
                handle,
                topk_weights=weights,
                apply_weights=weights is not None,
            )
    ids = inputs.ids[rank].clone()
    if is_wrong:
        ids[0] = 99
    with pytest.raises((InvalidArgument, CommError)):
        combine_unaware(session, inputs.xs[rank], ids, False, [])
    for round_idx in range(4):
        session.low_latency_combine(session.low_latency_dispatch(round_idx), override=True)


SCENES: dict[str, Callable[[LowLatencySession], None]] = {"flights": flights, "refusals": refusals}


@cache
def build_mutated() -> tuple[Variant, list[Mutant]]:
    return mutate(TWINS)


def fails(name: str, seed: int, variant: Variant, mutant: int = 0) -> bool:
    """Whether a scene notices a mutant under one schedule."""
    options: dict[str, Any] = {"num_low_latency_slots": 3, "rail": "nccl"}
    settings = Settings(seed, variant=variant, mutant=mutant, num_sms=1 + seed % 3)
    return goes_wrong(NODES, SCENES[name], settings, **options)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


@pytest.mark.parametrize("name", SCENES)
def test_scene_without_a_mutant_is_right(name: str) -> None:
    variant = build_mutated()[0]
    assert [seed for seed in range(MAX_SEEDS) if fails(name, seed, variant)] == []


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.name)
def test_twin_is_caught(twin: Twin) -> None:
    variant, mutants = build_mutated()
    (number,) = (mutant.number for mutant in mutants if mutant.change == twin.name)
    assert any(fails(twin.case, seed, variant, number) for seed in range(MAX_SEEDS))


def test_every_order_line_matters() -> None:
    variant, mutants = build_mutated()
    names = {twin.name for twin in TWINS}
    attacked = [m for m in mutants if m.path in PATHS and m.change not in names]
    survivors = {
        mutant.name: f"line {mutant.line}"
        for mutant in attacked
        if not any(
            fails(name, seed, variant, mutant.number)
            for seed in range(MAX_SEEDS)
            for name in SCENES
        )
    }
    assert survivors == {}
    assert len(attacked) >= 6, "the markers were not found"


# ---- the host's part ---------------------------------------------------------------------------


def without_waiting(carrier: SlotCarrier, operation: Any, arrived: Any) -> None:
    """Receive beside the network, not behind it."""
    del arrived
    carrier._place.runtime.launch(*operation.plan.launches[2], operation.params)


def moves_at_once(carrier: SlotCarrier, slot: int, num_bytes: int) -> Any:
    """Let the network begin before what it carries has been written."""
    runtime = carrier._place.runtime
    with runtime.on_side():
        carrier._network.move(carrier._messages(slot, num_bytes))
        return runtime.record_event()


def mirror_of_another_slot(carrier: SlotCarrier, slot: int, peer: int) -> int:
    """Carry what is in the mirror of the slot before."""
    node = peer // carrier._place.topology.ranks_per_node
    index = node - (node > carrier._place.topology.node)
    return carrier._local + int(carrier._map.mirror_offset((slot + 2) % 3 if slot else 0, index))


HOST_TWINS: dict[str, Any] = {
    "receive": without_waiting,
    "_carry": moves_at_once,
    "_mirror": mirror_of_another_slot,
}


@pytest.mark.parametrize("name", HOST_TWINS)
def test_twin_of_the_host_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotCarrier, name, HOST_TWINS[name])
    assert any(fails("flights", seed, PLAIN) for seed in range(MAX_SEEDS))
