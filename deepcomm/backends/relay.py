# SPDX-License-Identifier: Apache-2.0
"""What crosses the rails in the operations of the CPU backend: announcements, records, aborts."""

from __future__ import annotations

import contextlib
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deepcomm._C import cpu
from deepcomm.errors import CommError, CommTimeout, Error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from deepcomm.backends.rail import GlooRail, Transfer
    from deepcomm.topology import Topology

__all__ = ["LL_ROWS", "LL_WEIGHTS", "Envelope", "Header", "Leg", "Relay", "Settled"]

CHUNK_BYTES = 1 << 20
LOOKAHEAD = 2
TAGS_PER_EPOCH = 16
MAX_EPOCH_TAG = 1 << 26

ANNOUNCE, PAYLOAD = 0, 1
LL_ROWS, LL_WEIGHTS = 8, 10  # each a header, and a payload under the next number


@dataclass(frozen=True, slots=True)
class Envelope:
    """Which message: with the rail peer on ``node``, in one phase of an operation."""

    node: int
    epoch: int
    phase: int
    what: str

    @property
    def tag(self) -> int:
        """Number that tells it from the other messages between the two ranks."""
        return self.epoch % MAX_EPOCH_TAG * TAGS_PER_EPOCH + self.phase


@dataclass(frozen=True, slots=True)
class Leg:
    """Records that flow one way between this rank and a rail peer.

    ``handle(begin, end, address)`` packs records into memory, or takes them out of it.
    """

    node: int
    num_rows: int
    handle: Callable[[int, int, int], None]


@dataclass(frozen=True, slots=True)
class Header:
    """First message of a low-latency transfer: what follows, or why nothing does.

    Attributes:
        num_rows: Rows that follow in one message; none if 0.
        row_bytes: Bytes of each.
        signature: What the sender asks for, to be compared by the receiver; empty if it refuses.
        refusal: Why the operation is refused; empty if it is not.
        refused_by: Rank that refuses: the sender, or one of its node; -1 where the ranks' arguments
            differ.
    """

    num_rows: int = 0
    row_bytes: int = 0
    signature: bytes = b""
    refusal: str = ""
    refused_by: int = -1

    def pack(self) -> torch.Tensor:
        """Return the header as bytes."""
        numbers = self.num_rows, self.row_bytes, self.refused_by, len(self.signature)
        data = HEADER.pack(*numbers, self.signature, self.refusal.encode())
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    @staticmethod
    def empty() -> torch.Tensor:
        """Return memory to receive a header into."""
        return torch.empty(HEADER.size, dtype=torch.uint8)

    @staticmethod
    def unpack(data: torch.Tensor) -> Header:
        """Return the header in ``data``."""
        num_rows, row_bytes, refused_by, size, signature, text = HEADER.unpack(
            data.numpy().tobytes()
        )
        refusal = text.rstrip(b"\0").decode(errors="replace")
        return Header(num_rows, row_bytes, signature[:size], refusal, refused_by)


HEADER = struct.Struct(f"<qqqq{cpu.SIGNATURE_BYTES}s320s")


class Relay:
    """Moves an operation's messages over the rail of one rank; does nothing on a single node."""

    def __init__(self, rail: GlooRail | None, topology: Topology, endpoint: cpu.Endpoint) -> None:
        """Use a rail, or none where there is one node."""
        self._rail = rail
        self._topology = topology
        self._endpoint = endpoint
        # Each rank begins with its next node: no peer is everyone's first.
        others = range(1, topology.num_nodes)
        self.other_nodes = [(topology.node + step) % topology.num_nodes for step in others]

    @property
    def rank(self) -> int:
        """This rank."""
        return self._topology.rank

    def peer(self, node: int) -> int:
        """Return the rank of the rail peer on ``node``."""
        return self._topology.rank_of(node, self._topology.local)

    @contextlib.contextmanager
    def _connection(self, tolerant: bool) -> Iterator[GlooRail]:
        """Give the rail; what fails on it fails the endpoint, unless the caller masks the peer."""
        assert self._rail is not None
        try:
            yield self._rail
        except CommError as error:
            if tolerant:
                raise
            self._blame_first_failure(error)
            self._endpoint.fail(str(error), -1 if error.peer is None else error.peer)
            raise

    def _blame_first_failure(self, error: CommError) -> None:
        """Name who failed first: a peer that drops its connections may do so for another's sake.

        Some rank of this node is a rail peer of that one and knows.
        """
        culprit = -1 if isinstance(error, CommTimeout) else self._endpoint.find_culprit()
        if culprit not in (-1, error.peer):
            error.peer = culprit
            error.args = (f"{error}; rank {culprit} failed first",)

    def send(self, to: Envelope, data: torch.Tensor, *, tolerant: bool = False) -> Transfer:
        """Start sending; ``tolerant`` where a lost peer is masked."""
        with self._connection(tolerant) as rail:
            return rail.send(to.node, data, to.tag, to.what)

    def recv(self, of: Envelope, data: torch.Tensor, *, tolerant: bool = False) -> Transfer:
        """Start receiving."""
        with self._connection(tolerant) as rail:
            return rail.recv(of.node, data, of.tag, of.what)

    def wait(
        self, transfer: Transfer, *, tolerant: bool = False, patience: int = 1
    ) -> torch.Tensor:
        """Wait for a transfer, count the time, and return its tensor."""
        start = time.perf_counter()
        try:
            with self._connection(tolerant) as rail:
                rail.wait(transfer, patience)
        finally:
            waited_us = int((time.perf_counter() - start) * 1e6)
            self._endpoint.counters.add_wait(transfer.peer, waited_us)
        return transfer.tensor

    def exchange_announcements(self, round_: cpu.Round, what: str) -> None:
        """Pass this rank's announcement to its rail peers, and theirs on to this node."""
        if self._rail is None:
            return
        data = torch.frombuffer(bytearray(round_.serialized()), dtype=torch.uint8)
        envelopes = [Envelope(node, round_.epoch, ANNOUNCE, what) for node in self.other_nodes]
        receives = [self.recv(envelope, torch.empty_like(data)) for envelope in envelopes]
        sends = [self.send(envelope, data) for envelope in envelopes]
        for envelope, transfer in zip(envelopes, receives, strict=True):
            round_.relay(envelope.node, self.wait(transfer).numpy().tobytes())
        for transfer in sends:
            self.wait(transfer)

    def exchange_records(
        self, outgoing: list[Leg], incoming: list[Leg], record_bytes: int, epoch: int, what: str
    ) -> None:
        """Stream records both ways in chunks, a bounded number of them in flight.

        All ranks step through chunk numbers together: the rank with the smallest number always
        finds its peers' chunks posted, so the exchange cannot lock up whatever the row counts.
        """
        rows = max(1, CHUNK_BYTES // record_bytes)
        num_steps = max((-(-leg.num_rows // rows) for leg in (*outgoing, *incoming)), default=0)
        receiving: dict[int, list[tuple[Leg, int, int, Transfer]]] = {}
        sending: dict[int, list[Transfer]] = {}

        def post(step: int) -> None:
            receiving[step] = [
                (leg, begin, end, self.recv(Envelope(leg.node, epoch, PAYLOAD, what), chunk))
                for leg, begin, end, chunk in chunks_of(incoming, step, rows, record_bytes)
            ]
            sending[step] = []
            for leg, begin, end, chunk in chunks_of(outgoing, step, rows, record_bytes):
                leg.handle(begin, end, chunk.data_ptr())
                sending[step].append(self.send(Envelope(leg.node, epoch, PAYLOAD, what), chunk))

        for step in range(-LOOKAHEAD, num_steps):
            if step + LOOKAHEAD < num_steps:
                post(step + LOOKAHEAD)
            for leg, begin, end, transfer in receiving.pop(step, ()):
                leg.handle(begin, end, self.wait(transfer).data_ptr())
            for transfer in sending.pop(step, ()):
                self.wait(transfer)

    def settle(self, error: BaseException, what: str, *, unfinished: bool = True) -> None:
        """See to what an error that leaves an operation means for the endpoint and its rails.

        One that deepcomm does not raise on purpose (out of memory, Ctrl-C between two steps) and
        that leaves the operation unfinished fails the endpoint: the peers must not wait for the
        rest.
        """
        if unfinished and not isinstance(error, Error):
            message = f"{what}: rank {self.rank}: interrupted by {type(error).__name__}: {error}"
            self._endpoint.fail(message, self.rank)
        if self._endpoint.failed:
            self.close()

    def close(self) -> None:
        """Drop the connections."""
        if self._rail is not None:
            self._rail.close()


class Settled:
    """Context whose errors are settled; a class, as entering a generator takes thrice as long."""

    __slots__ = ("_name", "_relay")

    def __init__(self, relay: Relay, name: str) -> None:
        """Settle errors of the operation ``name``."""
        self._relay = relay
        self._name = name

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self, kind: object, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """See to what an error means; it leaves in any case."""
        if error is not None:
            self._relay.settle(error, self._name)


def chunks_of(
    legs: list[Leg], step: int, rows: int, record_bytes: int
) -> Iterator[tuple[Leg, int, int, torch.Tensor]]:
    """Yield chunk number ``step`` of every leg that has one, with memory for it."""
    for leg in legs:
        begin, end = step * rows, min((step + 1) * rows, leg.num_rows)
        if begin < end:
            yield leg, begin, end, torch.empty((end - begin) * record_bytes, dtype=torch.uint8)
