# SPDX-License-Identifier: Apache-2.0
"""Symmetric memory of a group's GPUs: each rank allocates, hands it round, maps the others'.

Ranks of one process share a mapping, processes of one host a file descriptor, and hosts
of one NVLink fabric a fabric handle.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from deepcomm._C import cuda
from deepcomm.backends.cuda.mailbox import Address, Mailbox, close_all
from deepcomm.errors import CudaError
from deepcomm.group import agree, check_equal, members_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deepcomm.group import Group

__all__ = ["open_heap", "reach_of"]

WHAT: Final = "symmetric memory"

_PROCESS: Final = os.urandom(16).hex()
_shared: dict[str, cuda.Mapping] = {}
_shared_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a rank is, and how its memory can travel."""

    process: str
    host: str
    device_uuid: str
    device_label: str
    has_posix_fd: bool
    has_fabric: bool


@dataclass(frozen=True, slots=True)
class _Offer:
    """A rank's block, in the ways in which some peer needs it."""

    num_bytes: int
    key: str
    address: Address | None
    fabric: bytes | None


def reach_of(device: cuda.Device) -> str:
    """Name what a device's memory can be mapped in: devices of one name reach each other."""
    return "fabric" if device.has_fabric else _host()


def open_heap(
    group: Group, driver: cuda.Driver, device: cuda.Device, num_bytes: int, timeout_s: float
) -> tuple[cuda.SymmetricHeap, tuple[int, ...]]:
    """Return a heap and the address of each rank's block in it; collective.

    Raises:
        CommTimeout: A peer's descriptor did not come within ``timeout_s``.
        CudaError: The driver refused, or a peer's memory cannot be reached from here.
        CommError: A peer failed; names it.
        ConfigMismatch: Ranks ask for different sizes.
    """
    places = agree(group, WHAT, lambda: _find_place(device))
    exchange = _Exchange(group, places, device, timeout_s)
    try:
        offers = agree(group, WHAT, lambda: exchange.offer(driver, num_bytes))
        check_equal(WHAT, [{"num_bytes": offer.num_bytes} for offer in offers], members_of(group))
        bases = agree(group, WHAT, lambda: exchange.map_peers(offers))[group.rank]
    except BaseException:
        exchange.discard()
        raise
    finally:
        exchange.end()
    return exchange.heaps[0], bases


class _Exchange:
    """One rank's part of it, and what must not outlive it."""

    def __init__(
        self, group: Group, places: Sequence[_Place], device: cuda.Device, timeout_s: float
    ) -> None:
        self.heaps: list[cuda.SymmetricHeap] = []
        self._rank = group.rank
        self._names = members_of(group)
        self._places = places
        self._device = device
        self._timeout_s = timeout_s
        self._key = os.urandom(16).hex()
        self._resources = contextlib.ExitStack()
        self._mailbox: Mailbox | None = None
        self._descriptor = -1

    def offer(self, driver: cuda.Driver, num_bytes: int) -> _Offer:
        """Allocate, and prepare to hand out, in all ways that some peer needs."""
        check_access(self._rank, self._names, self._places, driver)
        ways = {self._way(peer) for peer in range(len(self._places)) if peer != self._rank}
        heap = cuda.SymmetricHeap(self._device, num_bytes)
        self.heaps.append(heap)
        if "process" in ways:
            with _shared_lock:
                _shared[self._key] = heap.mapping
            self._resources.callback(self._unshare)
        if "host" in ways:
            self._mailbox = Mailbox()
            self._resources.callback(self._mailbox.close)
            self._descriptor = heap.memory.export_fd()
            self._resources.callback(os.close, self._descriptor)
        address = self._mailbox.address if self._mailbox else None
        fabric = heap.memory.export_fabric() if "fabric" in ways else None
        return _Offer(heap.num_bytes, self._key, address, fabric)

    def map_peers(self, offers: Sequence[_Offer]) -> tuple[int, ...]:
        """Receive what peers offer and map it; return the addresses, by rank."""
        heap = self.heaps[0]
        descriptors = self._receive(offers)
        try:
            return tuple(
                heap.base
                if rank == self._rank
                else self._map(rank, offer, descriptors.get(self._names[rank], -1))
                for rank, offer in enumerate(offers)
            )
        finally:
            close_all(descriptors)

    def discard(self) -> None:
        """Free what was allocated."""
        for heap in self.heaps:
            heap.close([])

    def end(self) -> None:
        """Let go of all that only the exchange needed."""
        self._resources.close()

    def _unshare(self) -> None:
        with _shared_lock:
            del _shared[self._key]

    def _way(self, peer: int) -> str:
        own, other = self._places[self._rank], self._places[peer]
        if own.process == other.process:
            return "process"
        if own.host == other.host and own.has_posix_fd and other.has_posix_fd:
            return "host"
        if own.has_fabric and other.has_fabric:
            return "fabric"
        raise CudaError(
            f"{WHAT}: rank {self._names[self._rank]} on {own.device_label} cannot map the memory "
            f"of rank {self._names[peer]} on {other.device_label}: it is {_distance(own, other)}, "
            "nor do both devices have fabric handles (deepcomm doctor)"
        )

    def _receive(self, offers: Sequence[_Offer]) -> dict[int, int]:
        """Return the descriptors of peers on this host, by what these are called."""
        if self._mailbox is None:
            return {}
        addresses = {
            self._names[rank]: offer.address
            for rank, offer in enumerate(offers)
            if offer.address is not None and rank != self._rank and self._way(rank) == "host"
        }
        own_name = self._names[self._rank]
        return self._mailbox.exchange(own_name, self._descriptor, addresses, self._timeout_s)

    def _map(self, rank: int, offer: _Offer, descriptor: int) -> int:
        """Map a peer's block and return its address."""
        heap, way = self.heaps[0], self._way(rank)
        if way == "process":
            with _shared_lock:
                mapping = _shared[offer.key]
            return heap.join(mapping)
        if way == "host":
            memory = cuda.PhysicalMemory.import_fd(self._device, descriptor, offer.num_bytes)
        else:
            memory = cuda.PhysicalMemory.import_fabric(
                self._device, offer.fabric or b"", offer.num_bytes
            )
        return heap.map(memory)


def check_access(
    rank: int, names: Sequence[int], places: Sequence[_Place], driver: cuda.Driver
) -> None:
    """Raise CudaError if the driver says that this rank's device cannot access a peer's."""
    local = {driver.device_uuid(index): index for index in range(driver.num_devices)}
    own = places[rank]
    for peer, place in enumerate(places):
        # A device that this process does not see (CUDA_VISIBLE_DEVICES) shows at the import.
        if place.device_uuid == own.device_uuid or place.device_uuid not in local:
            continue
        if not driver.can_access_peer(local[own.device_uuid], local[place.device_uuid]):
            raise CudaError(
                f"{WHAT}: {own.device_label} of rank {names[rank]} cannot access "
                f"{place.device_label} of rank {names[peer]} (cuDeviceCanAccessPeer); see "
                "nvidia-smi topo -p2p r, an IOMMU or a virtual machine may forbid it"
            )


def _find_place(device: cuda.Device) -> _Place:
    return _Place(
        process=f"{_PROCESS} {os.getpid()}",
        host=_host(),
        device_uuid=device.uuid,
        device_label=device.label,
        has_posix_fd=device.has_posix_fd,
        has_fabric=device.has_fabric,
    )


def _host() -> str:
    """Name the processes that a mailbox reaches: one kernel, one network namespace."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        kernel = socket.gethostname()
    return f"{kernel} {Path('/proc/self/ns/net').readlink()}"


def _distance(own: _Place, other: _Place) -> str:
    if own.host == other.host:
        return "in another process, not both devices can export file descriptors"
    return "on another host or in another network namespace"
