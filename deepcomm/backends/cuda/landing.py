# SPDX-License-Identifier: Apache-2.0
"""What a network carries of a dispatch: from mirrors to the landing areas of other nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from deepcomm.backends.cuda.network import Span

if TYPE_CHECKING:
    from deepcomm._C import kernels
    from deepcomm.backends.cuda.carried_rows import CarriedRows, RowBytes
    from deepcomm.backends.cuda.exchange import MirroredExchange

__all__ = ["ALL_LANDED", "Landed", "LandingSpans"]

Spans: TypeAlias = tuple[Span, ...]

MOST_PARTS: Final = 16
"""Of the rows to a peer: each is three launches, and networks hold few moves."""
SEND_CHUNK: Final = 8  # layout::kSendChunk


@dataclass(frozen=True, slots=True)
class Landed:
    """What says which rows of a dispatch are here, while others are on their way.

    Attributes:
        address: Of a word for each rank of the rail; 0 where all rows are here.
        part_rows: Rows of a rank that come together.
    """

    address: int
    part_rows: int


ALL_LANDED: Final = Landed(0, SEND_CHUNK)


@dataclass(frozen=True, slots=True)
class LandingSpans:
    """Where a dispatch's rows, and what belongs to them, are here.

    Attributes:
        exchange: The memory of this rank.
        rank: This rank.
        rows: How many there are.
        row_bytes: Of each.
    """

    exchange: MirroredExchange
    rank: int
    rows: CarriedRows
    row_bytes: RowBytes

    def part_rows(self, part_bytes: int) -> int:
        """Return how many rows are carried together, alike on all ranks."""
        rows = max(part_bytes // self.row_bytes.row, self.exchange.max_tokens // MOST_PARTS)
        return -(-rows // SEND_CHUNK) * SEND_CHUNK

    def num_rows(self, peer: int) -> int:
        """Return the rows that go to a peer, or those that come, if there are more; alike there."""
        return max(self.rows.to[peer], self.rows.from_[peer])

    def routing(self, peer: int) -> tuple[Spans, Spans]:
        """Return scales, ids and weights of all rows, as they are sent and received."""
        (mirror, there), (landing, here) = self._areas(peer)
        rows = self.rows
        return (
            self._beside(mirror, there, 0, rows.to[peer], rows.ids_are_64[peer]),
            self._beside(
                landing, here, rows.first_rows()[peer], rows.from_[peer], rows.ids_are_64[self.rank]
            ),
        )

    def part(self, peer: int, begin: int, end: int) -> tuple[Spans, Spans]:
        """Return rows [begin, end), or as many of them as there are."""
        (mirror, there), (landing, here) = self._areas(peer)
        size, first = self.row_bytes.row, self.rows.first_rows()[peer]

        def span(address: int, num_rows: int) -> Span:
            count = max(0, min(end, num_rows) - begin)
            return Span(address + begin * size, count * size)

        return (
            (span(mirror + there.rows, self.rows.to[peer]),),
            (span(landing + here.rows + first * size, self.rows.from_[peer]),),
        )

    def _areas(
        self, peer: int
    ) -> tuple[tuple[int, kernels.LandingOffsets], tuple[int, kernels.LandingOffsets]]:
        """Return what begins where in a peer's mirror, and in the own memory."""
        exchange = self.exchange
        there, here = exchange.there, exchange.layout.areas
        return (
            (exchange.bases[peer] + there.generation(0), there.landing),
            (exchange.bases[self.rank] + here.generation(0), here.landing),
        )

    def _beside(
        self, base: int, offsets: kernels.LandingOffsets, first: int, count: int, wide: bool
    ) -> Spans:
        row_bytes = self.row_bytes
        sizes = (
            (offsets.scales, row_bytes.scales),
            (offsets.topk_idx, row_bytes.num_topk * (8 if wide else 4)),
            (offsets.topk_weights, row_bytes.weights),
        )
        return tuple(Span(base + at + first * size, count * size) for at, size in sizes)
