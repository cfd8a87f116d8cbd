# SPDX-License-Identifier: Apache-2.0
"""``CudaRuntime``: memory, kernels and streams of one GPU, through the driver and torch."""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.cuda import nvtx

from deepcomm import jit
from deepcomm._C import cuda
from deepcomm.backends.cuda.driver import (
    HIGH_PRIORITY,
    default_driver,
    stream_pool,
    wrap_stream,
)
from deepcomm.backends.cuda.heap import open_heap, reach_of
from deepcomm.backends.cuda.nccl import NcclOptions
from deepcomm.backends.cuda.network_choice import loaded_nccl_headers, open_network
from deepcomm.errors import InvalidArgument
from deepcomm.event import CudaEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from deepcomm.backends.cuda.network import Network
    from deepcomm.backends.cuda.runtime import Function, KernelParams
    from deepcomm.group import Group
    from deepcomm.types import Event

__all__ = ["CudaFunction", "CudaRuntime", "CudaSymmetricMemory"]

SPECIFIC_ARCHS = {90: "sm_90a", 100: "sm_100a"}
"""Architectures with instructions that only the suffixed target has."""

# Of torch's public functions, half of the time is Python's.
NATIVE_NVTX: Final = getattr(nvtx, "_nvtx", None)
PUSH_RANGE: Final[Callable[[str], int]] = getattr(NATIVE_NVTX, "rangePushA", nvtx.range_push)
POP_RANGE: Final[Callable[[], int]] = getattr(NATIVE_NVTX, "rangePop", nvtx.range_pop)
NO_PUSH_POP_TRACKING = -2
"""What NVTX returns where there is no tool, and some tools return."""


@functools.cache
def may_have_profiler() -> bool:
    """Return whether a tool may be shown ranges: NVTX looks for one at its first call only."""
    depth = PUSH_RANGE("deepcomm")
    POP_RANGE()
    return depth != NO_PUSH_POP_TRACKING or "NVTX_INJECTION64_PATH" in os.environ


@dataclass(frozen=True, slots=True, eq=False)
class CudaFunction:
    """A kernel, loaded.

    Attributes:
        name: As in the list of kernels.
        native: Its owner.
        constants: Bytes of those that it shows to the host, by name.
    """

    name: str
    native: cuda.Function
    constants: Mapping[str, bytes]

    @property
    def max_threads(self) -> int:
        """Threads of a block it is launched with."""
        return self.native.max_threads

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that are resident on one SM at the same time."""
        return self.native.blocks_per_sm

    def spread_over(self, num_sms: int) -> None:
        """Let early launches take no more than their share of an SM, if these are all of them."""
        self.native.spread_over(num_sms)


class CudaSymmetricMemory:
    """One block of memory on every rank, mapped by all of them."""

    def __init__(
        self, heap: cuda.SymmetricHeap, bases: tuple[int, ...], streams: Callable[[], list[int]]
    ) -> None:
        """Own a heap; ``streams`` are those whose work may still use it when it is closed."""
        self.bases = bases
        self.num_bytes: int = heap.num_bytes
        self._heap = heap
        self._streams = streams

    def lease(self, generation: int, offset: int, num_bytes: int) -> Any:
        """Return a DLPack capsule of bytes of the own block; its storage's end ends the lease."""
        return self._heap.lease(generation, offset, num_bytes)

    def num_leases(self, generation: int) -> int:
        """Return how many leases of a generation have not ended."""
        return self._heap.num_leases(generation)

    def close(self) -> None:
        """Unmap and free, once no lease is left; idempotent.

        Waits for this rank's work first. After the end of the last lease, whoever reserves memory
        next does so.
        """
        self._heap.close(self._streams() if self._heap.base else [])


class CudaRuntime:
    """One rank's GPU."""

    push_range = staticmethod(PUSH_RANGE)
    pop_range = staticmethod(POP_RANGE)

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        driver: cuda.Driver | None = None,
        compiler: jit.KernelCompiler | None = None,
    ) -> None:
        """Use a device of this process.

        Args:
            device: Such as ``cuda:1``; without an index, or None, torch's current one.
            driver: Instead of this machine's.
            compiler: Instead of NVRTC with the user's cache.

        Raises:
            CudaError: There is no driver, or the device is of no use.
            CompilerMissing: NVRTC or CUDA's headers are not installed.
            InvalidArgument: There is no such device.
        """
        device = torch.device("cuda" if device is None else device)
        if device.type != "cuda":
            raise InvalidArgument(f"device: expected a CUDA device, got {device}")
        self._driver = driver or default_driver()
        self._compiler = compiler or jit.default_compiler()
        index = torch.cuda.current_device() if device.index is None else device.index
        self._native = cuda.Device(self._driver, index)
        self.device = torch.device("cuda", index)
        self.device_id: str = self._native.uuid
        self.num_sms: int = self._native.num_sms
        capability = self._native.capability
        self._arch = SPECIFIC_ARCHS.get(capability, f"sm_{capability}")
        self.reach: str = reach_of(self._native)
        self._index = index
        self._own_stream: torch.cuda.Stream | None = None
        self._side_stream: torch.cuda.Stream | None = None

    def symmetric_memory(
        self, group: Group, num_bytes: int, timeout_s: float
    ) -> CudaSymmetricMemory:
        """Reserve the same amount on every rank and map the peers'; collective over ``group``."""
        heap, bases = open_heap(group, self._driver, self._native, num_bytes, timeout_s)
        return CudaSymmetricMemory(heap, bases, self._streams_in_use)

    def network(
        self, group: Group, timeout_s: float, traffic_class: int | None, kinds: Sequence[str]
    ) -> Network:
        """Return the first kind that all ranks of a group have; collective over it."""
        options = NcclOptions(timeout_s, traffic_class)
        return open_network(group, self, self._native, options, kinds)

    def memory(self, num_bytes: int) -> cuda.DeviceMemory:
        """Return zeroed memory of this device."""
        return cuda.DeviceMemory(self._native, num_bytes)

    def upload(self, content: bytes) -> cuda.DeviceMemory:
        """Return memory of this device that holds ``content``."""
        memory = cuda.DeviceMemory(self._native, len(content))
        memory.fill(content)
        return memory

    def host_memory(self, num_bytes: int) -> cuda.HostMemory:
        """Return zeroed memory shared by host and device."""
        return cuda.HostMemory(self._native, num_bytes)

    def load(self, kernel: str, spec: Mapping[str, int]) -> CudaFunction:
        """Compile (or find in the cache) and load a kernel of the list, ready to launch."""
        entry = next((entry for entry in jit.KERNELS if entry.name == kernel), None)
        if entry is None:
            raise InvalidArgument(f"kernel: expected one of deepcomm.jit.KERNELS, got {kernel!r}")
        nccl = loaded_nccl_headers() if entry.uses_nccl else None
        compiled = self._compiler.compile(entry, arch=self._arch, spec=spec, nccl=nccl)
        native = cuda.Function(
            self._native,
            compiled.cubin,
            compiled.symbol,
            compiled.shared_bytes,
            compiled.max_threads or 0,
            compiled.awaits_ahead,
        )
        return CudaFunction(kernel, native, compiled.constants)

    def launch(self, function: Function, grid: int, params: KernelParams) -> None:
        """Launch on the current stream, with blocks of ``function.max_threads`` threads."""
        assert isinstance(function, CudaFunction)
        params.launch(function.native, grid, self.raw_stream())

    def prepare_launch(
        self, function: Function, grid: int, params: KernelParams
    ) -> Callable[[], None]:
        """Return what launches it again, with what is in ``params`` by then."""
        assert isinstance(function, CudaFunction)
        return params.prepare_launch(function.native, grid, self.raw_stream)

    def wait_word(self, address: int, expected: int, record_address: int, timeout_s: float) -> bool:
        """Poll a 64-bit word of host memory until it equals ``expected``; acquires."""
        return cuda.wait_word(address, expected, record_address, timeout_s)

    def flush(self) -> None:
        """Do nothing: a GPU makes progress by itself."""

    @property
    def shows_ranges(self) -> bool:
        """Whether there may be a profiler that is shown ranges."""
        return may_have_profiler()

    def is_capturing(self) -> bool:
        """Return whether the current stream records a graph."""
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    @contextlib.contextmanager
    def on_stream(self, previous_event: Event | None) -> Iterator[None]:
        """Make the communication stream current for a while, after what it has to wait for."""
        stream = self._communication_stream()
        if previous_event is None:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            if previous_event is not None:
                previous_event.current_stream_wait()
            yield

    def order_side(self) -> None:
        """Make the side stream wait for the work so far of the current stream."""
        if self._side_stream is None:
            self._side_stream = self._take_stream()
        self._side_stream.wait_stream(torch.cuda.current_stream(self.device))

    @contextlib.contextmanager
    def on_side(self) -> Iterator[None]:
        """Make the side stream current for a while: its work runs beside the other streams'."""
        assert self._side_stream is not None
        with torch.cuda.stream(self._side_stream):
            yield

    def wait_event(self, event: Event) -> None:
        """Make the current stream wait for an event."""
        with torch.cuda.device(self.device):
            event.current_stream_wait()

    def record_event(self, check: Callable[[], None] | None = None) -> CudaEvent:
        """Return the completion of all work of the current stream so far."""
        return CudaEvent.record(self.device, check)

    def keep_alive(self, tensor: torch.Tensor) -> None:
        """Do not reuse a tensor's memory before the work so far of the current stream is done."""
        tensor.record_stream(torch.cuda.current_stream(self.device))

    @functools.cached_property
    def raw_stream(self) -> Callable[[], int]:
        """Returns the driver's handle of the current stream."""
        # The public way makes a Stream first, which takes as long as the launch.
        current_stream = torch._C._cuda_getCurrentRawStream  # type: ignore[attr-defined,unused-ignore]
        return functools.partial(current_stream, self._index)

    def _communication_stream(self) -> torch.cuda.Stream:
        if self._own_stream is None:
            self._own_stream = self._take_stream()
        return self._own_stream

    def _take_stream(self) -> torch.cuda.Stream:
        """Return a stream that goes back to the pool with this object."""
        index, pool = self.device.index, stream_pool()
        handle = pool.take(index, HIGH_PRIORITY)
        weakref.finalize(self, pool.give_back, index, HIGH_PRIORITY, handle)
        return wrap_stream(handle, index)

    def _streams_in_use(self) -> list[int]:
        own = (self._own_stream, self._side_stream)
        return [self.raw_stream(), *(int(s.cuda_stream) for s in own if s is not None)]
