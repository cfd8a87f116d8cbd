# SPDX-License-Identifier: Apache-2.0
"""The probe kernels as cases: random shapes, poisoned memory, arguments, and what must come out."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gpu import params
from gpu.launch import Arena, Field, Rank, World

Check = Callable[[Rank], None]

MAX_TILE_BYTES = 2048  # kCopyTileBytes
BULK_PUT_TILE_WORDS = 64  # kTileWords


@dataclass(frozen=True)
class Call:
    """One launch on all ranks."""

    kernel: str
    grid: int
    block: int
    params: dict[int, ctypes.Structure]
    check: Check  # of one local rank, after the launch


@dataclass(frozen=True)
class Setup:
    """What a case is made of; equal seeds give all processes the same case."""

    world: World
    rng: np.random.Generator
    timeout_s: float = 10.0

    def between(self, low: int, high: int) -> int:
        """Draw a whole number from low to high."""
        return int(self.rng.integers(low, high + 1))

    def threads(self) -> int:
        return 32 * self.between(1, 8)

    def probe(self, rank: int, num_rounds: int = 1, num_words: int = 0) -> params.ProbeParams:
        num_ranks = self.world.num_ranks
        records = {one.rank: one.record.ctypes.data for one in self.world.local}
        timeout_ns = int(self.timeout_s * 1e9)
        dst, src = (rank + 1) % num_ranks, (rank - 1) % num_ranks
        record = records.get(rank, 0)
        return params.ProbeParams(rank, dst, src, num_rounds, num_words, timeout_ns, record)

    def source_of(self, rank: int) -> int:
        return (rank - 1) % self.world.num_ranks


Probe = Callable[[Setup], Call]


def payload(rank: int, rounds: Any, index: Any) -> np.ndarray:
    """Do as probe_payload; rounds and index broadcast."""
    words = (rank << 24) + (np.asarray(rounds, np.uint64) << 12) + np.asarray(index, np.uint64) + 1
    return words.astype(np.uint32)


def fold(so_far: Any, value: Any) -> np.ndarray:
    return (np.asarray(so_far, np.uint64) * 31 + np.asarray(value, np.uint64)).astype(np.uint32)


def assert_equal(what: str, rank: Rank, got: np.ndarray, expected: np.ndarray) -> None:
    wrong = np.argwhere(got != expected)
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        want = int(np.broadcast_to(expected, got.shape)[at])
        raise AssertionError(
            f"{what} of rank {rank.rank}: {len(wrong)} of {got.size} are wrong, first "
            f"{list(at)}: expected {want:#x}, got {int(got[at]):#x}"
        )


def random_words(setup: Setup, field: Field) -> dict[int, np.ndarray]:
    """Fill a field with fresh values; return those of every rank."""
    values = {
        rank: setup.rng.integers(0, 1 << 32, field.shape, dtype=np.uint32)
        for rank in range(setup.world.num_ranks)
    }
    for rank in setup.world.local:
        field.write(rank, values[rank.rank])
    return values


def signal(setup: Setup) -> Call:
    num_rounds, num_words, grid = setup.between(1, 6), setup.between(1, 3000), setup.between(1, 4)
    arena = Arena(setup.world)
    rows = arena.take(num_rounds, num_words)
    word = arena.take(1, fill=0)
    sums = arena.take(num_rounds, grid, fill=0)
    calls = {}
    for rank in range(setup.world.num_ranks):
        probe = setup.probe(rank, num_rounds, num_words)
        dst = probe.dst_rank
        calls[rank] = params.SignalParams(
            probe, rows.at(dst), word.at(dst), rows.at(rank), word.at(rank), sums.at(rank)
        )

    def check(rank: Rank) -> None:
        source = setup.source_of(rank.rank)
        sent = payload(source, np.arange(num_rounds)[:, None], np.arange(num_words))
        expected = sent.astype(np.uint64).sum(axis=1).astype(np.uint32)[:, None]
        assert_equal("sums", rank, sums.read(rank), expected)
        assert_equal("signal", rank, word.read(rank), np.uint32(num_rounds * grid))

    return Call("probe_signal", grid, setup.threads(), calls, check)


def claim(setup: Setup) -> Call:
    num_rounds = setup.between(64, 4096)
    arena = Arena(setup.world)
    claims = arena.take(num_rounds, fill=0)
    # A column a rank, unlike under the emulator: there the race is seen, here both entries are.
    owners = [arena.take(num_rounds, fill=0) for _ in range(2)]
    calls = {}
    for rank in range(2):
        probe = setup.probe(rank, num_rounds)
        mine, peers = claims.at(rank), claims.at(1 - rank)
        calls[rank] = params.ClaimParams(probe, mine, peers, owners[rank].at(0))

    def check(rank: Rank) -> None:
        assert_equal("claims", rank, claims.read(rank), np.uint32(1))
        if rank.rank == 0:
            first, second = (column.read(rank) for column in owners)
            assert set(np.unique(first)) <= {0, 1}, "owners of rank 0"
            assert set(np.unique(second)) <= {0, 2}, "owners of rank 1"
            assert not np.any((first != 0) & (second != 0)), "both ranks entered a round"

    return Call("probe_claim", setup.between(1, 4), setup.threads(), calls, check)


def bulk_put(setup: Setup) -> Call:
    num_tiles, grid = setup.between(1, 200), setup.between(1, 8)
    arena = Arena(setup.world)
    source, received, copy = (arena.take(num_tiles, BULK_PUT_TILE_WORDS) for _ in range(3))
    word = arena.take(1, fill=0)
    values = random_words(setup, source)
    calls = {}
    for rank in range(setup.world.num_ranks):
        probe = setup.probe(rank)
        to, at = received.at(probe.dst_rank), received.at(rank)
        signal_to, signal_at = word.at(probe.dst_rank), word.at(rank)
        calls[rank] = params.BulkPutParams(
            probe, source.at(rank), to, signal_to, at, signal_at, copy.at(rank), num_tiles
        )

    def check(rank: Rank) -> None:
        expected = values[setup.source_of(rank.rank)] + np.uint32(7)
        assert_equal("copy", rank, copy.read(rank), expected)
        assert_equal("received", rank, received.read(rank), expected)

    return Call("probe_bulk_put", grid, setup.threads(), calls, check)


def bulk_copy(setup: Setup) -> Call:
    num_tiles, grid = setup.between(1, 300), setup.between(1, 8)
    tile_bytes = 16 * setup.between(1, MAX_TILE_BYTES // 16)
    first = setup.between(0, 1) * (2**32 - setup.between(1, 50))
    arena = Arena(setup.world)
    source, received, copy = (arena.take(num_tiles, tile_bytes // 4) for _ in range(3))
    word = arena.take(1, fill=first)
    values = random_words(setup, source)
    calls = {}
    for rank in range(setup.world.num_ranks):
        probe = setup.probe(rank)
        to, at = received.at(probe.dst_rank), received.at(rank)
        signal_to, signal_at = word.at(probe.dst_rank), word.at(rank)
        fields = (source.at(rank), to, signal_to, at, signal_at, copy.at(rank))
        expected = (first + num_tiles) % 2**32
        calls[rank] = params.BulkCopyParams(probe, *fields, expected, num_tiles, tile_bytes)

    def check(rank: Rank) -> None:
        expected = values[setup.source_of(rank.rank)]
        assert_equal("copy", rank, copy.read(rank), expected)
        assert_equal("received", rank, received.read(rank), expected)

    return Call("probe_bulk_copy", grid, 32 * setup.between(1, 16), calls, check)


def ring(setup: Setup) -> Call:
    num_rounds, num_words = setup.between(5, 40), setup.between(1, 500)
    num_slots = setup.between(1, 4)
    first = setup.between(0, 1) * (2**32 - setup.between(1, 20))
    arena = Arena(setup.world)
    slots = arena.take(num_slots, num_words)
    tail, head = arena.take(1, fill=first), arena.take(1, fill=first)
    folds = arena.take(num_rounds, num_words)
    calls = {}
    for rank in range(setup.world.num_ranks):
        probe = setup.probe(rank, num_rounds, num_words)
        dst, src = probe.dst_rank, probe.src_rank
        sends = (slots.at(dst), tail.at(dst), head.at(rank))
        receives = (slots.at(rank), tail.at(rank), head.at(src), folds.at(rank))
        calls[rank] = params.RingParams(probe, first, *sends, *receives, num_slots)

    def check(rank: Rank) -> None:
        rounds = np.arange(num_rounds)[:, None]
        words = payload(setup.source_of(rank.rank), rounds, np.arange(num_words))
        assert_equal("folds", rank, folds.read(rank), fold(words, (first + rounds + 1) % 2**32))

    return Call("probe_ring", 2, setup.threads(), calls, check)


def barrier_fold(setup: Setup) -> Call:
    num_ranks, num_rounds, grid = setup.world.num_ranks, setup.between(1, 4), setup.between(1, 4)
    arena = Arena(setup.world)
    words = arena.take(num_ranks, fill=0)
    accumulator = arena.take(1, fill=0)
    state = arena.take(2, fill=0)
    tables = (words.at(rank) for rank in range(num_ranks))
    table = (ctypes.c_void_p * params.MAX_RANKS)(*tables)
    calls = {}
    for rank in range(num_ranks):
        probe = setup.probe(rank, num_rounds)
        at = accumulator.at(0)
        calls[rank] = params.BarrierFoldParams(probe, at, table, state.at(rank), num_ranks)

    def check(rank: Rank) -> None:
        expected = np.uint32(0)
        for turn in range(num_rounds * num_ranks * grid):
            expected = fold(expected, turn % (num_ranks * grid) + 1)
        if rank.rank == 0:
            assert_equal("accumulator", rank, accumulator.read(rank), expected)

    return Call("probe_barrier_fold", grid, setup.threads(), calls, check)


def packet(setup: Setup) -> Call:
    num_rounds, num_packets = setup.between(1, 30), setup.between(1, 600)
    arena = Arena(setup.world)
    packets = arena.take(2, num_packets, 4, fill=0)
    sums = arena.take(num_rounds, num_packets)
    calls = {}
    for rank in range(setup.world.num_ranks):
        probe = setup.probe(rank, num_rounds)
        to, at = packets.at(probe.dst_rank), packets.at(rank)
        calls[rank] = params.PacketParams(probe, to, at, sums.at(rank), num_packets)

    def check(rank: Rank) -> None:
        rounds = np.arange(1, num_rounds + 1)[:, None]
        words = payload(setup.source_of(rank.rank), rounds, np.arange(num_packets))
        expected = (words.astype(np.uint64) * 3 + 3).astype(np.uint32)
        assert_equal("sums", rank, sums.read(rank), expected)

    return Call("probe_packet", 1, setup.threads(), calls, check)


PROBES: dict[str, Probe] = {
    "signal": signal,
    "claim": claim,
    "bulk_put": bulk_put,
    "bulk_copy": bulk_copy,
    "ring": ring,
    "barrier_fold": barrier_fold,
    "packet": packet,
}
FIXED_RANKS = {"claim": 2, "packet": 2}
"""Probes between exactly so many ranks."""


def run_probe(setup: Setup, probe: Probe, meet: Callable[[], None] = lambda: None) -> None:
    """Set up, launch on all ranks and check.

    Args:
        setup: The ranks and what decides the shapes.
        probe: Which case.
        meet: Returns once all processes have come to it.
    """
    call = probe(setup)
    setup.world.wait()
    meet()  # a peer's memory is ready before anybody writes to it
    setup.world.launch(call.kernel, call.grid, call.block, call.params)
    setup.world.wait()
    meet()  # nobody prepares the next launch while a peer still runs this one
    failures = setup.world.failures()
    assert not failures, f"{call.kernel}: {failures}"
    for rank in setup.world.local:
        call.check(rank)
