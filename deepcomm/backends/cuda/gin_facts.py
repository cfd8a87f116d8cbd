# SPDX-License-Identifier: Apache-2.0
"""NCCL's structs as bytes: where their fields are, the kernel that was compiled for them says.

csrc/kernels/gin/facts.cuh: of each struct as NCCL initialises it, then of copies in each of which
one field has another value.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from deepcomm.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["GinFacts", "GinProperties"]

NUMBERS: Final = ("version", "dev_comm", "requirements", "properties", "full", "rail")
REQUIREMENTS: Final = ("context_count", "signal_count", "counter_count", "connection")
PROPERTIES: Final = ("num_ranks", "has_device_api", "gin_type", "num_lsa_teams", "railed_gin_type")


@dataclass(frozen=True, slots=True)
class GinProperties:
    """What NCCL says of a communicator.

    Attributes:
        has_device_api: Whether kernels can use it at all.
        gin_type: How ranks reach all others; 0: not.
        railed_gin_type: How they reach those of the same place in other LSA teams.
        num_lsa_teams: Groups of ranks that reach each other by loads and stores.
    """

    num_ranks: int
    has_device_api: bool
    gin_type: int
    railed_gin_type: int
    num_lsa_teams: int


@dataclass(frozen=True, slots=True)
class GinFacts:
    """Sizes and offsets of one version of NCCL.

    Attributes:
        version: Of the headers, 10000 * major + 100 * minor + patch.
        dev_comm_bytes: Of a device communicator.
        properties: Those of a communicator, to be filled in.
    """

    version: int
    dev_comm_bytes: int
    properties: bytes
    _requirements: bytes
    _connections: tuple[int, int]
    _requirement_offsets: Mapping[str, int]
    _property_offsets: Mapping[str, int]

    @staticmethod
    def of(constants: Mapping[str, bytes]) -> GinFacts:
        """Read a compiled kernel's constants."""
        numbers = dict(
            zip(NUMBERS, struct.unpack(f"<{len(NUMBERS)}I", constants["gin_numbers"]), strict=True)
        )
        requirements, requirement_offsets = _fields(
            constants["gin_requirements"], numbers["requirements"], REQUIREMENTS
        )
        properties, property_offsets = _fields(
            constants["gin_properties"], numbers["properties"], PROPERTIES
        )
        return GinFacts(
            version=numbers["version"],
            dev_comm_bytes=numbers["dev_comm"],
            properties=properties,
            _requirements=requirements,
            _connections=(numbers["full"], numbers["rail"]),
            _requirement_offsets=requirement_offsets,
            _property_offsets=property_offsets,
        )

    def requirements(self, num_ranks: int, *, is_railed: bool) -> bytes:
        """Return what the agent asks of a device communicator."""
        content = bytearray(self._requirements)
        values = (1, 2 * num_ranks, num_ranks, self._connections[is_railed])
        for name, value in zip(REQUIREMENTS, values, strict=True):
            struct.pack_into("<i", content, self._requirement_offsets[name], value)
        return bytes(content)

    def read_properties(self, content: bytes) -> GinProperties:
        """Read what NCCL has filled in."""

        def value(name: str, form: str = "<i") -> int:
            number: int = struct.unpack_from(form, content, self._property_offsets[name])[0]
            return number

        return GinProperties(
            num_ranks=value("num_ranks"),
            has_device_api=bool(value("has_device_api", "<B")),
            gin_type=value("gin_type"),
            railed_gin_type=value("railed_gin_type"),
            num_lsa_teams=value("num_lsa_teams"),
        )


def _fields(copies: bytes, size: int, names: tuple[str, ...]) -> tuple[bytes, dict[str, int]]:
    """Return the first of some structs, and where each of the others differs from it."""
    if len(copies) != size * (1 + len(names)):
        raise InternalError(
            f"structs of NCCL: expected {size} bytes each, got {len(copies)} in all"
        )
    first = copies[:size]
    offsets = {}
    for index, name in enumerate(names, start=1):
        copy = copies[index * size : (index + 1) * size]
        offsets[name] = next(at for at in range(size) if copy[at] != first[at])
    return first, offsets
