# SPDX-License-Identifier: Apache-2.0
"""Why a low-latency operation delivered nothing: what kernels report, as exceptions."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepcomm._C import kernels
from deepcomm.errors import CommError, ConfigMismatch, Error, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable

    from deepcomm.backends.cuda.runtime import HostMemory

__all__ = ["COMBINE", "DISPATCH", "Status", "pack_signature"]

DISPATCH, COMBINE = "low_latency_dispatch", "low_latency_combine"
NAMES = {4: DISPATCH, 5: COMBINE}  # layout::Operation

CLEAR, COMPLETE = 0, 2  # layout::RecordState
BY_HOST, ID_RANGE, ID_TWICE, DIFFERS = 1, 2, 3, 4  # layout::RefusalKind

WIRES = ("bfloat16 rows", "FP8 rows with FP32 scales", "FP8 rows with UE8M0 scales", "?")


@dataclass(frozen=True, slots=True)
class SignatureField:
    """One thing that all ranks of an operation must agree on; bits of a 32-bit word."""

    name: str
    num_bits: int
    values: tuple[str, ...] = ()


FIELDS = (
    SignatureField("operation", 1, (DISPATCH, COMBINE)),
    SignatureField("recv_layout", 1, ("EXPERT_PADDED", "TOKEN")),
    SignatureField("rows", 2, WIRES),
    SignatureField("topk_weights", 1, ("None", "weights")),
    SignatureField("apply_weights", 1, ("False", "True")),
    SignatureField("K", 6),
)


@functools.cache
def pack_signature(**values: int) -> int:
    """Return the word of some fields; the others are 0."""
    word = shift = 0
    for field in FIELDS:
        word |= values.pop(field.name, 0) << shift
        shift += field.num_bits
    assert not values
    return word


def find_difference(mine: int, theirs: int) -> tuple[str, str, str] | None:
    """Return name and values of the first field in which two words differ."""
    shift = 0
    for field in FIELDS:
        own, other = ((word >> shift) & ((1 << field.num_bits) - 1) for word in (mine, theirs))
        shift += field.num_bits
        if own != other:
            names = field.values or tuple(map(str, range(1 << field.num_bits)))
            return field.name, names[own], names[other]
    return None


class _Record(ctypes.Structure):
    """layout::LowLatencyStatus."""

    _fields_ = (
        ("state", ctypes.c_uint32),
        ("kind", ctypes.c_int32),
        ("operation", ctypes.c_int32),
        ("culprit", ctypes.c_int32),
        ("token", ctypes.c_int32),
        ("topk", ctypes.c_int32),
        ("signature", ctypes.c_uint32),
        ("peer_signature", ctypes.c_uint32),
        ("value", ctypes.c_int64),
        ("free", ctypes.c_uint32 * 6),
        ("message", ctypes.c_char * 192),
    )


assert ctypes.sizeof(_Record) == kernels.LOW_LATENCY_STATUS_BYTES


class Status:
    """One rank's status, in memory that kernels write."""

    def __init__(self, memory: HostMemory, rank: int, num_experts: int) -> None:
        """Read what is in ``memory``."""
        self._memory = memory
        self._record = _Record.from_address(memory.address)
        self._rank = rank
        self._num_experts = num_experts

    @property
    def address(self) -> int:
        """As the host sees it."""
        return self._memory.address

    @property
    def device_address(self) -> int:
        """As kernels see it."""
        return self._memory.device_address

    def is_pending(self) -> bool:
        """Whether there is something to raise."""
        state: int = self._record.state
        return state == COMPLETE

    def raise_pending(self) -> None:
        """Raise what the last operations have found to be wrong, once.

        Raises:
            InvalidArgument: An id in this rank's ``topk_idx`` was wrong.
            CommError: A peer refused an operation; names it.
            ConfigMismatch: Ranks differed about an operation.
        """
        if not self.is_pending():
            return
        error = self._describe()
        self._record.state = CLEAR
        raise error

    def raise_earlier(self, is_capturing: Callable[[], bool]) -> None:
        """Raise what an earlier operation has left; in a capture, no turn has been taken yet."""
        if self.is_pending() and not is_capturing():
            self.raise_pending()

    def _describe(self) -> Error:
        record = self._record
        operation = NAMES[record.operation]
        culprit = int(record.culprit)
        if culprit == self._rank:
            return InvalidArgument(self._describe_id())
        where = f"{operation}: rank {self._rank}"
        if record.kind == DIFFERS:
            found = find_difference(record.signature, record.peer_signature)
            name, mine, theirs = found or ("handle", "one dispatch", "another")
            return ConfigMismatch(
                f"{where}: {name} differs between ranks: rank {self._rank} has {mine}, "
                f"rank {culprit} has {theirs}"
            )
        reason = "topk_idx: expected distinct ids in a row, all of them experts or -1"
        if record.kind == BY_HOST:
            reason = record.message.decode(errors="replace")
        return CommError(f"{where}: rank {culprit} refused the operation: {reason}", culprit)

    def _describe_id(self) -> str:
        record = self._record
        place = f"got {record.value} at [{record.token}, {record.topk}]"
        if record.kind == ID_TWICE:
            return f"topk_idx: expected distinct ids in a row, {place} for the second time"
        return f"topk_idx: expected ids in 0..{self._num_experts - 1} or -1, {place}"
