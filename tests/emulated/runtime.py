# SPDX-License-Identifier: Apache-2.0
"""``deepcomm.backends.cuda.runtime.Runtime`` on the emulator, and a cluster of such ranks."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from emulated.cluster import EmulatedCluster, Settings
from emulated.gin_network import EmulatedGinNetwork
from emulated.host_api import HOST_RANK, NEVER, WAIT_STREAM, WAIT_WORD, CHostWait, CLaunch
from emulated.kernel_library import KernelLibrary, load_kernel
from emulated.network import PATIENCE_S, EmulatedNetwork
from emulated.streams import Mark, StreamOrder

from deepcomm.backends.cuda.engine import FlatEngine
from deepcomm.jit import KERNELS, Kernel

if TYPE_CHECKING:
    from deepcomm.backends.cuda.network import Network
    from deepcomm.backends.cuda.runtime import KernelParams
    from deepcomm.group import Group
    from deepcomm.testing import LocalGroup
    from deepcomm.types import Event

T = TypeVar("T")

NO_SPEC: Mapping[str, int] = MappingProxyType({})
RECORD_COMPLETE = 2  # csrc/layout/error_record.hpp; its state is the first word


class EmulatedMemory:
    """Zeroed emulated memory, freed with the object; ``Memory`` and ``HostMemory``."""

    def __init__(self, cluster: EmulatedCluster, rank: int, name: str, num_bytes: int) -> None:
        self.address = cluster.alloc(rank, name, num_bytes)
        self.device_address = self.address
        self.num_bytes = num_bytes
        weakref.finalize(self, cluster.free, self.address)


@dataclass(frozen=True)
class Lease:
    """A view of symmetric memory that has not ended."""

    generation: int
    begin: int
    num_bytes: int


class EmulatedSymmetricMemory:
    """One block a rank; all of them live until every rank has closed and returned its leases."""

    def __init__(self, own: EmulatedMemory, peers: list[EmulatedMemory]) -> None:
        self.bases = tuple(memory.address for memory in peers)
        self.num_bytes = own.num_bytes
        self.leases: list[Lease] = []
        self._base = own.address
        self._peers: list[EmulatedMemory] | None = peers

    def lease(self, generation: int, offset: int, num_bytes: int) -> Any:
        """Return a capsule of uint8 [num_bytes]."""
        view = (ctypes.c_uint8 * num_bytes).from_address(self._base + offset)
        lease = Lease(generation, self._base + offset, num_bytes)
        self.leases.append(lease)
        weakref.finalize(view, self._end_lease, lease, self._peers)
        return torch.frombuffer(view, dtype=torch.uint8).__dlpack__()

    def num_leases(self, generation: int) -> int:
        return sum(lease.generation == generation for lease in self.leases)

    def _end_lease(self, lease: Lease, peers: object) -> None:
        del peers  # what the lease kept alive
        self.leases.remove(lease)

    def close(self) -> None:
        self._peers = None


class EmulatedEvent:
    """All work of a rank so far, or of its side stream, which is marked."""

    def __init__(
        self, runtime: EmulatedRuntime, check: Callable[[], None] | None, mark: Mark | None
    ) -> None:
        self._runtime = runtime
        self._check = check
        self.mark = mark

    def synchronize(self) -> None:
        self._runtime.flush()
        if self._check is not None:
            self._check()

    def current_stream_wait(self) -> None:
        """A rank has one stream."""

    def query(self) -> bool:
        self._runtime.flush()
        return True


class LazyKernel:
    """A kernel that is compiled when it is looked at: a buffer loads many that no test launches."""

    def __init__(self, name: str, load: Callable[[], KernelLibrary]) -> None:
        self.name = name
        self._load = load

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)


class EmulatedRuntime:
    """One rank's emulated device."""

    _load_lock = threading.Lock()
    _loaded: ClassVar[dict[Any, KernelLibrary]] = {}

    def __init__(self, cluster: EmulatedCluster, rank: int) -> None:
        self.device = torch.device("cpu")
        self.device_id = f"of rank {rank}"
        self.num_sms = cluster.settings.num_sms
        self.reach = "the emulator"
        self._cluster = cluster
        self._rank = rank
        self._stream = rank
        self._held: list[dict[str, Any]] = []
        self._order = StreamOrder(self)
        self.ranges: list[str] = []
        self.open_ranges: list[str] = []
        self._symmetric: weakref.WeakSet[EmulatedSymmetricMemory] = weakref.WeakSet()
        self._records: set[int] = set()

    # ---- memory

    def symmetric_memory(
        self, group: Any, num_bytes: int, timeout_s: float
    ) -> EmulatedSymmetricMemory:
        del timeout_s  # threads of one process are here
        own = EmulatedMemory(self._cluster, self._rank, "symmetric", num_bytes)
        memory = EmulatedSymmetricMemory(own, group.all_gather(own))
        self._symmetric.add(memory)
        return memory

    def memory(self, num_bytes: int) -> EmulatedMemory:
        return EmulatedMemory(self._cluster, self._rank, caller(), num_bytes)

    def upload(self, content: bytes) -> EmulatedMemory:
        memory = EmulatedMemory(self._cluster, self._rank, caller(), len(content))
        ctypes.memmove(memory.address, content, len(content))
        return memory

    def host_memory(self, num_bytes: int) -> EmulatedMemory:
        name = f"r{self._rank}:{caller()}"
        return EmulatedMemory(self._cluster, HOST_RANK, name, num_bytes)

    def reserved_at(self, address: int) -> list[EmulatedMemory] | None:
        """Return what keeps this rank's symmetric memory alive."""
        return next(memory._peers for memory in self._symmetric if memory._base == address)

    def keep(self, *memory: Any) -> None:
        """Let memory live as long as the cluster."""
        self._cluster.kept.append(memory)

    # ---- kernels

    def load(self, kernel: str, spec: Mapping[str, int]) -> LazyKernel:
        return LazyKernel(kernel, lambda: self._load(kernel, spec))

    def _load(self, kernel: str, spec: Mapping[str, int]) -> KernelLibrary:
        (entry,) = (entry for entry in KERNELS if entry.name == kernel)
        return self.load_once(entry, spec)

    def load_once(self, kernel: Kernel, spec: Mapping[str, int] = NO_SPEC) -> KernelLibrary:
        """Return a kernel, also one that is not in the list."""
        variant = self._cluster.settings.variant
        key = (kernel.name, tuple(spec.items()), variant)
        with self._load_lock:
            if key not in self._loaded:
                self._loaded[key] = load_kernel(kernel, spec, variant)
            return self._loaded[key]

    def launch(self, function: LazyKernel, grid: int, params: KernelParams) -> None:
        self.launch_block(function, grid, function.max_threads, params)

    def launch_block(
        self, function: LazyKernel, grid: int, block: int, params: KernelParams
    ) -> None:
        """Launch with another number of threads than the backend would."""
        if params.num_bytes != function.params_bytes:
            raise TypeError(
                f"{function.name}: expected {function.params_bytes} bytes of arguments, "
                f"got {params.num_bytes}"
            )
        launch = CLaunch(
            grid, block, function.shared_bytes, function.entry, params.address, params.num_bytes
        )
        self._cluster.launch(self._stream, launch)
        self._held += locals_of_backend()

    def prepare_launch(
        self, function: LazyKernel, grid: int, params: KernelParams
    ) -> Callable[[], None]:
        """Return what launches and waits: what native code holds meanwhile, nobody else does."""

        def launch() -> None:
            self.launch(function, grid, params)
            self.drain()

        return launch

    # ---- waiting

    def now_ns(self) -> int:
        """Return the virtual time."""
        return self._cluster.now_ns()

    def wait_word(self, address: int, expected: int, record_address: int, timeout_s: float) -> bool:
        self._records.add(record_address)
        word = ctypes.c_uint64.from_address(address)
        deadline_ns = self.now_ns() + int(timeout_s * 1e9)
        wait = CHostWait(WAIT_WORD, address, expected, record_address, RECORD_COMPLETE, deadline_ns)
        if word.value == expected:
            self._cluster.observe(self._rank, wait)
        else:
            self._cluster.wait(self._rank, wait)
        return word.value == expected

    def drain(self) -> None:
        """Wait for what was launched."""
        self._cluster.wait(self._rank, CHostWait(WAIT_STREAM, None, 0, None, 0, NEVER))
        self._held.clear()

    def flush(self) -> None:
        self.drain()
        if any(ctypes.c_uint32.from_address(at).value == RECORD_COMPLETE for at in self._records):
            return  # an operation has failed: its views are nobody's to read
        # Whoever has a view reads it now, with what the rank's kernels have acquired.
        for memory in self._symmetric:
            if self._cluster.settings.has_network and len(memory.bases) == 1:
                continue  # of a rail: nobody sees it, and a network may bring what means nothing
            for lease in memory.leases:
                self._cluster.read(self._rank, lease.begin, lease.num_bytes)

    # ---- streams: each rank has one, and a network's

    def order_side(self) -> None:
        mark = self._order.mark(self._stream)
        with self.on_side():
            self._order.wait(mark, PATIENCE_S)

    @contextlib.contextmanager
    def on_side(self) -> Iterator[None]:
        self._stream = self._cluster.num_ranks + self._rank
        try:
            yield
        finally:
            self._stream = self._rank

    @property
    def broken_address(self) -> int:
        """Of a word: not 0 once the side stream waits for what never comes."""
        return self._order.broken.address

    @property
    def _is_on_side(self) -> bool:
        return self._stream != self._rank

    def network(
        self, group: Group, timeout_s: float, traffic_class: int | None, kinds: Sequence[str]
    ) -> Network:
        assert self._cluster.settings.has_network
        if tuple(kinds) == ("gin",):
            return EmulatedGinNetwork(self, group, timeout_s, traffic_class)
        assert "nccl" in kinds
        return EmulatedNetwork(self, group, timeout_s, traffic_class)

    def is_capturing(self) -> bool:
        return False

    def on_stream(self, previous_event: Event | None) -> contextlib.AbstractContextManager[None]:
        del previous_event
        return contextlib.nullcontext()

    def wait_event(self, event: Event) -> None:
        if isinstance(event, EmulatedEvent) and event.mark is not None:
            self._order.wait(event.mark, 100 * PATIENCE_S)

    def record_event(self, check: Callable[[], None] | None = None) -> Event:
        mark = self._order.mark(self._stream) if self._is_on_side else None
        return EmulatedEvent(self, check, mark)

    @property
    def shows_ranges(self) -> bool:
        return True

    def push_range(self, name: str, /) -> None:
        self.ranges.append(name)
        self.open_ranges.append(name)

    def pop_range(self) -> None:
        self.open_ranges.pop()

    def keep_alive(self, tensor: torch.Tensor) -> None:
        if self._is_on_side:  # whose kernels nobody drains
            self.keep(tensor)


class LazyRuntime:
    """An emulated runtime that lets the host run ahead: launches stay queued, as on a GPU."""

    def __init__(self, runtime: EmulatedRuntime) -> None:
        self.actual = runtime

    def __getattr__(self, name: str) -> Any:
        return getattr(self.actual, name)

    def flush(self) -> None:
        """Leave that to the tests."""


def locals_of_backend() -> list[dict[str, Any]]:
    """Hold what the launching functions hold: tensors live on, as in a stream-ordered allocator."""
    held = []
    frame = sys._getframe(1)
    while frame is not None:
        if "deepcomm" in frame.f_globals.get("__name__", ""):
            held.append(dict(frame.f_locals))
        frame = frame.f_back  # type: ignore[assignment]
    return held


def caller() -> str:
    """Name memory by the line that asked for it."""
    frame = sys._getframe(2)
    return f"{Path(frame.f_code.co_filename).stem}:{frame.f_lineno}"


def use_runtime(buffer: Any, runtime: Any) -> None:
    """Let a buffer go on with another runtime."""
    backend = buffer._backend
    engine = backend.engine
    domains = [engine.domain] if isinstance(engine, FlatEngine) else [engine.rail, engine.node]
    for user in (backend, *domains):
        user.runtime = runtime


def run_emulated(
    function: Callable[[LocalGroup], T], num_ranks: int, settings: Settings | None = None
) -> list[T]:
    """Call ``function(group)`` on every rank of an emulated cluster; return the results by rank."""
    cluster = EmulatedCluster(num_ranks, settings)
    return cluster.run(function, lambda rank, _: EmulatedRuntime(cluster, rank))
