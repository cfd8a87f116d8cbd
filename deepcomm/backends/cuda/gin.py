# SPDX-License-Identifier: Apache-2.0
"""``GinNetwork``: moves by a kernel of ours, the rail agent, over NCCL's device API.

The host writes what a move is made of where the agent reads it, and launches: nothing goes through
NCCL's host code any more. csrc/kernels/PROTOCOLS.md: moves over GIN.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import struct
import threading
import time
import weakref
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Final

from deepcomm._C import kernels
from deepcomm.backends.cuda.gin_record import MoveRecord
from deepcomm.backends.cuda.gin_windows import Windows
from deepcomm.backends.cuda.progress import PATIENCE, watch
from deepcomm.errors import CommError, CommTimeout, Error, InvalidArgument
from deepcomm.group import agree_on, alone_of, members_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deepcomm._C import nccl
    from deepcomm.backends.cuda.network import Message, Span
    from deepcomm.backends.cuda.runtime import Function, Runtime
    from deepcomm.group import Group

__all__ = ["Endpoint", "GinNetwork"]

NUM_SLOTS: Final = 32
"""Moves that the host may be ahead of the device."""
GRACE_S: Final = 5.0
"""How long agents may take to leave once they are told to."""
POLL_S: Final = 0.001
HEAD = struct.Struct("<ihhQQQ")  # of layout::GinPeer
SPANS = struct.Struct(f"<{3 * kernels.GIN_MOST_SPANS}q")

logger = logging.getLogger("deepcomm")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A rank's communicator, made for the agent.

    Attributes:
        communicator: The host's.
        device: What kernels use of it.
        dev_comm: The bytes that the agent gets.
        label: NCCL's version and file, and the class of what it sends.
    """

    communicator: nccl.Communicator
    device: nccl.DeviceCommunicator
    dev_comm: bytes
    label: str


def offset_of(number: int) -> int:
    """Return where the word of a move lies that says that it has ended."""
    return 8 * (number % NUM_SLOTS)


class Moves:
    """Moves that were launched, and how far the device has come with them.

    Attributes:
        number: Of the last one.
        record: Of what has gone wrong.
    """

    def __init__(self, runtime: Runtime, record: MoveRecord) -> None:
        """Reserve what agents write to."""
        self.number = 0
        self.record = record
        self._runtime = runtime
        self._done = runtime.host_memory(8 * NUM_SLOTS)

    def done_device_address(self, number: int) -> int:
        """Return where the agent of a move says that it has ended."""
        return self._done.device_address + offset_of(number)

    def wait(self, number: int, limit_s: float) -> bool:
        """Return whether a move ended in time, and none has failed before that."""
        address = self._done.address + offset_of(number)
        return self._runtime.wait_word(address, number, self.record.address, limit_s)

    def is_idle(self) -> bool:
        """Return whether all have ended."""
        last = self._done.address + offset_of(self.number)
        return ctypes.c_uint64.from_address(last).value == self.number

    def end(self) -> None:
        """Let agents leave that have not ended, and wait for those that run.

        They must not find their communicator gone.
        """
        if self.is_idle():
            return
        self.record.abort()
        self._runtime.flush()
        limit = time.monotonic() + GRACE_S
        while not self.is_idle() and time.monotonic() < limit:
            time.sleep(POLL_S)

    def end_quietly(self, ended: threading.Event) -> None:
        """Do the same for a network that nobody has closed, and nobody hears of.

        Args:
            ended: Is set first, so that nobody takes it for a failure.
        """
        ended.set()
        try:
            self.end()
        except Exception as error:  # noqa: BLE001  # a finalizer has nobody to raise it to
            logger.warning("a network that nobody has closed did not end: %s", error)


class GinNetwork:
    """The ranks of a group, and the rail agent between their devices."""

    def __init__(
        self,
        group: Group,
        runtime: Runtime,
        endpoint: Endpoint,
        agent: Function,
        timeout_s: float,
    ) -> None:
        """Reserve what the agent works with; collective."""
        self._runtime = runtime
        self._endpoint = endpoint
        self._agent = agent
        self._timeout_s = timeout_s
        self._group = group
        self._failed_address = 0
        self._is_closed = False
        self._ended = threading.Event()
        weakref.finalize(self, self._ended.set)
        self._puts, self._sends, self._receives = ([0] * group.size for _ in range(3))
        control_bytes = kernels.gin_control_bytes(group.size)
        self._control = runtime.symmetric_memory(alone_of(group), control_bytes, timeout_s)
        try:
            agree_on(group, "rail", self._prepare)
            self.register(self._control.bases[0], control_bytes)
        except BaseException:
            self._control.close()
            raise

    def _prepare(self) -> None:
        runtime, group = self._runtime, self._group
        self._record = MoveRecord(runtime, members_of(group), PATIENCE * self._timeout_s)
        self._windows = Windows(runtime, self._endpoint.device, self._timeout_s)
        self._dev_comm = runtime.upload(self._endpoint.dev_comm)
        self._slot_bytes = kernels.GIN_PEER_BYTES * max(1, group.size - 1)
        self._slots = runtime.host_memory(NUM_SLOTS * self._slot_bytes)
        self._moves = Moves(runtime, self._record)
        self._finalizer = weakref.finalize(self, self._moves.end_quietly, self._ended)
        self._finalizer.atexit = False

    @property
    def name(self) -> str:
        """The ``rail`` of a buffer that this is."""
        return "gin"

    def register(self, address: int, num_bytes: int) -> None:
        """Let moves use memory, as much on every rank; collective."""
        try:
            agree_on(self._group, "rail", lambda: self._windows.add(address, num_bytes))
        except Error:
            with contextlib.suppress(Error):
                self._windows.remove(address)
            raise

    def deregister(self, address: int) -> None:
        """Wait for moves under way; use the memory no more."""
        if self._is_closed or self._record.is_set:
            return
        try:
            self._await_moves()
            self._windows.remove(address)
        except Error as error:
            logger.warning("a rail kept memory: %s", error)

    # ---- moves

    def move(self, messages: Sequence[Message]) -> None:
        """Launch the agent for all sends and receives, on the current stream."""
        self._check()
        entries = [entry for message in messages if (entry := self._entry(message)) is not None]
        if not entries:
            return
        number = self._moves.number + 1
        slot = number % NUM_SLOTS
        if number > NUM_SLOTS:
            self._await(number - NUM_SLOTS, "an earlier move")
        content = b"".join(self._pack(*entry) for entry in entries)
        ctypes.memmove(self._slots.address + slot * self._slot_bytes, content, len(content))
        params = kernels.GinParams()
        params.set_comm(
            self._group.rank,
            self._group.size,
            int(PATIENCE * self._timeout_s * 1e9),
            self._record.device_address,
            self._failed_address,
        )
        params.dev_comm = self._dev_comm.address
        params.windows = self._windows.device_address
        params.control = self._control.bases[0]
        params.peers = self._slots.device_address + slot * self._slot_bytes
        params.num_peers = len(entries)
        params.number = self._moves.number = number
        params.done = self._moves.done_device_address(number)
        self._runtime.launch(self._agent, 1, params)

    def _entry(self, message: Message) -> tuple[int, list[int], list[int]] | None:
        """Return what goes to a peer and comes from it; None where that is nothing."""
        peer = message.peer
        if not 0 <= peer < self._group.size or peer == self._group.rank:
            raise InvalidArgument(f"peer: expected another of {self._group.size} ranks, got {peer}")
        sends, receives = self._spans(message.sends), self._spans(message.receives)
        return (peer, sends, receives) if sends or receives else None

    def _spans(self, spans: Sequence[Span]) -> list[int]:
        """Return window, offset and size of each span that is not empty, one after the other."""
        full = [span for span in spans if span.num_bytes > 0]
        if len(full) > kernels.GIN_MOST_SPANS:
            raise InvalidArgument(
                f"spans: expected at most {kernels.GIN_MOST_SPANS} that are not empty, "
                f"got {len(full)}"
            )
        return list(chain.from_iterable(map(self._windows.place, full)))

    def _pack(self, peer: int, sends: list[int], receives: list[int]) -> bytes:
        """Return a layout::GinPeer; counts what it stands for."""
        num_puts = self._puts[peer]
        pieces = sum(-(-size // kernels.GIN_PUT_BYTES) for size in sends[2::3])
        self._puts[peer] += pieces + bool(receives)
        self._sends[peer] += bool(sends)
        self._receives[peer] += bool(receives)
        head = HEAD.pack(
            peer,
            len(sends) // 3,
            len(receives) // 3,
            num_puts,
            self._sends[peer],
            self._receives[peer],
        )
        rest = (
            SPANS.pack(*spans, *[0] * (SPANS.size // 8 - len(spans))) for spans in (sends, receives)
        )
        return head + b"".join(rest)

    def _check(self) -> None:
        if self._is_closed:
            raise CommError("rail: the network is closed")
        if (error := self._record.error()) is not None:
            raise error

    def _await(self, number: int, what: str) -> None:
        """Wait for the end of a move, as long as agents may wait."""
        limit_s = PATIENCE * self._timeout_s + GRACE_S
        if not self._moves.wait(number, limit_s):
            self._check()
            raise CommTimeout(f"rail: {what} did not end within {limit_s:g} s")

    def _await_moves(self) -> None:
        if self._moves.number > 0:
            self._await(self._moves.number, "a move")

    # ---- the end

    def abort(self) -> None:
        """Let agents leave; from any thread; idempotent."""
        self._record.abort()

    def fail_with(self, address: int) -> None:
        """Set a word on the device, too, where a move does not come about."""
        self._failed_address = address

    def watch(self, has_failed: Callable[[], bool], condemn: Callable[[Error], None]) -> None:
        """Abort once ``has_failed()``; tell what a move has run into by itself."""
        record = self._record

        def is_over() -> bool:
            # An abort follows a failure that is known already, or the end.
            if has_failed() or record.is_aborted:
                return True
            if (error := record.error()) is None:
                return False
            condemn(error)
            return True

        watch(self.name, is_over, record.abort, self._ended)

    def close(self) -> None:
        """Wait for this rank's moves and leave; idempotent."""
        if self._is_closed:
            return
        if not self._record.is_set:
            with contextlib.suppress(Error):  # it is in the record, or abort puts it there
                self._await_moves()
        trouble = self._leave()
        self._finalizer.detach()
        self._is_closed = True
        self._ended.set()
        if trouble:
            logger.warning("a network was closed by force: %s", trouble)
        self._control.close()

    def _leave(self) -> str:
        """End the communicator; returns what went wrong, or nothing."""
        endpoint = self._endpoint
        if self._record.is_set or not self._moves.is_idle():
            self._moves.end()
            endpoint.communicator.abort()
            return str(self._record.error() or "")
        try:
            endpoint.device.close(self._timeout_s)
        except Error as error:
            endpoint.communicator.abort()
            return str(error)
        return endpoint.communicator.close(self._timeout_s)

    def describe(self) -> str:
        """Return NCCL's version and file."""
        return f"GIN of {self._endpoint.label}"
