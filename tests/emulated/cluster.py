# SPDX-License-Identifier: Apache-2.0
"""Ranks as threads whose kernels run on the emulator, in an order that a seed decides.

Launched kernels are queued. They run when every rank waits, be it for kernels or for its peers in
the control plane: then one thread runs the emulator until somebody's wait is over, who goes on
while its peers' kernels are in the middle of theirs. Time is virtual, and nothing depends on which
thread comes first.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeVar

from emulated.build import PLAIN, Variant
from emulated.host_api import (
    NEVER,
    WAIT_NONE,
    CFaults,
    CHostWait,
    CLaunch,
    COptions,
    Faults,
    Statistics,
    host_api,
)

from deepcomm.testing import LocalCluster, LocalGroup

if TYPE_CHECKING:
    from deepcomm.backends.cuda.runtime import Runtime

T = TypeVar("T")

NO_FAULTS = Faults()
MEETING_LIMIT_S = 60.0
"""Real seconds without news from a rank that others wait for."""


class EmulatorError(Exception):
    """What the emulator found: a race, a deadlock, an access out of bounds."""


class RankStopped(Exception):
    """Raised on the rank that a fault has stopped, once nobody else goes on."""


@dataclass(frozen=True)
class Settings:
    """What a run is a function of.

    Attributes:
        seed: The schedule.
        faults: What goes wrong.
        variant: How kernels are built; mutated sources, for instance.
        mutant: Which broken line of mutated sources is on.
        num_sms: What kernels' grids are chosen for.
        has_network: Give every rank a second stream, for a network.
        trace: Print every event.
        replay: Appended to errors: the command that repeats the run alone.
    """

    seed: int = 0
    faults: Faults = NO_FAULTS
    variant: Variant = PLAIN
    mutant: int = 0
    num_sms: int = 2
    has_network: bool = False
    trace: bool = False
    replay: str = ""


class EmulatedCluster:
    """The emulated devices of one ``LocalCluster``; only the newest of a process may be used."""

    _newest: EmulatedCluster | None = None

    def __init__(self, num_ranks: int, settings: Settings | None = None) -> None:
        self.num_ranks = num_ranks
        self.settings = settings or Settings()
        self.turn = threading.Condition(threading.RLock())
        self._waits: list[CHostWait | None] = [None] * num_ranks
        self._in_barrier: set[int] = set()
        self._left: set[int] = set()
        self._error = ""
        self._num_trips = 0
        self.kept: list[object] = []
        self._api = host_api()
        options = COptions(
            CFaults(**asdict(self.settings.faults)),
            self.settings.trace,
            True,
            num_ranks,
            50_000_000,
            400_000,
        )
        EmulatedCluster._newest = self
        self.num_streams = num_ranks * (2 if self.settings.has_network else 1)
        self._api.short.deepcomm_open(self.num_streams, self.settings.seed, ctypes.byref(options))
        self._api.short.deepcomm_set_mutant(self.settings.mutant)

    # ---- memory and launches

    def alloc(self, rank: int, name: str, num_bytes: int) -> int:
        """Return the address of zeroed memory; rank -1 owns what hosts share."""
        with self.turn:
            self._check_newest()
            begin = ctypes.c_void_p()
            error = self._api.short.deepcomm_alloc(
                rank, name.encode(), max(num_bytes, 1), ctypes.byref(begin)
            )
            if error:
                raise EmulatorError(error.decode())
            return begin.value or 0

    def free(self, address: int) -> None:
        with self.turn:
            if EmulatedCluster._newest is self:
                self._api.short.deepcomm_free(address)

    def launch(self, rank: int, launch: CLaunch) -> None:
        with self.turn:
            self._check_newest()
            self._api.short.deepcomm_launch(rank, ctypes.byref(launch))

    def now_ns(self) -> int:
        return self.statistics().now_ns

    def statistics(self) -> Statistics:
        statistics = Statistics()
        self._api.short.deepcomm_statistics(ctypes.byref(statistics))
        return statistics

    def _check_newest(self) -> None:
        if EmulatedCluster._newest is not self:
            raise EmulatorError("this cluster's emulator has been taken by a later one")

    # ---- meetings

    def wait(self, rank: int, wait: CHostWait) -> None:
        """Return once a rank's wait is over; runs kernels when it is this thread's turn."""
        with self.turn:
            self._check_newest()
            self._waits[rank] = wait
            self.turn.notify_all()
            self._stand_by(rank, lambda: self._waits[rank] is None)

    def observe(self, rank: int, wait: CHostWait) -> None:
        """Tell that a rank has seen what it would wait for."""
        with self.turn:
            self._check_newest()
            self._end_with(self._api.short.deepcomm_observe(rank, ctypes.byref(wait)))
            self._raise_error(rank)

    def read(self, rank: int, begin: int, num_bytes: int) -> None:
        """Tell that a rank reads memory after its kernels."""
        with self.turn:
            self._check_newest()
            self._end_with(self._api.short.deepcomm_host_read(rank, begin, num_bytes))
            self._raise_error(rank)

    def _end_with(self, error: bytes | None) -> None:
        if error:
            self._error = error.decode()
            self.turn.notify_all()

    def wait_in_barrier(self, rank: int) -> bool:
        """Return once all ranks are in the barrier; False if one never will be."""
        with self.turn:
            trip = self._num_trips
            self._in_barrier.add(rank)
            if len(self._in_barrier) == self.num_ranks:
                self._in_barrier.clear()
                self._num_trips += 1
            self.turn.notify_all()
            self._stand_by(rank, lambda: self._num_trips != trip or bool(self._left))
            self._in_barrier.discard(rank)
            return self._num_trips != trip

    def leave(self, rank: int) -> None:
        """Tell that a rank will not come any more; its kernels go on."""
        with self.turn:
            self._left.add(rank)
            self._waits[rank] = None
            self.turn.notify_all()

    def _stand_by(self, rank: int, is_over: Callable[[], bool]) -> None:
        while not is_over():
            self._raise_error(rank)
            if self._all_wait():
                self._run()
                self.turn.notify_all()
            elif not self.turn.wait(MEETING_LIMIT_S):
                busy = [
                    peer
                    for peer, wait in enumerate(self._waits)
                    if wait is None and peer not in self._left | self._in_barrier
                ]
                self._error = f"ranks {busy} are busy for more than {MEETING_LIMIT_S:g} s"
                self.turn.notify_all()
        self._raise_error(rank)

    def _all_wait(self) -> bool:
        waiting = {rank for rank, wait in enumerate(self._waits) if wait is not None}
        return bool(waiting) and len(waiting | self._in_barrier | self._left) == self.num_ranks

    def _run(self) -> None:
        nobody = CHostWait(WAIT_NONE, None, 0, None, 0, NEVER)
        hosts = [wait or nobody for wait in self._waits]
        others = [nobody] * (self.num_streams - self.num_ranks)
        waits = (CHostWait * self.num_streams)(*hosts, *others)
        over = ctypes.create_string_buffer(self.num_streams)
        error = self._api.run.deepcomm_run(waits, over)
        if error:
            self._error = error.decode()
            return
        for rank, flag in enumerate(over.raw[: self.num_ranks]):
            if flag:
                self._waits[rank] = None
        if not any(over.raw):
            self._error = "stopped"

    def _raise_error(self, rank: int) -> None:
        if not self._error:
            return
        if self._error == "stopped":
            raise RankStopped(f"rank {rank}: stopped by the fault")
        settings = self.settings
        replay = f"\nreplay: {settings.replay}" if settings.replay else ""
        raise EmulatorError(f"seed {settings.seed}: {self._error}{replay}")

    # ---- ranks

    def run(
        self, function: Callable[[LocalGroup], T], make_runtime: Callable[[int, int], Runtime]
    ) -> list[T]:
        """Call ``function(group)`` on every rank; ``make_runtime`` is given rank and size."""
        barrier = ControlBarrier(self)

        def on_rank(group: LocalGroup) -> T:
            group._meeting.barrier = barrier  # type: ignore[assignment]
            barrier.ranks[threading.get_ident()] = group.rank
            try:
                return function(group)
            finally:
                self.leave(group.rank)

        return LocalCluster(self.num_ranks, runtime=make_runtime).run(on_rank)


class ControlBarrier:
    """The barrier of a ``LocalCluster``'s control plane: ranks in it do not hold up kernels."""

    def __init__(self, cluster: EmulatedCluster) -> None:
        self.ranks: dict[int, int] = {}
        self._cluster = cluster

    def wait(self, timeout_s: float) -> None:
        del timeout_s
        if not self._cluster.wait_in_barrier(self.ranks[threading.get_ident()]):
            raise threading.BrokenBarrierError

    def abort(self) -> None:
        """Ranks that fail have left already."""
