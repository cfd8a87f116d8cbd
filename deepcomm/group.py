# SPDX-License-Identifier: Apache-2.0
"""The control plane: what a buffer needs of the group it is constructed over.

A process group of ``torch.distributed``, an mpi4py communicator and the groups of ``LocalCluster``
all become a ``Group``: used at construction and growth only, never for payload.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from deepcomm.errors import CommError, ConfigMismatch, InvalidArgument, describe_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "Group",
    "SubGroup",
    "agree",
    "agree_on",
    "alone_of",
    "as_group",
    "members_of",
    "whole_of",
]

T = TypeVar("T")

LOOPBACK = "127.0.0.1"
OUTSIDE = "192.0.2.1"  # an address of nobody (RFC 5737), to ask for the default route


class Group(Protocol):
    """Ranks that construct a buffer together."""

    rank: int
    size: int

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's picklable value, by rank."""

    def store(self, timeout: timedelta) -> Store:
        """Return a store that all ranks share."""


class TorchGroup:
    """A ``torch.distributed`` process group of any backend, also a subgroup."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Wrap a group that this process is a member of."""
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        if self.rank < 0:
            raise InvalidArgument("group: expected a group of this process, got one without it")

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's picklable value, by rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def store(self, timeout: timedelta) -> Store:
        """Return the group's own store, whatever its timeout."""
        del timeout
        return self._group.get_group_store()


class MpiGroup:
    """An mpi4py communicator."""

    def __init__(self, communicator: Any) -> None:
        """Wrap the communicator."""
        self._communicator = communicator
        self.rank = int(communicator.Get_rank())
        self.size = int(communicator.Get_size())

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's picklable value, by rank."""
        return list(self._communicator.allgather(value))

    def store(self, timeout: timedelta) -> Store:
        """Return a store served by rank 0 of the communicator."""
        return serve_store(self, timeout)


def serve_store(group: Group, timeout: timedelta) -> Store:
    """Start a TCP store on rank 0 and connect all ranks to it."""
    if group.rank == 0:
        host = own_address()
        store = TCPStore(host, 0, None, is_master=True, timeout=timeout, wait_for_workers=False)
        group.all_gather((host, store.port))
        return store
    host, port = group.all_gather(None)[0]
    return TCPStore(host, port, None, is_master=False, timeout=timeout, wait_for_workers=False)


def own_address() -> str:
    """Return an address of this host that others reach: its name's, if it resolves to one."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = LOOPBACK
    if not address.startswith("127."):
        return address
    # Many distributions give the host name a loopback address; the default route knows better.
    return address_towards(OUTSIDE, default=LOOPBACK)


def address_towards(host: str, default: str | None = None) -> str:
    """Return this host's address on the route to ``host``; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return default or own_address()
        return str(probe.getsockname()[0])


class SubGroup:
    """Some ranks of a group, while all others do the same in groups of theirs.

    Every call is one of the whole group: its ranks must make the same ones, in whichever of their
    groups they are.
    """

    def __init__(self, whole: Group, members: Sequence[int]) -> None:
        """Take ranks of ``whole``, this one among them."""
        self.whole = whole
        self.members = tuple(members)
        self.rank = self.members.index(whole.rank)
        self.size = len(self.members)

    def all_gather(self, value: Any) -> list[Any]:
        """Return every member's picklable value, by rank in this group."""
        values = self.whole.all_gather(value)
        return [values[member] for member in self.members]

    def store(self, timeout: timedelta) -> Store:
        """Return the store of the whole group."""
        return self.whole.store(timeout)


def alone_of(group: Group) -> SubGroup:
    """Return this rank as a group of its own, while all ranks of the whole make theirs."""
    whole = whole_of(group)
    return SubGroup(whole, (whole.rank,))


def as_group(group: Any) -> Group:
    """Return the control plane of a process group, communicator or local cluster.

    Raises:
        InvalidArgument: ``group`` is none of them.
    """
    if isinstance(group, dist.ProcessGroup):
        return TorchGroup(group)
    if hasattr(group, "Get_rank") and hasattr(group, "allgather"):
        return MpiGroup(group)
    if all(hasattr(group, name) for name in ("rank", "size", "all_gather", "store")):
        return group  # type: ignore[no-any-return]
    raise InvalidArgument(
        "group: expected a torch.distributed process group, an mpi4py communicator or a group of "
        f"deepcomm.testing.LocalCluster, got {type(group).__name__}"
    )


def agree(group: Group, what: str, produce: Callable[[], T]) -> list[T]:
    """Run ``produce`` on every rank and gather the results; one rank's error ends it on all.

    On all ranks of the whole, where ``group`` is a part of it.

    Raises:
        Exception: Whatever ``produce`` raised, on the rank where it did; CommError naming that rank
            on the others.
    """
    failure: Exception | None = None
    value: T | None = None
    try:
        value = produce()
    except Exception as error:  # noqa: BLE001  # raised below, once the peers know
        failure = error
    whole = whole_of(group)
    entries = whole.all_gather((value, None if failure is None else describe_error(failure)))
    if failure is not None:
        raise failure
    for rank, (_, message) in enumerate(entries):
        if message is not None:
            raise CommError(f"{what}: rank {whole.rank}: rank {rank} failed: {message}", rank)
    return [entries[rank][0] for rank in members_of(group)]


def agree_on(group: Group, what: str, produce: Callable[[], T]) -> T:
    """Run ``produce`` on every rank and return the own result; an error ends it on all.

    Raises:
        Exception: As ``agree`` does.
    """
    results: list[T] = []
    agree(group, what, lambda: results.append(produce()))
    return results[0]


def whole_of(group: Group) -> Group:
    """Return the group that a group is a part of, or itself."""
    return group.whole if isinstance(group, SubGroup) else group


def members_of(group: Group) -> Sequence[int]:
    """Return what the ranks of a group are called in the whole."""
    return group.members if isinstance(group, SubGroup) else range(group.size)


def check_equal(
    what: str, entries: list[dict[str, Any]], ranks: Sequence[int] | None = None
) -> None:
    """Raise ConfigMismatch, alike on every rank, for the first field in which ranks differ.

    Args:
        what: Begins the message.
        entries: Of each rank.
        ranks: What they are called, where that is not 0, 1, ...
    """
    ranks = range(len(entries)) if ranks is None else ranks
    for name, expected in entries[0].items():
        for rank, entry in zip(ranks, entries, strict=True):
            if entry[name] != expected:
                raise ConfigMismatch(
                    f"{what}: {name} differs between ranks: rank {ranks[0]} has {expected!r}, "
                    f"rank {rank} has {entry[name]!r}"
                )


def socket_interface() -> str | None:
    """Return the network interface that the user chose for gloo, if any."""
    return os.environ.get("GLOO_SOCKET_IFNAME")
