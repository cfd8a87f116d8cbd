# SPDX-License-Identifier: Apache-2.0
"""What rail agents leave behind when a move does not come about."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

from deepcomm.backends.cuda.failure import CLEAR, COMPLETE, KIND_CHECK, ROLES, ErrorRecord
from deepcomm.errors import CommError, CommTimeout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deepcomm.backends.cuda.runtime import Runtime
    from deepcomm.errors import Error

__all__ = ["MoveRecord"]

NUMBER, NUM_SPANS = -2, -3  # kernels::kGinNumber, kGinNumSpans
MISSING: Final = {
    "meet": "did not say where the bytes for it go",
    "receive": "did not send its bytes",
    "send": "did not take its bytes",
}
"""What a peer has not done, by the role of the wait that ran out."""


class MoveRecord:
    """The error record of one network's moves. Once it is set, agents leave.

    Attributes:
        address: As the host sees it.
        device_address: As agents see it.
    """

    def __init__(self, runtime: Runtime, names: Sequence[int], timeout_s: float) -> None:
        """Reserve it.

        Args:
            runtime: This rank's.
            names: What the network's ranks are called among all.
            timeout_s: How long agents wait.
        """
        self._memory = runtime.host_memory(ctypes.sizeof(ErrorRecord))
        self.address = self._memory.address
        self.device_address = self._memory.device_address
        self._record = ErrorRecord.from_address(self.address)
        self._names = tuple(names)
        self._timeout_s = timeout_s
        self._is_aborted = False

    @property
    def is_set(self) -> bool:
        """Whether moves have failed or were aborted."""
        return bool(self._record.state != CLEAR)

    @property
    def is_aborted(self) -> bool:
        """Whether it was this rank that ended them."""
        return self._is_aborted

    def abort(self) -> None:
        """Set it, unless a failure has."""
        if self._record.state == CLEAR:
            self._is_aborted = True
            self._record.state = COMPLETE

    def error(self) -> Error | None:
        """Return why moves have failed, None while they have not."""
        if self._is_aborted:
            return CommError("rail: the network was aborted")
        if self._record.state != COMPLETE:
            return None
        record = self._record
        peer = self._names[record.peer]
        where = f"rail: rank {self._names[record.rank]}"
        if record.kind == KIND_CHECK:
            what = {NUMBER: "move number", NUM_SPANS: "number of spans"}.get(
                record.slot, f"size of span {record.slot}"
            )
            return CommError(
                f"{where}: rank {peer} expects other bytes than it is sent: {what}: expected "
                f"{record.expected}, got {record.observed}",
                peer,
            )
        missing = MISSING[ROLES[record.role]]
        return CommTimeout(
            f"{where}: rank {peer} {missing} within {self._timeout_s:g} s (expected "
            f"{record.expected}, got {record.observed})",
            peer,
        )
