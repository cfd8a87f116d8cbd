# SPDX-License-Identifier: Apache-2.0
"""The gloo rail: point-to-point between the ranks with one local index on all nodes.

A private process group for each pair of ranks: a receive that times out closes all connections of
its group, which must be neither the user's nor those to the other rail peers. Messages between two
ranks are matched by tag; every wait is bounded.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
import weakref
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from deepcomm.errors import CommError, CommTimeout
from deepcomm.group import address_towards, socket_interface

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deepcomm.group import Group
    from deepcomm.topology import Topology

__all__ = ["GlooRail", "RailPolicy", "Transfer"]

LOG = logging.getLogger("deepcomm")
NUM_THREADS = 1  # of each group: for collectives, which nobody calls


@dataclass(frozen=True, slots=True)
class Transfer:
    """A send or receive under way: gloo's work, the peer, and what it is for."""

    work: Any
    peer: int
    what: str
    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class RailPolicy:
    """How long a wait may take, and when the peer counts as late."""

    timeout_s: float
    late_warning_s: float


class LateWatch:
    """Logs a transfer that is waited for too long, from a thread: gloo's wait cannot be sliced."""

    def __init__(self, rank: int, policy: RailPolicy) -> None:
        """Start watching for a rank's waits."""
        self._rank = rank
        self._policy = policy
        self._current: tuple[Transfer, float] | None = None
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="deepcomm-late-watch", daemon=True).start()

    @contextlib.contextmanager
    def watching(self, transfer: Transfer) -> Iterator[None]:
        """Watch a wait."""
        self._current = (transfer, time.monotonic())
        try:
            yield
        finally:
            self._current = None

    def _run(self) -> None:
        warned: tuple[Transfer, float] | None = None
        while not self._stopped.wait(self._policy.late_warning_s / 4):
            current = self._current
            if current is None or current is warned:
                continue
            transfer, start = current
            if time.monotonic() - start >= self._policy.late_warning_s:
                warned = current
                LOG.warning(
                    "%s: rank %d: rank %d is late: waiting since %g s (fatal after %g s)",
                    transfer.what,
                    self._rank,
                    transfer.peer,
                    self._policy.late_warning_s,
                    self._policy.timeout_s,
                )

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()


class GlooRail:
    """Transport to the rail peers of one rank, numbered by node."""

    def __init__(self, group: Group, topology: Topology, policy: RailPolicy, name: str) -> None:
        """Connect to the rail peers; collective over ``group``, which gives the store."""
        timeout = timedelta(seconds=policy.timeout_s)
        store = group.store(timeout)
        self._topology = topology
        self._policy = policy
        self._watch = LateWatch(topology.rank, policy)
        self.address = rail_address(store)
        # The only way to pick a device.
        options: Any = getattr(dist.ProcessGroupGloo, "_Options")()  # noqa: B009  # not in its stub
        options._devices = [rail_device(self.address)]
        options._threads = NUM_THREADS
        options._timeout = timeout
        # Held in one place, and let go before the interpreter ends: gloo's threads do not survive
        # its shutdown.
        self._groups: dict[int, Any] = {}
        weakref.finalize(self, self._groups.clear)
        try:
            # Ascending on all ranks: pairs connect in one global order, and never wait in a circle.
            for node in range(topology.num_nodes):
                if node != topology.node:
                    low, high = sorted((node, topology.node))
                    prefix = PrefixStore(f"{name}/rail{topology.local}/{low}-{high}", store)
                    self._groups[node] = dist.ProcessGroupGloo(prefix, int(node == low), 2, options)
        except RuntimeError as error:
            raise CommError(
                f"rail: rank {topology.rank}: cannot connect to ranks {topology.rail_ranks} from "
                f"{self.address}: {error}; GLOO_SOCKET_IFNAME chooses another interface"
            ) from error

    def send(self, node: int, tensor: torch.Tensor, tag: int, what: str) -> Transfer:
        """Start sending a tensor, which must stay unchanged until the transfer is waited for."""
        return self._start("send", node, tensor, tag, what)

    def recv(self, node: int, tensor: torch.Tensor, tag: int, what: str) -> Transfer:
        """Start receiving into a tensor of the size that is sent."""
        return self._start("recv", node, tensor, tag, what)

    def _start(self, name: str, node: int, tensor: torch.Tensor, tag: int, what: str) -> Transfer:
        peer = self._topology.rank_of(node, self._topology.local)
        try:
            other = int(node > self._topology.node)  # its rank in the group of the pair
            work = getattr(self._groups[node], name)([tensor], other, tag)
            return Transfer(work, peer, what, tensor)
        except RuntimeError as error:
            raise self._lost(peer, what, error) from error

    def wait(self, transfer: Transfer, patience: int = 1) -> None:
        """Wait for a transfer.

        Raises:
            CommTimeout: The peer did not come within ``patience`` timeouts.
            CommError: The connection to the peer is lost.
        """
        start = time.perf_counter()
        timeout_s = self._policy.timeout_s * patience
        with self._watch.watching(transfer):
            try:
                transfer.work.wait(timedelta(seconds=timeout_s))
            except RuntimeError as error:
                if time.perf_counter() - start >= timeout_s * 0.99:
                    message = (
                        f"{transfer.what}: rank {self._topology.rank}: rank {transfer.peer} did "
                        f"not come within {timeout_s:g} s"
                    )
                    raise CommTimeout(message, transfer.peer) from error
                raise self._lost(transfer.peer, transfer.what, error) from error

    def _lost(self, peer: int, what: str, error: RuntimeError) -> CommError:
        # Without the place in gloo's source, and what gloo guesses at.
        reason = re.sub(r"^\[[^]]*\] ", "", str(error)).partition(". This is ")[0]
        message = (
            f"{what}: rank {self._topology.rank}: the connection to rank {peer} is lost: {reason}"
        )
        return CommError(message, peer)

    def close(self) -> None:
        """Drop the connections: peers that wait for this rank notice."""
        self._watch.stop()
        self._groups.clear()


def rail_address(store: Store) -> str:
    """Return the interface or address that the rail binds to."""
    chosen = socket_interface()
    if chosen is not None:
        return chosen
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return address_towards(store.host) if isinstance(store, TCPStore) else "127.0.0.1"


def rail_device(address: str) -> Any:
    """Return gloo's device for an interface name or an address."""
    if socket_interface() is not None:
        return dist.ProcessGroupGloo.create_device(interface=address)
    return dist.ProcessGroupGloo.create_device(hostname=address)
