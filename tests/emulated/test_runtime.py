# SPDX-License-Identifier: Apache-2.0
"""The emulated ``Runtime``: kernels that ranks as threads launch, by the protocol's calls."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from emulated.cluster import EmulatedCluster, EmulatorError, RankStopped, Settings
from emulated.host_api import Faults
from emulated.runtime import EmulatedMemory, EmulatedRuntime, run_emulated
from gpu import params
from gpu.launch import ERROR_RECORD
from gpu.probes import fold, payload

from deepcomm.testing import LocalGroup

SEEDS = 20
NUM_WORDS, NUM_SLOTS, NUM_ROUNDS = 48, 2, 6
TIMEOUT_NS = 1_000_000_000
RECORD_BYTES = 64
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Params:
    """A ctypes struct as ``KernelParams``."""

    struct: ctypes.Structure

    @property
    def address(self) -> int:
        return ctypes.addressof(self.struct)

    @property
    def num_bytes(self) -> int:
        return ctypes.sizeof(self.struct)


def neighbours(group: LocalGroup) -> tuple[int, int]:
    return (group.rank + 1) % group.size, (group.rank - 1) % group.size


def probe(group: LocalGroup, record: EmulatedMemory, num_rounds: int) -> params.ProbeParams:
    dst, src = neighbours(group)
    return params.ProbeParams(
        group.rank, dst, src, num_rounds, NUM_WORDS, TIMEOUT_NS, record.device_address
    )


class Ring:
    """probe_ring on symmetric memory: any number of launches, each going on where one ended."""

    TAIL, HEAD, SLOTS = 0, 128, 256

    def __init__(self, group: LocalGroup) -> None:
        self.group = group
        self.runtime: EmulatedRuntime = group.runtime
        self.memory = self.runtime.symmetric_memory(
            group, 256 + NUM_SLOTS * NUM_WORDS * 4, TIMEOUT_S
        )
        self.record = self.runtime.host_memory(RECORD_BYTES)
        self.kernel = self.runtime.load("probe_ring", {})
        self.folds = torch.zeros(NUM_ROUNDS, NUM_WORDS, dtype=torch.int32)
        self.first = 0

    def launch(self) -> None:
        dst, src = neighbours(self.group)
        at, to, back = (self.memory.bases[rank] for rank in (self.group.rank, dst, src))
        struct = params.RingParams(
            probe(self.group, self.record, NUM_ROUNDS),
            self.first,
            *(to + self.SLOTS, to + self.TAIL, at + self.HEAD),
            *(at + self.SLOTS, at + self.TAIL, back + self.HEAD),
            self.folds.data_ptr(),
            NUM_SLOTS,
        )
        self.runtime.launch_block(self.kernel, 2, 64, Params(struct))
        self.first += NUM_ROUNDS

    def check(self) -> None:
        rounds = np.arange(NUM_ROUNDS)[:, None]
        words = payload(neighbours(self.group)[1], rounds, np.arange(NUM_WORDS))
        expected = fold(words, self.first - NUM_ROUNDS + rounds + 1)
        assert np.array_equal(self.folds.numpy().view(np.uint32), expected)


def play_ring(group: LocalGroup, num_launches: int = 3) -> int:
    ring = Ring(group)
    for _ in range(num_launches):
        ring.launch()
        ring.runtime.flush()
        ring.check()
    return ring.first


@pytest.mark.parametrize("seed", range(SEEDS))
def test_runtime_keeps_memory_and_knowledge_between_launches(seed: int) -> None:
    assert run_emulated(play_ring, 3, Settings(seed)) == [3 * NUM_ROUNDS] * 3


# ---- what goes wrong


def test_runtime_reports_a_race_on_every_rank_with_seed_and_replay() -> None:
    def forget_the_credit(group: LocalGroup) -> str:
        ring = Ring(group)
        ring.launch()
        ring.runtime.flush()
        ring.first -= 1  # as if the peer had freed a slot more than it has
        ring.launch()
        with pytest.raises(EmulatorError) as caught:
            ring.runtime.flush()
        return str(caught.value)

    messages = run_emulated(forget_the_credit, 2, Settings(seed=7, replay="pytest that"))
    assert len(set(messages)) == 1
    assert messages[0].startswith("seed 7: race: ")
    assert ":symmetric+0x" in messages[0]
    assert messages[0].endswith("replay: pytest that")


def test_runtime_checks_tensors_of_the_host_while_kernels_use_them() -> None:
    shared = torch.zeros(NUM_ROUNDS, NUM_WORDS, dtype=torch.int32)

    def share_output(group: LocalGroup) -> None:
        ring = Ring(group)
        ring.folds = shared
        ring.launch()
        ring.runtime.flush()

    with pytest.raises(EmulatorError, match="race: write of memory of the host by r"):
        run_emulated(share_output, 2)

    def take_turns(group: LocalGroup) -> None:
        ring = Ring(group)
        own = ring.folds
        for turn in range(3):
            ring.folds = shared if turn == group.rank else own
            ring.launch()
            ring.runtime.flush()
            group.barrier()

    for seed in range(SEEDS):
        run_emulated(take_turns, 3, Settings(seed))


def test_runtime_frees_memory_after_the_kernels_launched_before() -> None:
    def free_record(group: LocalGroup) -> None:
        ring = Ring(group)
        ring.launch()
        address = ring.record.device_address
        ring.record = None  # type: ignore[assignment]
        ring.runtime.flush()
        group.barrier()
        ring.record = SimpleNamespace(device_address=address)  # type: ignore[assignment]
        ring.launch()
        ring.runtime.flush()

    pattern = r"(?s)out of bounds: (read|write) of host:r\d:test_runtime:\d+\+0x0 by r"
    for seed in range(5):
        with pytest.raises(EmulatorError, match=pattern):
            run_emulated(free_record, 2, Settings(seed))


def test_runtime_checks_the_size_of_the_arguments() -> None:
    def launch_with_less(group: LocalGroup) -> None:
        function = group.runtime.load("probe_ring", {})
        group.runtime.launch(function, 2, Params(params.ProbeParams()))

    with pytest.raises(TypeError, match="probe_ring: expected 112 bytes of arguments, got 40"):
        run_emulated(launch_with_less, 1)


# ---- waiting


def record_of(ring: Ring) -> dict[str, int]:
    record = np.frombuffer(ctypes.string_at(ring.record.address, RECORD_BYTES), ERROR_RECORD)[0]
    return {name: int(record[name]) for name in ("state", "kind", "role", "peer")}


RECEIVE = {"state": 2, "kind": 0, "role": 2}


def wait_for_nothing(group: LocalGroup) -> tuple[bool, int, dict[str, int]]:
    """Wait for a word that nobody writes, while rank 1 launches nothing."""
    ring = Ring(group)
    word = ring.runtime.host_memory(8)
    if group.rank != 1:
        ring.launch()
    result = ring.runtime.wait_word(word.address, 1, ring.record.address, 5.0)
    return result, ring.runtime.now_ns(), record_of(ring)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_runtime_wait_ends_with_a_failure_or_its_time(seed: int) -> None:
    results = run_emulated(wait_for_nothing, 3, Settings(seed))
    assert [result for result, _, _ in results] == [False] * 3
    # Rank 2 hears nothing from rank 1. Rank 0 has rank 2's rounds, but no credits of rank 1.
    assert results[2][2] == RECEIVE | {"peer": 1}
    assert results[0][2] == RECEIVE | {"peer": 1, "role": 1}
    assert TIMEOUT_NS <= min(results[rank][1] for rank in (0, 2)) < 2 * TIMEOUT_NS
    assert results[1][1] >= 5_000_000_000
    assert results[1][2]["state"] == 0


def play_signal(group: LocalGroup) -> None:
    """probe_signal whose signal the host polls."""
    runtime = group.runtime
    kernel = runtime.load("probe_signal", {})
    rows = runtime.symmetric_memory(group, NUM_ROUNDS * NUM_WORDS * 4, TIMEOUT_S)
    signal, record = runtime.host_memory(8), runtime.host_memory(RECORD_BYTES)
    signals = group.all_gather(signal.device_address)
    dst, src = neighbours(group)
    sums = torch.zeros(NUM_ROUNDS, 2, dtype=torch.int32)
    struct = params.SignalParams(
        probe(group, record, NUM_ROUNDS),
        *(rows.bases[dst], signals[dst], rows.bases[group.rank], signals[group.rank]),
        sums.data_ptr(),
    )
    runtime.launch_block(kernel, 2, 32, Params(struct))
    if group.rank == 0:
        group.barrier()  # while the others wait for what it has launched
    assert runtime.wait_word(signal.address, 2 * NUM_ROUNDS, record.address, 1.0)
    if group.rank != 0:
        group.barrier()
    runtime.flush()
    sent = payload(src, np.arange(NUM_ROUNDS)[:, None], np.arange(NUM_WORDS))
    expected = sent.astype(np.uint64).sum(axis=1).astype(np.uint32)
    assert np.array_equal(sums.numpy().view(np.uint32), np.repeat(expected[:, None], 2, 1))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_runtime_word_is_seen_while_others_are_in_the_control_plane(seed: int) -> None:
    run_emulated(play_signal, 3, Settings(seed))


def test_runtime_rank_that_fails_leaves_its_peers_to_their_deadlines() -> None:
    peers: list[int] = []

    def fail_first(group: LocalGroup) -> None:
        ring = Ring(group)
        if group.rank == 0:
            raise KeyError("a bug of rank 0")
        ring.launch()
        ring.runtime.flush()
        peers.append(record_of(ring)["state"])

    with pytest.raises(KeyError, match="a bug of rank 0"):
        run_emulated(fail_first, 3)
    assert peers == [2, 2]


def test_runtime_host_writes_are_seen_by_the_next_kernel() -> None:
    def clear_record(group: LocalGroup) -> None:
        ring = Ring(group)
        if group.rank == 1:
            return
        for _ in range(2):
            ring.launch()
            ring.runtime.flush()
            assert record_of(ring)["state"] == 2
            ctypes.memset(ring.record.address, 0, RECORD_BYTES)

    run_emulated(clear_record, 2)


# ---- faults and seeds


@pytest.mark.parametrize("stop_at_ns", [0, 2_000, 20_000])
def test_runtime_stopped_rank_raises_and_its_peers_time_out(stop_at_ns: int) -> None:
    states: dict[int, int] = {}

    def play(group: LocalGroup) -> None:
        ring = Ring(group)
        for _ in range(50):
            ring.launch()
            ring.runtime.flush()
            states[group.rank] = record_of(ring)["state"]

    for seed in range(5):
        with pytest.raises(RankStopped, match="rank 1: stopped by the fault"):
            run_emulated(play, 3, Settings(seed, Faults(stop_rank=1, stop_at_ns=stop_at_ns)))
        assert states[0] == states[2] == 2


@pytest.mark.parametrize(
    "faults",
    [
        Faults(delay_rank=1, delay_from_ns=1_000, delay_for_ns=500_000),
        Faults(slow_src=0, slow_dst=1, slow_extra_ns=300_000),
    ],
    ids=["delayed", "slow-link"],
)
def test_runtime_slow_peers_change_nothing_but_the_time(faults: Faults) -> None:
    for seed in range(5):
        assert run_emulated(play_ring, 3, Settings(seed, faults)) == [3 * NUM_ROUNDS] * 3


def trace_of(seed: int) -> tuple[int, int, int]:
    cluster = EmulatedCluster(3, Settings(seed))
    cluster.run(play_signal, lambda rank, _: EmulatedRuntime(cluster, rank))
    statistics = cluster.statistics()
    return statistics.trace_hash, statistics.now_ns, statistics.steps


def test_runtime_seed_decides_the_run() -> None:
    traces = [trace_of(seed) for seed in range(SEEDS)]
    assert traces == [trace_of(seed) for seed in range(SEEDS)]
    assert len(set(traces)) == SEEDS


# ---- memory


def test_runtime_leases_keep_symmetric_memory() -> None:
    def lease(group: LocalGroup) -> None:
        memory = group.runtime.symmetric_memory(group, 4096, TIMEOUT_S)
        first, second = (torch.from_dlpack(memory.lease(1, offset, 256)) for offset in (0, 1024))
        assert memory.num_leases(1) == 2
        assert memory.num_leases(0) == 0
        second.fill_(7)
        assert ctypes.string_at(memory.bases[group.rank] + 1024, 256) == b"\7" * 256
        view = first[3:].view(torch.uint8)
        del first
        assert memory.num_leases(1) == 2
        memory.close()
        memory.close()
        del view
        assert memory.num_leases(1) == 1
        assert int(second.sum()) == 7 * 256

    run_emulated(lease, 2)


def test_runtime_memory_is_zeroed_and_uploads_arrive() -> None:
    def allocate(group: LocalGroup) -> None:
        runtime = group.runtime
        for memory in (runtime.memory(100), runtime.host_memory(100)):
            assert ctypes.string_at(memory.address, memory.num_bytes) == bytes(100)
        assert ctypes.string_at(runtime.upload(b"deepcomm").address, 8) == b"deepcomm"

    run_emulated(allocate, 1)


def test_runtime_of_an_earlier_cluster_is_refused() -> None:
    (earlier,) = run_emulated(lambda group: group.runtime, 1)
    run_emulated(lambda _: None, 1)
    with pytest.raises(EmulatorError, match="taken by a later one"):
        earlier.memory(8)


@pytest.mark.parametrize("address", [8, 1 << 46, -4096], ids=["null", "unmapped", "negative"])
def test_runtime_reports_wild_pointers(address: int) -> None:
    def use(group: LocalGroup) -> None:
        ring = Ring(group)
        ring.folds = SimpleNamespace(data_ptr=lambda: address)  # type: ignore[assignment]
        ring.launch()
        ring.runtime.flush()

    with pytest.raises(EmulatorError, match=r"wild pointer: 0x[0-9a-f]+ is memory of nobody"):
        run_emulated(use, 1)
