# SPDX-License-Identifier: Apache-2.0
"""Ranks with symmetric memory on real GPUs, and launches, through CuPy.

Test code that stands in for the library's host layer: one heap a rank, the same offsets on all of
them, so that ``Field`` names a place on every rank. Ranks are parts of one device, one device each,
or one process each. Nothing here blocks for ever: kernels have deadlines, ``World.wait`` too.
"""

from __future__ import annotations

import time
from ctypes import Structure, addressof, c_void_p
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from deepcomm import jit
from deepcomm.backends.cuda.failure import ErrorRecord

try:
    import cupy
    from cupy.cuda import driver, runtime
except ImportError:  # the tests that need it are skipped
    cupy = driver = runtime = None

if TYPE_CHECKING:
    from collections.abc import Mapping

HEAP_BYTES = 8 << 20
POISON = 0xA5
WAIT_LIMIT_S = 60.0
MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

ERROR_RECORD = np.dtype(ErrorRecord)


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel in the context of one device."""

    compiled: jit.CompiledKernel
    function: Any
    num_sms: int

    def max_blocks(self, block: int) -> int:
        """Return how many blocks of so many threads are resident at once."""
        shared = self.compiled.shared_bytes
        per_sm = driver.occupancyMaxActiveBlocksPerMultiprocessor(self.function.ptr, block, shared)
        return int(per_sm) * self.num_sms


@cache
def load(name: str, device: int) -> LoadedKernel:
    """Compile a kernel for a device, or find it in the cache, and load it."""
    kernel = next(kernel for kernel in jit.KERNELS if kernel.name == name)
    current = cupy.cuda.Device(device)
    with current:
        capability = current.compute_capability
        arch = f"sm_{capability}" + ("a" if int(capability) >= 90 else "")
        compiled = jit.default_compiler().compile(kernel, arch=arch)
        module = cupy.cuda.function.Module()
        module.load(compiled.cubin)
        function = module.get_function(compiled.symbol)
        driver.funcSetAttribute(function.ptr, MAX_DYNAMIC_SHARED_BYTES, compiled.shared_bytes)
        return LoadedKernel(compiled, function, current.attributes["MultiProcessorCount"])


@dataclass(frozen=True)
class Rank:
    """A rank that this process drives."""

    rank: int
    device: int
    memory: Any  # keeps the allocation alive
    base: int
    stream: Any
    pinned: Any
    record: np.ndarray = field(repr=False)  # [1] of ERROR_RECORD, shared with the device

    @classmethod
    def make(cls, rank: int, device: int, memory: Any, base: int) -> Rank:
        with cupy.cuda.Device(device):
            stream = cupy.cuda.Stream(non_blocking=True)
            pinned = cupy.cuda.alloc_pinned_memory(ERROR_RECORD.itemsize)
        record = np.frombuffer(pinned, ERROR_RECORD, 1)
        record[:] = 0
        return cls(rank, device, memory, base, stream, pinned, record)

    def array(self, offset: int, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return a part of this rank's heap as a CuPy array."""
        start = cupy.cuda.MemoryPointer(self.memory, self.base - self.memory.ptr + offset)
        return cupy.ndarray(shape, dtype, start)


@dataclass(frozen=True)
class World:
    """All ranks: where their heaps are, and those that this process drives."""

    bases: tuple[int, ...]
    local: tuple[Rank, ...]
    heap_bytes: int = HEAP_BYTES

    @classmethod
    def on_one_device(cls, num_ranks: int, heap_bytes: int = HEAP_BYTES) -> World:
        """Let ranks share a device and one allocation; each launches on a stream of its own."""
        with cupy.cuda.Device(0):
            memory = cupy.cuda.Memory(num_ranks * heap_bytes)
        bases = tuple(memory.ptr + rank * heap_bytes for rank in range(num_ranks))
        ranks = (Rank.make(rank, 0, memory, base) for rank, base in enumerate(bases))
        return cls(bases, tuple(ranks), heap_bytes)

    @classmethod
    def across_devices(cls, num_ranks: int, heap_bytes: int = HEAP_BYTES) -> World:
        """Give each rank a device, all in this process, with peer access."""
        ranks = []
        for device in range(num_ranks):
            enable_peer_access(device, num_ranks)
            with cupy.cuda.Device(device):
                memory = cupy.cuda.Memory(heap_bytes)
            ranks.append(Rank.make(device, device, memory, memory.ptr))
        return cls(tuple(rank.base for rank in ranks), tuple(ranks), heap_bytes)

    @property
    def num_ranks(self) -> int:
        return len(self.bases)

    def launch(self, kernel: str, grid: int, block: int, params: Mapping[int, Structure]) -> None:
        """Launch on the given ranks, once it is sure that all their blocks are resident."""
        ranks = [rank for rank in self.local if rank.rank in params]
        for rank in ranks:
            blocks = grid * sum(other.device == rank.device for other in ranks)
            limit = load(kernel, rank.device).max_blocks(block)
            assert blocks <= limit, f"{kernel}: {blocks} blocks, {limit} are resident at once"
        for rank in ranks:
            launch_one(rank, load(kernel, rank.device), (grid, block), params[rank.rank])

    def wait(self, limit_s: float = WAIT_LIMIT_S) -> None:
        """Wait for all launches of this process; raises if they take longer than their waits."""
        deadline = time.monotonic() + limit_s
        for rank in self.local:
            while not rank.stream.done:
                assert time.monotonic() < deadline, f"rank {rank.rank} runs for over {limit_s} s"
            rank.stream.synchronize()

    def failures(self) -> dict[int, dict[str, int]]:
        """Return the error records that are filled, by rank."""
        return {
            rank.rank: {name: int(rank.record[name][0]) for name in ERROR_RECORD.names[:-1]}
            for rank in self.local
            if rank.record["state"][0] != 0
        }

    def clear(self) -> None:
        """Poison the heaps and clear the records."""
        for rank in self.local:
            rank.record[:] = 0
            with cupy.cuda.Device(rank.device), rank.stream:
                rank.array(0, (self.heap_bytes,), np.uint8).fill(POISON)


def launch_one(rank: Rank, kernel: LoadedKernel, shape: tuple[int, int], params: Structure) -> None:
    """Launch a kernel, whose only argument is a struct, on a rank's stream."""
    grid, block = shape
    shared = kernel.compiled.shared_bytes
    arguments = (c_void_p * 1)(addressof(params))
    with cupy.cuda.Device(rank.device):
        driver.launchKernel(
            kernel.function.ptr,
            *(grid, 1, 1),
            *(block, 1, 1),
            *(shared, rank.stream.ptr, addressof(arguments), 0),
        )


def enable_peer_access(device: int, num_devices: int) -> None:
    """Let a device address the memory of the others."""
    with cupy.cuda.Device(device):
        for peer in range(num_devices):
            if peer == device:
                continue
            assert runtime.deviceCanAccessPeer(device, peer), f"no peer access {device} -> {peer}"
            try:
                runtime.deviceEnablePeerAccess(peer)
            except runtime.CUDARuntimeError as error:
                if "PeerAccessAlreadyEnabled" not in str(error):
                    raise


@dataclass
class Arena:
    """Hands out the heap, the same on every rank; all of it starts poisoned."""

    world: World
    end: int = 0

    def __post_init__(self) -> None:
        self.world.clear()

    def take(self, *shape: int, dtype: Any = np.uint32, fill: int | None = None) -> Field:
        """Return the next 128-byte aligned part, filled unless it is to stay poisoned."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        result = Field(self.world, self.end, shape, dtype)
        self.end += -(-size // 128) * 128
        assert self.end <= self.world.heap_bytes, f"heap: {self.end} bytes are taken"
        if fill is not None:
            for rank in self.world.local:
                with cupy.cuda.Device(rank.device), rank.stream:
                    rank.array(result.offset, shape, dtype).fill(fill)
        return result


@dataclass(frozen=True)
class Field:
    """An array at the same offset of every rank's heap."""

    world: World
    offset: int
    shape: tuple[int, ...]
    dtype: Any

    def at(self, rank: int) -> int:
        """Return the address on a rank, as this process and its kernels see it."""
        return self.world.bases[rank] + self.offset

    def read(self, rank: Rank) -> np.ndarray:
        """Return the content on a local rank."""
        with cupy.cuda.Device(rank.device), rank.stream:
            return cupy.asnumpy(rank.array(self.offset, self.shape, self.dtype))

    def write(self, rank: Rank, values: np.ndarray) -> None:
        """Set the content on a local rank."""
        with cupy.cuda.Device(rank.device), rank.stream:
            rank.array(self.offset, self.shape, self.dtype).set(values)
