# SPDX-License-Identifier: Apache-2.0
"""What kernels leave behind when something went wrong, and the exception that follows from it.

Two places in memory that kernels and host share: the error record (layout/error_record.hpp) of a
wait that ran out, after which the buffer can only be closed; and the trouble (kernels/meet) of an
operation that did not take place because a rank refused or differed, after which it goes on.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, NamedTuple

from deepcomm.errors import CommError, CommTimeout, ConfigMismatch, Error, InternalError
from deepcomm.errors import InvalidArgument as InvalidArgumentError

if TYPE_CHECKING:
    from deepcomm.backends.cuda.runtime import HostMemory, Memory, Runtime

__all__ = ["ErrorRecord", "Failure", "FailureMemory", "Signature", "Trouble"]

CLEAR, COMPLETE = 0, 2
WORD_BYTES = 8
OPERATIONS = (
    "probe",
    "barrier",
    "dispatch",
    "combine",
    "low_latency_dispatch",
    "low_latency_combine",
    "move",
)
ROLES = ("count", "send", "receive", "reduce", "forward", "meet")
KIND_CHECK = 1

GOOD, REFUSED, MISMATCH, MUST_GROW = 0, 1, 2, 3
REFUSED_BY_HOST, EXPERT_OUT_OF_RANGE, EXPERT_TWICE = 1, 2, 4
UNRAISED_TROUBLE, UNMADE_HANDLE = 8, 16
FAILED_BEFORE = 32  # in a stage that this rank was not in


class ErrorRecord(ctypes.Structure):
    """layout::ErrorRecord."""

    _fields_ = (
        ("state", ctypes.c_uint32),
        ("kind", ctypes.c_int32),
        ("operation", ctypes.c_int32),
        ("role", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("peer", ctypes.c_int32),
        ("slot", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("expected", ctypes.c_uint64),
        ("observed", ctypes.c_uint64),
        ("is_condemned", ctypes.c_uint32),
        ("free", ctypes.c_uint32 * 3),
    )


class Header(ctypes.Structure):
    """kernels::Header."""

    _fields_ = (
        ("signature", ctypes.c_uint32),
        ("capacity", ctypes.c_int32),
        ("num_tokens", ctypes.c_int32),
        ("landing", ctypes.c_uint32),
        ("alignment", ctypes.c_int32),
        ("refusal", ctypes.c_uint32),
    )


class Trouble(ctypes.Structure):
    """kernels::Trouble."""

    _fields_ = (
        ("state", ctypes.c_uint32),
        ("status", ctypes.c_uint32),
        ("culprit", ctypes.c_int32),
        ("max_tokens", ctypes.c_int32),
        ("mine", Header),
        ("theirs", Header),
    )


class Signature(NamedTuple):
    """What all ranks of an operation ask for alike; packed into 32 bits of the header."""

    operation: int  # 0 dispatch, 1 cached dispatch, 2 combine
    layout: int
    wire: int
    scales: int
    has_weights: int
    apply_weights: int
    num_topk: int
    handle: int

    def pack(self) -> int:
        """Return the header's word."""
        word = shift = 0
        for value, bits in zip(self, SIGNATURE_BITS, strict=True):
            word |= (value & ((1 << bits) - 1)) << shift
            shift += bits
        return word

    @staticmethod
    def unpack(word: int) -> Signature:
        """Return the fields of a header's word."""
        values = []
        for bits in SIGNATURE_BITS:
            values.append(word & ((1 << bits) - 1))
            word >>= bits
        return Signature(*values)


SIGNATURE_BITS = (2, 2, 2, 2, 1, 1, 6, 16)
VALUE_NAMES: dict[str, tuple[str, ...]] = {
    "operation": ("dispatch", "cached dispatch", "combine", "?"),
    "layout": ("TOKEN", "EXPERT", "EXPERT_PADDED", "?"),
    "wire": ("bfloat16 rows", "FP8 rows", "bfloat16 rows cast to FP8", "?"),
    "scales": ("none", "fp32", "ue8m0", "?"),
}


class FailureMemory(NamedTuple):
    """What kernels write to, zeroed."""

    record: HostMemory
    trouble: HostMemory
    words: Memory

    @staticmethod
    def reserve(runtime: Runtime) -> FailureMemory:
        """Reserve it."""
        return FailureMemory(
            runtime.host_memory(ctypes.sizeof(ErrorRecord)),
            runtime.host_memory(ctypes.sizeof(Trouble)),
            runtime.memory(2 * WORD_BYTES),
        )


class Failure:
    """One rank's error record and trouble, and whether the buffer can still be used.

    Attributes:
        failed_address: Word on the device, not 0 once a wait of a kernel has failed: those that are
            queued behind it then do nothing.
        has_trouble_address: Another, not 0 while the host may have an error to raise.
    """

    def __init__(self, rank: int, num_experts: int, memory: FailureMemory) -> None:
        """Read from memory that was just reserved."""
        self.rank = rank
        self._num_experts = num_experts
        self._keep = memory
        record, trouble = memory.record, memory.trouble
        self.failed_address = memory.words.address
        self.has_trouble_address = memory.words.address + WORD_BYTES
        self.record_address = record.address
        self.record_device_address = record.device_address
        self.trouble_device_address = trouble.device_address
        self._record = ErrorRecord.from_address(record.address)
        self._trouble = Trouble.from_address(trouble.address)
        self._fatal: Error | None = None
        self._is_raised = False

    def check_complete(self) -> None:
        """Raise what an operation that has ended found to be wrong."""
        self.check_usable("synchronize")
        self.raise_trouble()

    def check_usable(self, operation: str) -> None:
        """Raise, by the operation's name, once the buffer has failed.

        Raises:
            CommTimeout: A wait of this or an earlier operation has run out.
            CommError: That was raised before.
        """
        if self._fatal is None and self._record.state == COMPLETE:
            self._fatal = self._timeout()
        if self._fatal is None:
            return
        if not self._is_raised:
            self.raise_fatal(self._fatal)
        raise CommError(
            f"{operation}: rank {self.rank}: the buffer has failed and can only be closed: "
            f"{self._fatal}",
            getattr(self._fatal, "peer", None),
        )

    def raise_fatal(self, error: Error) -> None:
        """Raise an error after which the buffer can only be closed, or what has caused it."""
        self.condemn(error)
        assert self._fatal is not None
        self._is_raised = True
        if self._fatal is error:
            raise error
        raise self._fatal from error

    def condemn(self, error: Error) -> None:
        """Let the next call raise the error, and later ones that the buffer can only be closed."""
        if self._fatal is None:
            is_recorded = self._record.state == COMPLETE  # what others have found follows from it
            self._fatal = self._timeout() if is_recorded else error
            self._record.is_condemned = 1

    @property
    def failed(self) -> bool:
        """Whether the buffer can only be closed."""
        return self._fatal is not None or self._record.state == COMPLETE

    @property
    def must_grow(self) -> int:
        """Tokens that the pending trouble asks room for, 0 if it is none of that kind."""
        if not self.has_trouble or self._trouble.status != MUST_GROW:
            return 0
        return int(self._trouble.max_tokens)

    def clear_trouble(self) -> None:
        """Forget the pending trouble."""
        self._trouble.state = CLEAR

    @property
    def has_trouble(self) -> bool:
        """Whether an operation did not take place and nobody has raised it."""
        return bool(self._trouble.state == COMPLETE)

    def raise_trouble(self) -> None:
        """Raise and clear the pending trouble, if there is any.

        Raises:
            CommError: A peer refused an operation.
            ConfigMismatch: Ranks did not do the same in one.
            InvalidArgument: Ids, on the device, were wrong on this rank.
        """
        if not self.has_trouble:
            return
        error = self._describe_trouble()
        self.clear_trouble()
        raise error

    def _timeout(self) -> Error:
        record = self._record
        operation, role = OPERATIONS[record.operation], ROLES[record.role]
        where = f"{operation}: rank {record.rank}, {role}"
        if record.kind == KIND_CHECK and role == "meet":
            return InternalError(
                f"{where}: the part of the operation before this one has not ended: expected epoch "
                f"{record.expected}, got {record.observed}"
            )
        if record.kind == KIND_CHECK:
            return InternalError(
                f"{where}: a check on the device failed: slot {record.slot}, block {record.block}, "
                f"expected {record.expected}, got {record.observed}"
            )
        slot = "" if record.slot < 0 else f", slot {record.slot}"
        return CommTimeout(
            f"{where}: rank {record.peer} did not come within timeout_s{slot} (block "
            f"{record.block}, expected {record.expected}, got {record.observed})",
            None if record.peer < 0 else int(record.peer),
        )

    def _describe_trouble(self) -> Error:
        trouble = self._trouble
        mine = Signature.unpack(trouble.mine.signature)
        operation = "combine" if mine.operation == 2 else "dispatch"
        where = f"{operation}: rank {self.rank}"
        if trouble.status == MISMATCH:
            return self._describe_mismatch(where, mine)
        if trouble.status == MUST_GROW:
            return InvalidArgumentError(
                f"{where}: x: expected at most max_tokens_per_rank rows, got {trouble.max_tokens} "
                "on some rank, in an operation that cannot wait for a larger buffer"
            )
        if is_unmade(trouble.mine.refusal):
            return InvalidArgumentError(f"{where}: {self._reason(UNMADE_HANDLE)}")
        if trouble.culprit != self.rank:
            return CommError(
                f"{where}: rank {trouble.culprit} refused: {self._reason(trouble.theirs.refusal)}",
                int(trouble.culprit),
            )
        return InvalidArgumentError(f"{where}: {self._reason(trouble.theirs.refusal)}")

    def _reason(self, refusal: int) -> str:
        if refusal & EXPERT_OUT_OF_RANGE:
            return (
                f"topk_idx: expected ids in -1..{self._num_experts - 1}, got one out of that range"
            )
        if refusal & EXPERT_TWICE:
            return "topk_idx: expected distinct experts in a row, got one twice"
        if refusal & UNRAISED_TROUBLE:
            return "the error of an earlier operation was yet to be raised there"
        if refusal & UNMADE_HANDLE:
            return "handle: expected one of a dispatch that took place, got one of another"
        return "an argument error, or no memory"

    def _describe_mismatch(self, where: str, mine: Signature) -> Error:
        trouble = self._trouble
        theirs = Signature.unpack(trouble.theirs.signature)
        for name, own, other in zip(Signature._fields, mine, theirs, strict=True):
            if own != other:
                names = VALUE_NAMES.get(name)
                got = (names[own], names[other]) if names else (own, other)
                return ConfigMismatch(
                    f"{where}: {name} differs between ranks: rank {self.rank} has {got[0]}, "
                    f"rank {trouble.culprit} has {got[1]}"
                )
        if trouble.mine.alignment == trouble.theirs.alignment:
            # Told by a peer that is like this rank.
            return ConfigMismatch(
                f"{where}: ranks differ that rank {self.rank} does not exchange with, one of them "
                f"rank {trouble.culprit}; they say in what"
            )
        return ConfigMismatch(
            f"{where}: expert_alignment differs between ranks: rank {self.rank} has "
            f"{trouble.mine.alignment}, rank {trouble.culprit} has {trouble.theirs.alignment}"
        )


def is_unmade(refusal: int) -> bool:
    """Return whether a rank has itself refused a handle."""
    return refusal & UNMADE_HANDLE != 0 and refusal & FAILED_BEFORE == 0
