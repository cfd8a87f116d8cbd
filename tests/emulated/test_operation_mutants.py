# SPDX-License-Identifier: Apache-2.0
"""Every line of the high-throughput kernels that orders memory is needed, or says why not here."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from emulated.attack import Attack, Attackers
from emulated.mutants import HIGH_THROUGHPUT, Mutant, marked_files, mutate
from emulated.operations import SCENARIOS

pytestmark = pytest.mark.emulated_backend

MARKED = [path for folder in HIGH_THROUGHPUT for path in marked_files(folder)]
NEEDS_NETWORK = ("kernels/rail/", "kernels/dispatch/landed.cuh")
NUM_ATTACKERS = 2
MAX_ROUNDS = 12
"""Of all scenarios, before a mutant counts as a survivor."""
CLEAN_ROUNDS = 4

# Mutants that nothing can see, and why.
READ_BEFORE = (
    "every thread has read it before the barriers of the meeting; this one agrees on failure"
)
SYNCS_OF_PIPE = (
    "the pipe synchronises the warp between two tokens, and an announcement begins so too"
)
LOOKS_ON = (
    "a gate whose stage is over looks on for 20 us, in which the emulator shows it the words; PTX "
    "does not promise that"
)
FOR_THE_HOST = "the host reads after the kernel's end, which publishes as well"
SURVIVORS = {
    "kernels/dispatch/count.cuh: every thread has read the epoch: delete": READ_BEFORE,
    "kernels/dispatch/kernel.cuh: every thread has read epoch and round: delete": READ_BEFORE,
    "kernels/dispatch/count_exchange.cuh: the sums before their publication: delete": (
        "publish_counts and await_headers begin with barriers of their own"
    ),
    "kernels/dispatch/count_exchange.cuh: all of it before the header; who sets a flag has seen "
    "that: delete": (
        "who sets a flag has also seen counts that the leader stored after the zeros, and the "
        "emulator lets no store pass another of its thread; nothing refuses for an earlier one"
    ),
    "kernels/dispatch/expand.cuh: the scales before other lanes read them: delete": (
        "copy_words gives each lane the words that it has loaded itself"
    ),
    "kernels/dispatch/expand.cuh: landed rows are read by bulk loads; pairs with the fence of "
    "their announcer: delete": (
        "bulk copies have stored them, too: the emulator asks for no fence between the wait and "
        "the loads then, PTX does"
    ),
    "kernels/dispatch/expand.cuh: the copies are complete when the kernel ends: bulk_wait_group<0> "
    "-> bulk_wait_group_read<0>": "no other rank reads them, and the kernel's end awaits them too",
    "kernels/dispatch/expand.cuh: the copies are complete when the kernel ends: bulk_wait_group<0> "
    "-> bulk_wait_group<1>": (
        "the arrival behind it takes longer than the copy that is not awaited; one round in many "
        "sees that"
    ),
    "kernels/dispatch/kernel.cuh: the mbarriers before the lanes that wait at them: delete": (
        "the meeting's barriers stand between"
    ),
    "kernels/dispatch/landed.cuh: rows that a network has stored, then bulk loads: delete": (
        "a kernel of the network has stored them, and the emulator lets every proxy see what a "
        "kernel has written once that has ended; PTX does not say so of kernels that began before"
    ),
    "kernels/dispatch/lost.cuh: all words before the block goes on: delete": (
        "nothing after it depends on the words; it lets the block leave as one where one does not "
        "come, and no scenario of several nodes runs out of time"
    ),
    "kernels/dispatch/send.cuh: the counts before other lanes add to them or announce them: "
    "delete": SYNCS_OF_PIPE,
    "kernels/dispatch/send.cuh: the counts are read before they start again: delete": SYNCS_OF_PIPE,
    **{
        "kernels/meet/meet.cuh: the fields above; pairs with the host's acquire of kComplete: "
        f"st_release_sys -> {weaker}": FOR_THE_HOST
        for weaker in ("st_relaxed_sys", "st_release_gpu")
    },
    "kernels/meet/meet.cuh: what the stage has written; pairs with the acquire of the gate: "
    "st_release_gpu -> st_relaxed_gpu": LOOKS_ON,
    "kernels/rail/gate.cuh: the words of an ended stage; pairs with end_stage: "
    "ld_acquire_gpu -> ld_relaxed_gpu": LOOKS_ON,
}


@pytest.fixture(scope="module")
def attackers() -> Iterator[Attackers]:
    attackers = Attackers(mutate([])[0], NUM_ATTACKERS)
    yield attackers
    attackers.close()


def attack(attackers: Attackers, name: str, mutant: int, first: int, count: int) -> str:
    """Attack with rounds first .. first + count of a scenario."""
    at_once = SCENARIOS[name].seeds_at_once
    return attackers.run(Attack(name, mutant, first * at_once, count * at_once))


def is_caught(attackers: Attackers, mutant: Mutant, rounds: int) -> bool:
    return any(
        attack(attackers, name, mutant.number, one, 1)
        for one in range(rounds)
        for name in scenarios_of(mutant.path)
    )


def scenarios_of(path: str) -> list[str]:
    """Return the scenarios that run a file: those of its own are enough for what networks need."""
    needs_network = path.startswith(NEEDS_NETWORK)
    return [name for name, one in SCENARIOS.items() if one.has_network or not needs_network]


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_without_a_mutant_is_right(attackers: Attackers, name: str) -> None:
    assert attack(attackers, name, 0, 0, CLEAN_ROUNDS) == ""


@pytest.mark.parametrize("path", MARKED)
def test_every_order_line_matters(attackers: Attackers, path: str, survivor_rounds: int) -> None:
    mutants = [one for one in mutate([])[1] if one.path == path]
    with ThreadPoolExecutor(NUM_ATTACKERS) as pool:
        caught = pool.map(
            lambda one: is_caught(
                attackers, one, survivor_rounds if one.name in SURVIVORS else MAX_ROUNDS
            ),
            mutants,
        )
        survivors = {
            one.name: f"line {one.line}"
            for one, is_seen in zip(mutants, caught, strict=True)
            if not is_seen
        }
    assert set(survivors) == {name for name in SURVIVORS if name.startswith(path)}, survivors
    assert mutants, "the markers were not found"


def test_survivors_are_of_marked_files() -> None:
    assert {name.partition(":")[0] for name in SURVIVORS} <= set(MARKED)
