# SPDX-License-Identifier: Apache-2.0
"""How fast are the device layer's primitives between two GPUs, beside what the machine can do?

Bulk copies: ``probe_bulk_copy`` moves 256 MiB global -> shared -> peer (or to its own memory), one
block an SM; GB/s of payload by the time of the whole launch, the slower rank's where both send. A
launch of the same kind is queued before the one that is timed, so that ranks start together. The
data is random, exceeds every cache, and is compared once for every variant.
Signals: a launch repeats an exchange; its time is divided by their number. ``probe_ring`` with one
slot is a round trip (release, bounded wait, release, bounded wait), ``probe_packet`` an exchange of
strong 16-byte stores both ways, ``probe_barrier_fold`` a rank barrier and a plain read and write.
Variants take turns, all of them twice: the second column of a pair shows the noise.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cupy
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [
    str(ROOT),
    str(ROOT / "tests"),
]  # the launcher is the tests' until the host layer is

from gpu import params  # noqa: E402
from gpu.launch import Arena, Field, Rank, World, launch_one, load  # noqa: E402
from gpu.probes import Setup, assert_equal, random_words  # noqa: E402
from machine import write_results  # noqa: E402

COPY_BYTES = 256 << 20
TILE_BYTES = 2048
COPY_THREADS = 512
NUM_SMS = (1, 2, 4, 8, 16, 32, 64, 132)
NUM_EXCHANGES = 2000
NUM_PASSES = 2

# What bare kernels reached on such a machine, in GB/s a direction and us.
BARE_BULK = {2: 88, 4: 176, 8: 346, 16: 348, 32: 355, 64: 365}
BARE_BULK_BOTH = {2: 88, 4: 175, 8: 346, 16: 344, 32: 351, 64: 361}
BARE_STORES = {2: 92, 4: 183, 8: 354, 16: 349, 32: 354, 132: 370}
BARE_STORES_BOTH = {2: 92, 4: 182, 8: 350, 16: 345, 32: 350, 132: 365}
BARE_LOCAL = {8: 400, 16: 797, 32: 1576, 132: 1920}
BARE_ROUND_TRIP_US = 2.75

Launch = tuple[str, int, int, dict[int, ctypes.Structure]]


@dataclass(frozen=True)
class Variant:
    """Something to time: make() gives kernel, grid, block and the arguments by rank."""

    name: str
    num_sms: int
    make: Callable[[], Launch]
    has_backlog: bool
    times_ms: list[list[float]] = field(default_factory=lambda: [[] for _ in range(NUM_PASSES)])


@dataclass(frozen=True)
class CopyField:
    """Memory and signals of the copies, and what each rank has been sent so far."""

    setup: Setup
    arena: Arena
    num_sent: dict[int, int] = field(default_factory=dict)

    @classmethod
    def make(cls, world: World) -> CopyField:
        return cls(Setup(world, np.random.default_rng(0)), Arena(world))

    def variants(self) -> Iterator[Variant]:
        num_tiles = COPY_BYTES // TILE_BYTES
        world = self.setup.world
        source = self.arena.take(COPY_BYTES // 4)
        received = self.arena.take(COPY_BYTES // 4)
        word = self.arena.take(1, fill=0)
        sent = random_words(self.setup, source)

        def copy(routes: dict[int, int], num_sms: int) -> Launch:
            for dst in routes.values():
                self.num_sent[dst] = self.num_sent.get(dst, 0) + num_tiles
            calls = {}
            for rank, dst in routes.items():
                probe = self.setup.probe(rank)
                places = (source.at(rank), received.at(dst), word.at(dst))
                mine = (received.at(rank), word.at(rank), 0, self.num_sent.get(rank, 0) % 2**32)
                calls[rank] = params.BulkCopyParams(probe, *places, *mine, num_tiles, TILE_BYTES)
            return "probe_bulk_copy", num_sms, COPY_THREADS, calls

        def check(routes: dict[int, int], num_sms: int) -> None:
            ranks = {rank.rank: rank for rank in world.local}
            for dst in routes.values():
                with cupy.cuda.Device(ranks[dst].device), ranks[dst].stream:
                    ranks[dst].array(received.offset, received.shape, received.dtype).fill(0)
            world.wait()
            run(world, copy(routes, num_sms))
            for rank, dst in routes.items():
                assert not world.failures(), world.failures()
                what = f"{routes} with {num_sms} SMs"
                assert_equal(what, ranks[dst], received.read(ranks[dst]), sent[rank])

        paths = {"to the peer": {0: 1}, "both ways": {0: 1, 1: 0}, "own memory": {0: 0}}
        for name, routes in paths.items():
            for num_sms in NUM_SMS:
                check(routes, num_sms)
                yield Variant(name, num_sms, lambda r=routes, n=num_sms: copy(r, n), True)


@dataclass(frozen=True)
class Exchanges:
    """Memory of the exchanges between the two ranks of a world; each launch starts from zeros."""

    setup: Setup
    counters: Field
    packets: Field
    sums: Field
    meeting: Field

    @classmethod
    def make(cls, world: World) -> Exchanges:
        arena = Arena(world)
        counters, packets = arena.take(2, 32), arena.take(2, 32, 4)
        sums, meeting = arena.take(NUM_EXCHANGES, 32), arena.take(3, 32)
        return cls(Setup(world, np.random.default_rng(0)), counters, packets, sums, meeting)

    def variants(self, where: str) -> list[Variant]:
        return [
            Variant(f"signal round trip {where}", 2, self.round_trip, False),
            Variant(f"packet exchange, 1 x 16 bytes {where}", 1, lambda: self.packet(1), False),
            Variant(f"packet exchange, 32 x 16 bytes {where}", 1, lambda: self.packet(32), False),
            Variant(f"rank barrier {where}", 1, self.barrier, False),
        ]

    def reset(self) -> None:
        for part in (self.counters, self.packets, self.meeting):
            for rank in self.setup.world.local:
                part.write(rank, np.zeros(part.shape, np.uint32))
        self.setup.world.wait()

    def round_trip(self) -> Launch:
        self.reset()
        calls = {}
        for rank in range(2):
            peer, probe = 1 - rank, self.setup.probe(rank, NUM_EXCHANGES)
            sends = (0, self.counters.at(peer) + 128, self.counters.at(rank))
            receives = (0, self.counters.at(rank) + 128, self.counters.at(peer), 0)
            calls[rank] = params.RingParams(probe, 0, *sends, *receives, 1)
        return "probe_ring", 2, 32, calls

    def packet(self, num_packets: int) -> Launch:
        self.reset()
        calls = {}
        for rank in range(2):
            probe = self.setup.probe(rank, NUM_EXCHANGES)
            places = (self.packets.at(1 - rank), self.packets.at(rank), self.sums.at(rank))
            calls[rank] = params.PacketParams(probe, *places, num_packets)
        return "probe_packet", 1, 32, calls

    def barrier(self) -> Launch:
        self.reset()
        words = (ctypes.c_void_p * params.MAX_RANKS)(self.meeting.at(0), self.meeting.at(1))
        calls = {}
        for rank in range(2):
            # A round has a turn, and so a meeting, a rank.
            probe = self.setup.probe(rank, NUM_EXCHANGES // 2)
            places = (self.meeting.at(0) + 128, words, self.meeting.at(rank) + 256)
            calls[rank] = params.BarrierFoldParams(probe, *places, 2)
        return "probe_barrier_fold", 1, 32, calls


def run(world: World, *launches: Launch) -> float:
    """Launch one after the other, wait, and return the last one's time on the slower rank in ms."""
    for kernel, grid, block, calls in launches:
        ranks = [rank for rank in world.local if rank.rank in calls]
        spans = [launch_timed(rank, kernel, (grid, block), calls[rank.rank]) for rank in ranks]
    world.wait()
    return max(cupy.cuda.get_elapsed_time(*span) for span in spans)


def run_variant(world: World, variant: Variant) -> float:
    backlog = [variant.make()] if variant.has_backlog else []
    return run(world, *backlog, variant.make())


def launch_timed(
    rank: Rank, kernel: str, shape: tuple[int, int], call: ctypes.Structure
) -> tuple[cupy.cuda.Event, cupy.cuda.Event]:
    loaded = load(kernel, rank.device)
    assert shape[0] <= loaded.max_blocks(shape[1])
    with cupy.cuda.Device(rank.device):
        span = cupy.cuda.Event(), cupy.cuda.Event()
        span[0].record(rank.stream)
        launch_one(rank, loaded, shape, call)
        span[1].record(rank.stream)
    return span


def time_variants(world: World, variants: list[Variant], num_repeats: int) -> None:
    """Time each variant num_repeats times a pass, taking turns in rotating order."""
    for warm_up in variants:
        run_variant(world, warm_up)
    for which in range(NUM_PASSES):
        for repeat in range(num_repeats):
            start = repeat % len(variants)
            for variant in variants[start:] + variants[:start]:
                variant.times_ms[which].append(run_variant(world, variant))
    assert not world.failures(), world.failures()


@dataclass(frozen=True)
class Figure:
    """One line of the result: p50 of either pass, p95 of both together."""

    name: str
    num_sms: int
    unit: str
    p50: float
    p50_again: float
    p95: float
    bare: float | None = None
    bare_stores: float | None = None


def bandwidth(variant: Variant) -> Figure:
    def rate(times: list[float], percentile: float) -> float:
        return COPY_BYTES / float(np.percentile(times, percentile)) / 1e6

    first, again = variant.times_ms
    bare = {"to the peer": BARE_BULK, "both ways": BARE_BULK_BOTH, "own memory": BARE_LOCAL}
    stores = {"to the peer": BARE_STORES, "both ways": BARE_STORES_BOTH}.get(variant.name, {})
    return Figure(
        name=variant.name,
        num_sms=variant.num_sms,
        unit="GB/s",
        p50=rate(first, 50),
        p50_again=rate(again, 50),
        p95=rate(first + again, 95),
        bare=bare[variant.name].get(variant.num_sms),
        bare_stores=stores.get(variant.num_sms),
    )


def latency(variant: Variant) -> Figure:
    def each(times: list[float], percentile: float) -> float:
        return float(np.percentile(times, percentile)) * 1e3 / NUM_EXCHANGES

    first, again = variant.times_ms
    is_known = variant.name == "signal round trip between GPUs"
    return Figure(
        name=variant.name,
        num_sms=variant.num_sms,
        unit="us",
        p50=each(first, 50),
        p50_again=each(again, 50),
        p95=each(first + again, 95),
        bare=BARE_ROUND_TRIP_US if is_known else None,
    )


def measure(num_repeats: int) -> list[Figure]:
    copies = World.across_devices(2, 2 * COPY_BYTES + 4096)
    copy_variants = list(CopyField.make(copies).variants())
    time_variants(copies, copy_variants, num_repeats)
    figures = [bandwidth(variant) for variant in copy_variants]
    between = World.across_devices(2)
    inside = World.on_one_device(2)
    for world, variants in (
        (between, Exchanges.make(between).variants("between GPUs")),
        (inside, Exchanges.make(inside).variants("inside a GPU")),
    ):
        time_variants(world, variants, num_repeats)
        figures += [latency(variant) for variant in variants]
    return figures


def environment(commit: str) -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader"]
    gpus = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    runtime = cupy.cuda.runtime.runtimeGetVersion()
    return {
        "gpus": "; ".join(gpus.strip().splitlines()),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit,
        "software": f"CUDA runtime {runtime}, NVRTC {cupy.cuda.nvrtc.getVersion()}, "
        f"CuPy {cupy.__version__}, Python {platform.python_version()}",
        "command": shlex.join(["python", *sys.argv]),
    }


def table(figures: list[Figure], unit: str) -> list[str]:
    head = f"| what | SMs | p50 {unit} | p50 again | p95 | bare kernel | bare stores |"

    def show(value: float | None) -> str:
        digits = 2 if unit == "us" else 1
        return "" if value is None else f"{value:.{digits}f}"

    rows = [
        f"| {f.name} | {f.num_sms} | {show(f.p50)} | {show(f.p50_again)} | {show(f.p95)} "
        f"| {show(f.bare)} | {show(f.bare_stores)} |"
        for f in figures
        if f.unit == unit
    ]
    return [head, "|---|---:|---:|---:|---:|---:|---:|", *rows, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40, help="launches of a variant and pass")
    parser.add_argument("--commit", default="unknown", help="goes into the result")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    args = parser.parse_args()
    figures = measure(args.repeats)
    facts = environment(args.commit)
    lines = ["# Device primitives", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += [*table(figures, "GB/s"), *table(figures, "us")]
    print("\n".join(lines))
    if args.out:
        result = {"environment": facts, "figures": [asdict(figure) for figure in figures]}
        write_results(args.out, result, lines)


if __name__ == "__main__":
    main()
