# SPDX-License-Identifier: Apache-2.0
"""The messages of one low-latency operation between a rank and its rail peers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from deepcomm._C import cpu
from deepcomm.backends.relay import Envelope, Header
from deepcomm.errors import CommError, ConfigMismatch, Error, describe_error

if TYPE_CHECKING:
    from deepcomm.backends.rail import Transfer
    from deepcomm.backends.relay import Relay

__all__ = ["RailOperation"]


class RailOperation:
    """The messages of one low-latency operation between this rank and its rail peers."""

    def __init__(
        self,
        relay: Relay,
        ring: cpu.SlotRing,
        name: str,
        epoch: int,
        *,
        signature: bytes = b"",
        mask_late: bool = False,
    ) -> None:
        """Prepare; nothing is sent yet."""
        self.relay = relay
        self._ring = ring
        self._name = name
        self._epoch = epoch
        self._signature = signature
        self._mask_late = mask_late
        self._sends: list[Transfer] = []
        self.nodes = [node for node in relay.other_nodes if self._alive(node)]

    def _alive(self, node: int) -> bool:
        return not self._ring.is_masked(self.relay.peer(node))

    def send(self, node: int, phase: int, data: torch.Tensor, num_rows: int) -> None:
        """Start sending a header and ``data``, ``num_rows`` rows, if there are any."""
        row_bytes = data.numel() // num_rows if num_rows else 0
        header = Header(num_rows, row_bytes, self._signature)
        self._start(node, phase, header.pack())
        if num_rows:
            self._start(node, phase + 1, data)

    def refuse(self, node: int, phase: int, error: Exception) -> None:
        """Send instead why the operation is refused, by this rank or another of its node."""
        refused_by = self.relay.rank
        if isinstance(error, ConfigMismatch):
            refused_by = -1
        elif isinstance(error, CommError) and error.peer is not None:
            refused_by = error.peer
        self._start(
            node, phase, Header(refusal=describe_error(error), refused_by=refused_by).pack()
        )

    def _envelope(self, node: int, phase: int) -> Envelope:
        return Envelope(node, self._epoch, phase, self._name)

    def _start(self, node: int, phase: int, data: torch.Tensor) -> None:
        envelope = self._envelope(node, phase)
        try:
            self._sends.append(self.relay.send(envelope, data, tolerant=self._mask_late))
        except CommError:
            self._mask_or_raise(node)

    def receive(
        self, node: int, phase: int, *, patience: int = 1
    ) -> tuple[Header, torch.Tensor | None]:
        """Wait for a header and the rows that follow it, as bytes.

        A late or lost peer is masked where that is asked for, and counts as sending nothing. It is
        late after ``patience`` timeouts: more than one where it may itself wait for a late rank.
        """
        if not self._alive(node):
            return Header(), None
        try:
            header = Header.unpack(self._take(node, phase, Header.empty(), patience))
            if header.num_rows == 0:
                return header, None
            size = header.num_rows * header.row_bytes
            return header, self._take(node, phase + 1, torch.empty(size, dtype=torch.uint8))
        except CommError:
            self._mask_or_raise(node)
            return Header(), None

    def _take(self, node: int, phase: int, data: torch.Tensor, patience: int = 1) -> torch.Tensor:
        envelope, tolerant = self._envelope(node, phase), self._mask_late
        transfer = self.relay.recv(envelope, data, tolerant=tolerant)
        return self.relay.wait(transfer, tolerant=tolerant, patience=patience if tolerant else 1)

    def _mask_or_raise(self, node: int) -> None:
        """Inside an except clause: mask the rail peer on ``node``, or let the error out."""
        if not self._mask_late:
            raise
        self._ring.set_masked(self.relay.peer(node), True)

    def problem(self, node: int, header: Header) -> Error | None:
        """Return the error that a header means, if any."""
        if header.refusal and header.refused_by < 0:
            return ConfigMismatch(header.refusal)
        if header.refusal:
            message = f"rank {header.refused_by} refused the operation: {header.refusal}"
            return CommError(f"{self._name}: {message}", header.refused_by)
        if header.signature:
            try:
                peer = self.relay.peer(node)
                cpu.check_same_signature(self._signature, self.relay.rank, header.signature, peer)
            except ConfigMismatch as error:
                return error
        return None

    def finish(self) -> None:
        """Wait until everything sent has left."""
        for transfer in self._sends:
            try:
                self.relay.wait(transfer, tolerant=self._mask_late)
            except CommError:
                if not self._mask_late:
                    raise
                self._ring.set_masked(transfer.peer, True)
