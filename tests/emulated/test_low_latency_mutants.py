# SPDX-License-Identifier: Apache-2.0
"""Every line of the low-latency kernels that orders memory is needed; broken twins are caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
from collective.case import Case
from emulated.build import Variant
from emulated.cluster import Settings
from emulated.low_latency import (
    COUNTED_IN_TURNS,
    LowLatencySession,
    combine_what_cancels,
    flights,
    fly_beside,
    leave_unread,
    play,
    refusal,
    refuse_in_flight,
    use_small_blocks,
)
from emulated.mutants import LOW_LATENCY as FOLDER
from emulated.mutants import Mutant, Twin, marked_files, mutate

from deepcomm import RecvLayout

pytestmark = pytest.mark.emulated_backend

PADDED = RecvLayout.EXPERT_PADDED
MAX_SEEDS = 12
RATE_SEEDS = range(16)
SMALL = {"num_ranks": 2, "num_tokens": 5, "hidden": 64, "num_topk": 3, "experts_per_rank": 2}
CASE = Case(**SMALL, layout=PADDED, wire="fp8")

TWINS = [
    Twin(
        "sends a slot's next turn too early",
        case="flights",
        path=FOLDER + "peers.cuh",
        find="received + static_cast<uint64_t>(params.map.num_slots) >= turn.number",
        part="received + static_cast<uint64_t>(params.map.num_slots) >= turn.number",
        replace="true",
    ),
    Twin(
        "gives credit for its own turn only at home",
        case="flights",
        path=FOLDER + "common.cuh",
        find="unsigned char* base = params.credit_bases[peer];\n    if (base == nullptr)",
        part="params.credit_bases[peer]",
        replace="params.local + 0 * peer",
    ),
    Twin(
        "takes a packet of any turn",
        case="flights",
        path=FOLDER + "packets.cuh",
        find="range.num && Format::observe(packets[i], tag) != tag",
        part="Format::observe(packets[i], tag) != tag",
        replace="packets[i].words[3] == 0",
    ),
    Twin(
        "leaves packets that it has read",
        case="flights",
        path=FOLDER + "packets.cuh",
        find="if (index < range.num) Format::clear(range.packets + index);",
        part="index < range.num",
        replace="index > range.num",
    ),
    Twin(
        "leaves rows that nobody has read",
        case="apart",
        path=FOLDER + "unread.cuh",
        find="for (int64_t i = warp.thread_idx(); i < num; i += warp.size())",
        part="i < num",
        replace="i < 0",
    ),
    Twin(
        "gives credit for rows that nobody has read",
        case="refusal",
        path=FOLDER + "common.cuh",
        find="if (noted == number) credit |= layout::kUnread;",
        part="noted == number",
        replace="noted == number + 1",
    ),
    Twin(
        "counts a source's own tokens before it",
        case="late",
        path=FOLDER + "dispatch_rows.cuh",
        find="if (begin + i < source)",
        part="begin + i < source",
        replace="begin + i <= source",
    ),
    Twin(
        "trusts a header of any turn",
        case="flights",
        path=FOLDER + "packets.cuh",
        find="*packet = device::ld_relaxed_sys(address);\n        return {packet->words[3], "
        "packet->words[3] == tag};\n    });\n}\n\n/// Packets that bring",
        part="packet->words[3] == tag",
        replace="packet->words[3] != 0",
    ),
]

NODES_TWINS = [
    Twin(
        "gives no credit along the rail",
        case="nodes",
        path=FOLDER + "common.cuh",
        find="if (base == nullptr) return;\n    const int64_t offset = params.map.credit",
        part="base == nullptr",
        replace="peer / params.map.ranks_per_node != params.node_idx",
    ),
    Twin(
        "passes packets on before they are here",
        case="nodes",
        path=FOLDER + "dispatch_forward.cuh",
        find="arrival = batch.wait(base, site, payload, first, turn.tag);",
        part="batch.wait(base, site, payload, first, turn.tag)",
        replace="Arrival::kHere",
    ),
    Twin(
        "adds the sum of its own node before those of other nodes",
        case="nodes-three",
        path=FOLDER + "combine_forward.cuh",
        find="stage == kBefore && num_before >= params.node_idx",
        part="num_before >= params.node_idx",
        replace="true",
    ),
]

# Mutants that nothing can see, and why.
FOR_THE_HOST = "the host reads after the kernel's end, which publishes as well"
NO_LOAD_COMES_LATER = (
    "slots are read by loads, which the model never performs later than they are written"
)
OWN_STORES_IN_ORDER = "the model performs a thread's stores to memory of its rank in their order"
CLEARED_IN_BETWEEN = (
    "rows are cleared in between, while a store is on its way for less in the model"
)
IN_A_HOOK_BESIDE = (
    "it takes a hook, on a stream of its own, of an operation that is refused, and whose sender "
    "has come to the slot's next operation before one thread has copied 191 bytes"
)
SURVIVORS: dict[str, str] = {
    f"{FOLDER}unread.cuh: cleared rows before the peer's new ones: delete": OWN_STORES_IN_ORDER,
    f"{FOLDER}unread.cuh: cleared rows, to the blocks that wait: "
    "st_release_gpu -> st_relaxed_gpu": OWN_STORES_IN_ORDER,
    f"{FOLDER}unread.cuh: pairs with the release in settle_rows: cleared rows before new ones: "
    "ld_acquire_gpu -> ld_relaxed_gpu": OWN_STORES_IN_ORDER,
    f"{FOLDER}common.cuh: what peers are told now before what they are told then: "
    "delete": CLEARED_IN_BETWEEN,
    f"{FOLDER}common.cuh: what a lane has acquired, to the lanes that tell of it: "
    "delete": NO_LOAD_COMES_LATER,
    f"{FOLDER}combine_receive.cuh: the refusal's text has been read, and what is left unread is "
    "noted: delete": IN_A_HOOK_BESIDE,
    f"{FOLDER}dispatch_receive.cuh: the refusal's text has been read, and what is left unread is "
    "noted: delete": IN_A_HOOK_BESIDE,
} | {
    f"{FOLDER}refusal.cuh: the fields; pairs with the host's acquire of kComplete: "
    f"st_release_sys -> {weaker}": FOR_THE_HOST
    for weaker in ("st_relaxed_sys", "st_release_gpu")
}


# Whose lines test_low_latency_rail_mutants.py breaks.
OF_A_NETWORK = (FOLDER + "combine_carried.cuh", FOLDER + "refuse_carried.cuh")

# Of lines that one node has no use for.
NOTES_OF_NODES = {
    "the peers are found",
    "who is masked, to all",
    "the staged part is free again",
    "the staged part before its packets",
    "who is masked has been read, and may change",
    "who takes part, and what they say, to all",
    "what the headers say, to all",
}

# Files with lines that one node has a use for.
MARKED = [
    path
    for path, notes in marked_files(FOLDER).items()
    if path not in OF_A_NETWORK and not notes <= NOTES_OF_NODES
]


def count_in_turns(session: LowLatencySession) -> None:
    """More tokens than there is room to count at once, of so many experts."""
    session.low_latency_dispatch(0)


def late(session: LowLatencySession) -> None:
    """One rank does not come any more; the others mask it."""
    one = session.low_latency_dispatch(0, on_timeout="mask")
    session.low_latency_combine(one, on_timeout="mask")
    if session.rank == 2:
        session.group.barrier()
        return
    one = session.low_latency_dispatch(1, masked={2}, on_timeout="mask")
    session.low_latency_combine(one, masked={2}, on_timeout="mask")
    session.group.barrier()


def late_in_nodes(session: LowLatencySession) -> None:
    """The last rank does not come to a combine any more, nor to what follows."""
    absent = session.case.num_ranks - 1
    one = session.low_latency_dispatch(0, on_timeout="mask")
    options: dict[str, Any] = {"masked": {absent}, "on_timeout": "mask"}
    if session.rank != absent:
        session.low_latency_combine(one, override=True, **options)
        two = session.low_latency_dispatch(1, **options)
        session.low_latency_combine(two, carried=True, apply_weights=False, **options)
    session.group.barrier()


def apart(session: LowLatencySession) -> None:
    """One rank sends in vain to the others, and is taken back where they come to the same slot."""
    for loses_sums in (False, True):
        leave_unread(session, 1, 3, loses_sums)


@dataclass(frozen=True)
class Scene:
    """What mutants are tried on.

    Attributes:
        has_streams: Whether ranks have two.
    """

    case: Case
    body: Callable[[LowLatencySession], None]
    has_streams: bool = False


SCENES = {
    "flights": Scene(CASE, flights),
    "beside": Scene(CASE, fly_beside, has_streams=True),
    "refusal": Scene(CASE, refusal),
    "late": Scene(Case(num_ranks=3, num_tokens=4, hidden=64, layout=PADDED), late),
    "apart": Scene(Case(num_ranks=3, num_tokens=4, hidden=64, layout=PADDED), apart),
    "in-flight": Scene(
        Case(num_ranks=3, num_tokens=4, even=True, hidden=64, layout=PADDED),
        lambda session: refuse_in_flight(session, None),
    ),
    "words": Scene(COUNTED_IN_TURNS, count_in_turns),
}
NODES = Case(
    **{**SMALL, "num_ranks": 4, "num_tokens": 3},
    ranks_per_node=2,
    layout=PADDED,
    routing="uniform",
)
NODES_SCENES = {
    "nodes": Scene(NODES, flights),
    "nodes-refusal": Scene(NODES, refusal),
    "nodes-late": Scene(NODES, late_in_nodes),
    "nodes-three": Scene(replace(NODES, num_ranks=6, num_topk=6), combine_what_cancels),
}


@cache
def build_mutated() -> tuple[Variant, list[Mutant]]:
    return mutate(TWINS + NODES_TWINS)


def goes_wrong(
    case: Case, body: Callable[[LowLatencySession], None], settings: Settings, **options: Any
) -> bool:
    """Whether anything does: a race, a deadlock, wrong results, a time-out all count."""
    try:
        play(case, body, settings, **options)
    except (Exception, pytest.fail.Exception):  # noqa: BLE001
        return True
    return False


def fails(name: str, mutant: int, seed: int) -> bool:
    """Whether a scene notices a mutant under one schedule."""
    scene = (SCENES | NODES_SCENES)[name]
    options: dict[str, Any] = {"num_low_latency_slots": 3}
    settings = Settings(
        seed,
        variant=build_mutated()[0],
        mutant=mutant,
        num_sms=2 + 3 * (seed % 4),
        has_network=scene.has_streams,
    )
    return goes_wrong(scene.case, scene.body, settings, **options)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


@pytest.mark.parametrize("name", SCENES)
def test_scene_without_a_mutant_is_right(name: str) -> None:
    assert [seed for seed in range(MAX_SEEDS) if fails(name, 0, seed)] == []


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.name)
def test_twin_is_caught(twin: Twin) -> None:
    (mutant,) = (mutant for mutant in build_mutated()[1] if mutant.change == twin.name)
    assert any(fails(twin.case, mutant.number, seed) for seed in range(MAX_SEEDS))


def test_a_twin_depends_on_the_schedule() -> None:
    """A twin that some schedules hide shows that the search, not the check alone, finds faults."""
    numbers = [one.number for one in build_mutated()[1] if one.change in {t.name for t in TWINS}]
    rates = [sum(fails("flights", number, seed) for seed in RATE_SEEDS) for number in numbers]
    assert any(0 < rate < len(RATE_SEEDS) for rate in rates), rates


@cache
def attacked_lines() -> list[Mutant]:
    """Return the mutants of lines that one node has a use for."""
    names = {twin.name for twin in TWINS + NODES_TWINS}
    return [
        mutant
        for mutant in build_mutated()[1]
        if mutant.path in MARKED
        and mutant.change not in names
        and mutant.note not in NOTES_OF_NODES
    ]


@pytest.mark.parametrize("path", MARKED)
def test_every_order_line_matters(path: str) -> None:
    survivors = {
        mutant.name: f"line {mutant.line}"
        for mutant in attacked_lines()
        if mutant.path == path
        and not any(
            fails(name, mutant.number, seed) for seed in range(MAX_SEEDS) for name in SCENES
        )
    }
    assert set(survivors) == {name for name in SURVIVORS if name.startswith(path)}, survivors


def test_markers_are_found() -> None:
    assert len(attacked_lines()) >= 25
    assert {mutant.path for mutant in attacked_lines()} == set(MARKED)
    assert set(SURVIVORS) <= {mutant.name for mutant in attacked_lines()}


@pytest.mark.slow  # kernels of several nodes, mutated
@pytest.mark.parametrize("twin", NODES_TWINS, ids=lambda twin: twin.name)
def test_twin_of_nodes_is_caught(twin: Twin) -> None:
    test_twin_is_caught(twin)


@pytest.mark.slow
def test_every_order_line_of_nodes_matters() -> None:
    assert [
        (name, seed) for name in NODES_SCENES for seed in range(MAX_SEEDS) if fails(name, 0, seed)
    ] == []
    attacked = [
        mutant
        for mutant in build_mutated()[1]
        if mutant.path.startswith(FOLDER)
        and mutant.note in NOTES_OF_NODES
        and mutant.path not in OF_A_NETWORK
    ]
    survivors = {
        mutant.name: f"line {mutant.line}"
        for mutant in attacked
        if not any(
            fails(name, mutant.number, seed) for seed in range(MAX_SEEDS) for name in NODES_SCENES
        )
    }
    assert survivors == {}
    assert {mutant.note for mutant in attacked} == NOTES_OF_NODES
