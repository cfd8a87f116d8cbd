# SPDX-License-Identifier: Apache-2.0
"""Descriptors between the processes of a host: each one sends one to every other, by a deadline."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepcomm.errors import CommError, CommTimeout

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Address", "Mailbox"]

SECRET_BYTES = 16
HEAD = struct.Struct(f"{SECRET_BYTES}si")  # the receiver's secret, the sender's rank
POLL_S = 0.002


@dataclass(frozen=True, slots=True)
class Address:
    """Where a mailbox is, and what shows it that a message comes from a peer."""

    name: bytes
    secret: bytes


class Mailbox:
    """A datagram socket without a name in the file system: the kernel removes all of it."""

    def __init__(self) -> None:
        """Open a mailbox at a fresh address."""
        self.address = Address(b"\0deepcomm-" + os.urandom(16), os.urandom(SECRET_BYTES))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.bind(self.address.name)
            self._socket.setblocking(False)
        except OSError:
            self._socket.close()
            raise

    def close(self) -> None:
        """Drop what has not been read; idempotent."""
        self._socket.close()

    def exchange(
        self, rank: int, descriptor: int, peers: Mapping[int, Address], timeout_s: float
    ) -> dict[int, int]:
        """Send a descriptor to each peer, and return those that they sent, for the caller to close.

        Raises:
            CommTimeout: A peer did not send or read in time.
            CommError: A peer's mailbox is gone.
        """
        unsent, received = dict(peers), dict[int, int]()
        try:
            deadline = time.monotonic() + timeout_s
            while missing := self._advance(rank, descriptor, peers, unsent, received):
                if time.monotonic() > deadline:
                    break
                select.select([self._socket], [], [], POLL_S)
        except BaseException:
            close_all(received)
            raise
        if missing:
            close_all(received)
            raise CommTimeout(
                f"symmetric memory: rank {rank}: no descriptor exchanged with rank {min(missing)} "
                f"within {timeout_s:g} s",
                min(missing),
            )
        return received

    def _advance(
        self,
        rank: int,
        descriptor: int,
        peers: Mapping[int, Address],
        unsent: dict[int, Address],
        received: dict[int, int],
    ) -> set[int]:
        """Send and receive what can be; return the peers that are not done."""
        self._send(rank, descriptor, unsent)
        self._receive(peers, received)
        return unsent.keys() | (peers.keys() - received.keys())

    def _send(self, rank: int, descriptor: int, unsent: dict[int, Address]) -> None:
        """Send to every peer that has room."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [descriptor]))]
        for peer, address in list(unsent.items()):
            message = HEAD.pack(address.secret, rank)
            try:
                # NOTE: socket.send_fds ignores the address that it is given.
                self._socket.sendmsg([message], rights, 0, address.name)
            except BlockingIOError:
                continue  # it must read first, and so must we meanwhile
            except (ConnectionRefusedError, FileNotFoundError):
                raise CommError(
                    f"symmetric memory: rank {rank}: rank {peer} is gone", peer
                ) from None
            del unsent[peer]

    def _receive(self, peers: Mapping[int, Address], received: dict[int, int]) -> None:
        """Read all that is there; what no peer sent is closed."""
        while True:
            try:
                message, descriptors, _, _ = socket.recv_fds(self._socket, HEAD.size + 1, 1)
            except BlockingIOError:
                return
            sender = self._sender(message)
            if len(descriptors) == 1 and sender in peers and sender not in received:
                os.set_inheritable(descriptors[0], False)
                received[sender] = descriptors[0]
            else:
                close_all(dict(enumerate(descriptors)))

    def _sender(self, message: bytes) -> int:
        """Return the rank that a message comes from, -1 if from nobody we know."""
        if len(message) != HEAD.size:
            return -1
        secret, sender = HEAD.unpack(message)
        return int(sender) if secret == self.address.secret else -1


def close_all(descriptors: Mapping[int, int]) -> None:
    """Close descriptors, by rank."""
    for descriptor in descriptors.values():
        os.close(descriptor)
