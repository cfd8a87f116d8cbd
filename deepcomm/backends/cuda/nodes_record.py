# SPDX-License-Identifier: Apache-2.0
"""What a handle keeps where there are several nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepcomm.errors import InvalidArgument

if TYPE_CHECKING:
    from deepcomm.backends.cuda.tensors import CudaRecord
    from deepcomm.types import Handle

__all__ = ["NodesRecord", "record_of", "routing_on_rail"]


@dataclass(frozen=True, slots=True, eq=False)
class NodesRecord:
    """What a ``Handle`` keeps for several nodes: those of the two stages."""

    rail: Handle
    node: Handle


def routing_on_rail(handle: Handle | None, buffer_id: bytes) -> CudaRecord | None:
    """Return what a handle of unknown origin keeps of the rail, if it is one of this buffer's."""
    record = None if handle is None else getattr(handle, "records", None)
    if not isinstance(record, NodesRecord):
        return None
    routing: CudaRecord = record.rail.records
    return routing if routing.buffer_id == buffer_id else None


def record_of(handle: Handle) -> NodesRecord:
    """Return what a handle keeps.

    Raises:
        InvalidArgument: The handle comes from another buffer.
    """
    if not isinstance(handle.records, NodesRecord):
        raise InvalidArgument("handle: expected one of this buffer, got one of another")
    return handle.records
