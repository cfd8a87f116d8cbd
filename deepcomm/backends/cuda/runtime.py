# SPDX-License-Identifier: Apache-2.0
"""What the CUDA backend asks of a machine: memory, kernels, streams. One GPU, or the emulator.

``device.py`` implements it with the driver. Tests implement it with the SIMT emulator, so that the
backend's own host code runs there too. Addresses are integers; kernels get them in their arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    import torch

    from deepcomm._C import cuda
    from deepcomm.backends.cuda.network import Network
    from deepcomm.group import Group
    from deepcomm.types import Event

__all__ = ["Function", "HostMemory", "KernelParams", "Memory", "Runtime", "SymmetricMemory"]


class KernelParams(Protocol):
    """A kernel's argument: a native struct of ``deepcomm._C.kernels``, copied at launch."""

    @property
    def address(self) -> int:
        """Where the struct is in host memory."""

    @property
    def num_bytes(self) -> int:
        """Its size."""

    def launch(self, function: cuda.Function, grid: int, stream: int, /) -> None:
        """Launch a kernel of the driver's, with this argument."""

    def prepare_launch(
        self, function: cuda.Function, grid: int, current_stream: Callable[[], int]
    ) -> Callable[[], None]:
        """Return what launches it on the stream that is current by then."""


class Function(Protocol):
    """A kernel, loaded."""

    @property
    def name(self) -> str:
        """As in the list of kernels."""

    @property
    def max_threads(self) -> int:
        """Threads of a block it is launched with."""

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that are resident on one SM at the same time."""

    def spread_over(self, num_sms: int) -> None:
        """Let early launches take no more than their share of an SM, if these are all of them."""


class Memory(Protocol):
    """Memory of this rank's device, zeroed when it was made; freed with the object."""

    @property
    def address(self) -> int:
        """As kernels see it."""

    @property
    def num_bytes(self) -> int:
        """Its size."""


class HostMemory(Protocol):
    """Zeroed host memory that kernels can read and write; freed with the object."""

    @property
    def address(self) -> int:
        """As the host sees it."""

    @property
    def device_address(self) -> int:
        """As kernels see it."""

    @property
    def num_bytes(self) -> int:
        """Its size."""


class SymmetricMemory(Protocol):
    """One block of memory on every rank, zeroed, mapped by all of them.

    ``bases[r]`` is where rank r's block is in this rank's address space. The memory lives until
    the object is closed and all leases have ended.
    """

    bases: tuple[int, ...]
    num_bytes: int

    def lease(self, generation: int, offset: int, num_bytes: int) -> Any:
        """Return a DLPack capsule of bytes of the own block; its storage's end ends the lease."""

    def num_leases(self, generation: int) -> int:
        """Return how many leases of a generation have not ended."""

    def close(self) -> None:
        """Unmap and free, once no lease is left; idempotent."""


class Runtime(Protocol):
    """One rank's device."""

    device: torch.device
    """Where tensors live."""
    device_id: str
    """Which device it is, alike for all ranks that share it."""
    num_sms: int
    reach: str
    """Ranks with the same one reach each other's memory."""

    def symmetric_memory(self, group: Group, num_bytes: int, timeout_s: float) -> SymmetricMemory:
        """Reserve the same amount on every rank and map the peers'; collective over ``group``.

        Raises:
            CommTimeout: A peer's memory did not come within ``timeout_s``.
            CudaError: The driver refused.
            CommError: A peer failed; names it.
        """

    def network(
        self, group: Group, timeout_s: float, traffic_class: int | None, kinds: Sequence[str]
    ) -> Network:
        """Return what carries bytes between the devices of a group; collective over it.

        Args:
            group: The ranks, numbered as ``Message.peer`` will be.
            timeout_s: How long to wait for them, now and in each move.
            traffic_class: Of the packets, as the network counts classes; None is its default.
            kinds: Names of networks, of which the first is taken that all ranks have.

        Raises:
            CommTimeout: They did not meet within ``timeout_s``.
            NcclError: There is no network of those kinds, or NCCL failed.
            CommError: A peer failed; names it.
            ConfigMismatch: Ranks have different versions of NCCL.
        """

    def memory(self, num_bytes: int) -> Memory:
        """Return zeroed memory of this device."""

    def upload(self, content: bytes) -> Memory:
        """Return memory of this device that holds ``content``."""

    def host_memory(self, num_bytes: int) -> HostMemory:
        """Return zeroed memory shared by host and device."""

    def load(self, kernel: str, spec: Mapping[str, int]) -> Function:
        """Compile (or find in the cache) and load a kernel of the list, ready to launch."""

    def launch(self, function: Function, grid: int, params: KernelParams) -> None:
        """Launch on the current stream, with blocks of ``function.max_threads`` threads."""

    def prepare_launch(
        self, function: Function, grid: int, params: KernelParams
    ) -> Callable[[], None]:
        """Return what launches it again, with what is in ``params`` by then."""

    def wait_word(self, address: int, expected: int, record_address: int, timeout_s: float) -> bool:
        """Poll a 64-bit word of host memory until it equals ``expected``; acquires.

        Returns:
            False once ``timeout_s`` has passed or the error record there is complete.
        """

    def flush(self) -> None:
        """See to it that what was launched makes progress by itself; nothing to do on a GPU."""

    def is_capturing(self) -> bool:
        """Return whether the current stream records a graph."""

    def on_stream(self, previous_event: Event | None) -> AbstractContextManager[None]:
        """Make the communication stream current for a while.

        It first waits for ``previous_event``, or without one for all work of the stream that was
        current before.
        """

    def order_side(self) -> None:
        """Make the side stream wait for the work so far of the current stream."""

    def on_side(self) -> AbstractContextManager[None]:
        """Make the side stream current for a while: its work runs beside the other streams'."""

    def wait_event(self, event: Event) -> None:
        """Make the current stream wait for an event."""

    def record_event(self, check: Callable[[], None] | None = None) -> Event:
        """Return the completion of all work of the current stream so far.

        ``synchronize`` of the event then calls ``check``, which raises what the work has found to
        be wrong.
        """

    @property
    def shows_ranges(self) -> bool:
        """Whether there may be a profiler that is shown ranges: else they may be left out."""

    def push_range(self, name: str, /) -> object:
        """Show profilers what the host begins to do: a range within those that have not ended.

        No context manager: entering and leaving one takes longer than all that is done here.
        """

    def pop_range(self) -> object:
        """Show profilers that the last range has ended."""

    def keep_alive(self, tensor: torch.Tensor) -> None:
        """Do not reuse a tensor's memory before the work so far of the current stream is done."""
