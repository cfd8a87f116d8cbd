# SPDX-License-Identifier: Apache-2.0
"""Every line that orders memory is needed: the emulator catches its removal and its weakening.

Survivors are listed with the reason why nothing can see them; an entry that no longer survives, and
a survivor without an entry, both fail.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import pytest
from emulated.build import Program, Result, build
from emulated.mutants import HIGH_THROUGHPUT, LOW_LATENCY, Mutant, Twin, mutate

pytestmark = pytest.mark.slow

CATCH_WITHIN = 1_000  # seeds
RATE_SEEDS = range(200)

# Who runs what: the cases, by program, that execute a file's lines.
CASES_OF = {
    "device/barrier.cuh": ("probes", ("barrier_fold", "barrier_fold_one_block")),
    "device/epoch.cuh": ("primitives", ("epoch",)),
    "device/group.cuh": ("primitives", ("warp",)),
    "device/wait.cuh": ("primitives", ("record",)),
    "kernels/gin/agent.cuh": ("gin", ("exchange", "reuse")),
    "kernels/probe/barrier_fold.cuh": ("probes", ("barrier_fold",)),
    "kernels/probe/bulk_copy.cuh": ("probes", ("bulk_copy",)),
    "kernels/probe/bulk_put.cuh": ("probes", ("bulk_put",)),
    "kernels/probe/claim.cuh": ("probes", ("claim",)),
    "kernels/probe/ring.cuh": ("probes", ("ring",)),
    "kernels/probe/signal.cuh": ("probes", ("signal",)),
}

PACKET_STORE = "packets_of(params.dst_packets, params, round) + index, packet"

TWINS = [
    Twin(
        "signal: waits for one block too few",
        case="signal",
        path="kernels/probe/signal.cuh",
        find="(round + 1) * block.num_blocks()",
        part="(round + 1) * block.num_blocks()",
        replace="(round + 1) * block.num_blocks() - 1",
    ),
    Twin(
        "signal: counts by load and store",
        case="signal",
        path="kernels/probe/signal.cuh",
        find="device::red_add_release_sys(params.dst_signal, 1u)",
        part="device::red_add_release_sys(params.dst_signal, 1u)",
        replace="device::st_release_sys(params.dst_signal, "
        "device::ld_acquire_sys(params.dst_signal) + 1u)",
    ),
    Twin(
        "claim: never looks",
        case="claim",
        path="kernels/probe/claim.cuh",
        find="device::ld_relaxed_sys(&params.peer_claims[round])",
        part="device::ld_relaxed_sys(&params.peer_claims[round])",
        replace="0u",
    ),
    Twin(
        "claim: looks at its neighbour's",
        case="claim",
        path="kernels/probe/claim.cuh",
        find="&params.peer_claims[round]",
        part="round",
        replace="round ^ 1",
    ),
    Twin(
        "bulk_copy: waits for one warp too few",
        case="bulk_copy",
        path="kernels/probe/bulk_copy.cuh",
        find="params.signal, params.expected_signal",
        part="params.expected_signal",
        replace="params.expected_signal - 6u",
    ),
    Twin(
        "bulk_copy: loads one tile too far ahead",
        case="bulk_copy",
        path="kernels/probe/bulk_copy.cuh",
        find="device::bulk_wait_group_read<kMaxUnread>()",
        part="device::bulk_wait_group_read<kMaxUnread>()",
        replace="device::bulk_wait_group_read<kMaxUnread + 1>()",
    ),
    Twin(
        "bulk_put: waits for one block too few",
        case="bulk_put",
        path="kernels/probe/bulk_put.cuh",
        find="static_cast<uint32_t>(params.num_tiles)",
        part="static_cast<uint32_t>(params.num_tiles)",
        replace="static_cast<uint32_t>(params.num_tiles) - 3u",
    ),
    Twin(
        "bulk_put: never turns the parity",
        case="bulk_put",
        path="kernels/probe/bulk_put.cuh",
        find="static_cast<uint32_t>(index / kNumStages & 1)",
        part="static_cast<uint32_t>(index / kNumStages & 1)",
        replace="0u",
    ),
    Twin(
        "ring: reuses a slot one round early",
        case="ring",
        path="kernels/probe/ring.cuh",
        find="epoch - static_cast<uint32_t>(params.num_slots)",
        part="epoch - static_cast<uint32_t>(params.num_slots)",
        replace="epoch - static_cast<uint32_t>(params.num_slots) - 1u",
    ),
    Twin(
        "ring: reads one round early",
        case="ring",
        path="kernels/probe/ring.cuh",
        find="params.tail, epoch",
        part="epoch",
        replace="epoch - 1u",
    ),
    Twin(
        "barrier: hears the round before",
        case="barrier_fold_one_block",
        path="device/barrier.cuh",
        find="at_peer, word, epoch",
        part="epoch",
        replace="epoch - 1u",
    ),
    Twin(
        "barrier: the last but one block opens it",
        case="barrier_fold",
        path="device/barrier.cuh",
        find="static_cast<uint32_t>(block.num_blocks() - 1)",
        part="static_cast<uint32_t>(block.num_blocks() - 1)",
        replace="static_cast<uint32_t>(block.num_blocks() - 2)",
    ),
    Twin(
        "packet: one copy of the region",
        case="packet",
        path="kernels/probe/packet.cuh",
        find="(round & 1) * params.num_packets",
        part="(round & 1)",
        replace="0u",
    ),
    Twin(
        "packet: the first of the last round is not awaited",
        case="packet",
        path="kernels/probe/packet.cuh",
        find="packet.words[3] == round",
        part="packet.words[3] == round",
        replace="packet.words[3] == round || (index == 0 && round == 5)",
    ),
    Twin(
        "packet: plain stores",
        case="packet",
        path="kernels/probe/packet.cuh",
        find=f"device::st_relaxed_sys({PACKET_STORE})",
        part=f"device::st_relaxed_sys({PACKET_STORE})",
        replace=f"device::st_weak_streaming({PACKET_STORE})",
    ),
    Twin(
        "gin: tells that all is there with the first span",
        case="spans",
        path="kernels/gin/agent.cuh",
        find="is_last = i == peer.num_sends - 1",
        part="i == peer.num_sends - 1",
        replace="i == 0",
        program="gin",
    ),
    Twin(
        "gin: leaves before its sources are read",
        case="exchange",
        path="kernels/gin/agent.cuh",
        find="return await_read(peer.rank, num_puts)",
        part="await_read(peer.rank, num_puts)",
        replace="num_puts > 0",
        program="gin",
    ),
    Twin(
        "gin: leaves before its last source is read",
        case="ways",
        path="kernels/gin/agent.cuh",
        find="(peer.num_receives > 0 ? 1 : 0)",
        part="(peer.num_receives > 0 ? 1 : 0)",
        replace="0",
        program="gin",
    ),
    Twin(
        "gin: takes what the move before has brought",
        case="exchange",
        path="kernels/gin/agent.cuh",
        find="data(peer.rank), peer.num_data",
        part="peer.num_data",
        replace="peer.num_data - 1",
        program="gin",
    ),
    Twin(
        "gin: puts where the move before was to go",
        case="exchange",
        path="kernels/gin/agent.cuh",
        find="ready(peer.rank), peer.num_ready",
        part="peer.num_ready",
        replace="peer.num_ready - 1",
        program="gin",
    ),
    Twin(
        "gin: does not look whose table it is",
        case="other_number",
        path="kernels/gin/agent.cuh",
        find="if (differ(kGinNumber, peer.num_ready, theirs.number)) return false",
        part="differ(kGinNumber, peer.num_ready, theirs.number)",
        replace="false",
        program="gin",
    ),
    Twin(
        "gin: sends after a failure",
        case="abort",
        path="kernels/gin/agent.cuh",
        find="return !has_failed() &&",
        part="has_failed()",
        replace="false",
        program="gin",
    ),
]

# Mutants that nothing can see, and why.
SURVIVORS: dict[str, str] = {
    "kernels/gin/agent.cuh: the table before the network reads it: delete": "a put releases what "
    "its thread has written, as NCCL's does by default",
}


@dataclass(frozen=True)
class Mutated:
    """The mutated programs and what can be switched on in them."""

    mutants: list[Mutant]
    programs: dict[str, Program] = field(default_factory=dict)

    def attack(
        self, program: str, case: str, mutant: Mutant, seeds: range, *options: str
    ) -> Result:
        chosen = ("--mutant", str(mutant.number), *options)
        return self.programs[program].run(case, seeds, *chosen)


@cache
def build_mutated() -> Mutated:
    variant, mutants = mutate(TWINS)
    programs = {name: build(name, variant) for name in ("probes", "primitives", "gin")}
    return Mutated(mutants, programs)


@pytest.fixture(scope="module")
def mutated() -> Mutated:
    return build_mutated()


def find_twin(mutated: Mutated, twin: Twin) -> Mutant:
    return next(mutant for mutant in mutated.mutants if mutant.change == twin.name)


def test_mutated_program_without_a_mutant_is_right(mutated: Mutated) -> None:
    for program in mutated.programs.values():
        for case in program.cases():
            result = program.run(case, range(100))
            assert result.failures == 0, result.explain()


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.name)
def test_twin_is_caught(mutated: Mutated, twin: Twin) -> None:
    mutant = find_twin(mutated, twin)
    seeds = range(CATCH_WITHIN)
    result = mutated.attack(twin.program, twin.case, mutant, seeds, "--until-failure")
    assert result.failures == 1, f"not caught within {CATCH_WITHIN} seeds"


PROTOCOLS = ("signal", "claim", "bulk_copy", "bulk_put", "ring", "barrier_fold", "packet", "gin")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocol_has_a_schedule_dependent_twin(mutated: Mutated, protocol: str) -> None:
    """A twin that some schedules hide shows that the search, not the check alone, finds faults."""
    twins = [twin for twin in TWINS if twin.program == protocol or twin.case.startswith(protocol)]
    rates = {
        twin.name: mutated.attack(
            twin.program, twin.case, find_twin(mutated, twin), RATE_SEEDS
        ).failures
        for twin in twins
    }
    assert any(0 < failures < len(RATE_SEEDS) for failures in rates.values()), rates


def test_every_order_line_has_an_attacker() -> None:
    """The other two attack theirs in test_operation_mutants.py and test_low_latency_mutants.py."""
    for path in {mutant.path for mutant in mutate([])[1]}:
        attackers = (
            path in CASES_OF,
            path.startswith(HIGH_THROUGHPUT),
            path.startswith(LOW_LATENCY),
        )
        assert sum(attackers) == 1, path


def test_every_order_line_matters(mutated: Mutated) -> None:
    survivors: dict[str, str] = {}
    twin_names = {twin.name for twin in TWINS}
    attacked = [
        mutant
        for mutant in mutated.mutants
        if mutant.change not in twin_names and mutant.path in CASES_OF
    ]
    for mutant in attacked:
        program, cases = CASES_OF[mutant.path]
        results = (
            mutated.attack(program, case, mutant, range(CATCH_WITHIN), "--until-failure")
            for case in cases
        )
        if not any(result.failures for result in results):
            survivors[mutant.name] = f"line {mutant.line}"
    assert set(survivors) == set(SURVIVORS), survivors
    assert len(attacked) > 60, "the markers were not found"
