# SPDX-License-Identifier: Apache-2.0
"""How what a rail's kernels write reaches the other nodes.

Where rail peers are mapped memory, the kernels write to them, and nothing is left to do. Elsewhere
kernels write to mirrors, and a network carries on what is there, on a stream of its own: a step is
a gate, which waits until the kernels have written, a move of the network, and a delivery of the
words that a peer in reach would have written. csrc/kernels/PROTOCOLS.md: carried rails.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from deepcomm._C import kernels
from deepcomm.backends.cuda.carried_rows import CarriedRows
from deepcomm.backends.cuda.landing import ALL_LANDED, Landed, LandingSpans
from deepcomm.backends.cuda.network import Message, Span
from deepcomm.backends.cuda.progress import PATIENCE, PROGRESS_BYTES, Progress
from deepcomm.errors import Error, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from deepcomm.backends.cuda.carried_rows import RowBytes
    from deepcomm.backends.cuda.domain import Domain
    from deepcomm.backends.cuda.exchange import MirroredExchange
    from deepcomm.backends.cuda.network import Network

__all__ = ["REACHED", "Carrier", "NetworkCarrier", "Reached"]

Spans: TypeAlias = tuple[Span, ...]

MEETING, ROUTING, ROWS, PUSHED, LOST = range(5)  # kernels::RailStep
PART_BYTES: Final = 4 << 20
"""Of rows to one peer: carried together, while others are still summed, or are sent on already."""
PUSH_CHUNK: Final = 4  # layout::kPushChunk


class Carrier(Protocol):
    """What a rail does beside its kernels."""

    def check_capture(self) -> None:
        """Raise InvalidArgument where a graph is being captured that cannot hold this rail."""

    def follow(self) -> None:
        """Come after the work so far: the next kernel meets."""

    def meet(self, *, has_counts: bool) -> None:
        """Carry the meeting of the kernel that was launched last."""

    def learn_rows(self) -> CarriedRows | None:
        """Return what the dispatch will carry once its counts are there; None: nothing to know."""

    def carry_rows(self, rows: CarriedRows | None, row_bytes: RowBytes) -> None:
        """Carry the rows of a dispatch."""

    def landed(self) -> Landed:
        """Return what says which rows of the last dispatch are here."""

    def carry_lost(self, node: Domain) -> None:
        """Carry what the stage inside the node says of lost tokens."""

    def carry_pushed(
        self, rows: CarriedRows | None, plan: torch.Tensor, row_bytes: RowBytes, node: Domain
    ) -> None:
        """Carry the rows of a combine, which the stage inside the node writes."""

    def close(self) -> None:
        """Release everything; idempotent."""

    def describe(self) -> str:
        """Say how ranks are reached, for ``explain()``."""

    @property
    def network(self) -> Network | None:
        """What is between the ranks."""


class Reached:
    """Ranks that reach each other by loads and stores: there is nothing to carry."""

    network = None

    def check_capture(self) -> None:
        """Do nothing."""

    def follow(self) -> None:
        """Do nothing."""

    def meet(self, *, has_counts: bool) -> None:
        """Do nothing."""

    def learn_rows(self) -> None:
        """Know nothing: kernels do."""

    def carry_rows(self, rows: CarriedRows | None, row_bytes: RowBytes) -> None:
        """Do nothing."""

    def landed(self) -> Landed:
        """Return that all are."""
        return ALL_LANDED

    def carry_lost(self, node: Domain) -> None:
        """Do nothing."""

    def carry_pushed(
        self, rows: CarriedRows | None, plan: torch.Tensor, row_bytes: RowBytes, node: Domain
    ) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def describe(self) -> str:
        """Say how ranks are reached."""
        return "lsa: by loads and stores"


REACHED: Final = Reached()


class NetworkCarrier:
    """A rail over a network."""

    def __init__(self, domain: Domain, network: Network) -> None:
        """Serve a domain whose memory is ``MirroredExchange``."""
        self._domain = domain
        self.network = self._network = network
        network.fail_with(domain.failure.failed_address)
        runtime = domain.runtime
        self._gate = runtime.load("rail_gate", {})
        self._deliver = runtime.load("rail_deliver", {})
        self._words = kernels.RailReport(domain.topology.num_ranks)
        self._report = runtime.host_memory(self._words.num_bytes)
        self._progress = runtime.host_memory(PROGRESS_BYTES)
        self._epoch = self._num_steps = 0
        self._has_rows = False
        self._landed = runtime.memory(8 * domain.topology.num_ranks)
        self._part_rows = ALL_LANDED.part_rows
        self._watch()
        # Connections are made by the first move: not while kernels wait for it.
        self.follow()
        with runtime.on_side():
            network.move(self._messages())

    def _watch(self) -> None:
        """Let the network end once the rank has failed, or when it comes to no end itself."""
        failure = self._domain.failure
        progress = Progress(self._progress, PATIENCE * self._domain.config.timeout_s)
        has_failed = progress.watcher(failure, f"rail: rank {failure.rank}")
        self._network.watch(has_failed, failure.condemn)

    # ---- steps

    def _params(self, step: int) -> kernels.RailParams:
        domain, exchange = self._domain, self._exchange
        params = kernels.RailParams()
        params.on_rail(domain.meet())
        params.epoch = self._epoch
        params.step = step
        params.verdict = domain.workspace.verdict.address
        params.outbox = exchange.outbox
        params.inbox = exchange.inbox
        params.state = exchange.rail_state.address
        params.report = self._report.device_address
        params.progress = self._progress.device_address
        self._num_steps += 1
        params.number = self._num_steps & 0xFFFFFFFF
        return params

    def _carry(self, params: kernels.RailParams, messages: Sequence[Message]) -> None:
        """Launch gate, move and delivery on the side stream."""
        runtime = self._domain.runtime
        with runtime.on_side():
            runtime.launch(self._gate, 1, params)
            try:
                self._network.move(messages)
            except Error as error:
                self._domain.failure.raise_fatal(error)
            runtime.launch(self._deliver, 1, params)

    @property
    def _exchange(self) -> MirroredExchange:
        exchange: MirroredExchange = self._domain.mirrored
        return exchange

    def _peers(self) -> list[int]:
        """Return the other ranks, from the next one on: none is everybody's first."""
        topology = self._domain.topology
        others = range(1, topology.num_ranks)
        return [(topology.rank + step) % topology.num_ranks for step in others]

    def _messages(
        self,
        spans: Callable[[int], tuple[Spans, Spans]] = lambda _: ((), ()),
        peers: Sequence[int] | None = None,
    ) -> list[Message]:
        """Return what to carry: the words for each peer, and what ``spans`` sends and receives."""
        exchange = self._exchange
        size, messages = exchange.words_bytes, []
        for peer in self._peers() if peers is None else peers:
            outbox, inbox = (box + peer * size for box in (exchange.outbox, exchange.inbox))
            sends, receives = spans(peer)
            messages.append(
                Message(peer, (Span(outbox, size), *sends), (Span(inbox, size), *receives))
            )
        return messages

    def check_capture(self) -> None:
        """Raise InvalidArgument where a graph is being captured: the network wants sizes."""
        if self._domain.runtime.is_capturing():
            raise InvalidArgument(
                "rail: expected 'lsa' while a CUDA graph is captured, got "
                f"{self._network.name!r}: the host has to tell the network how much to carry"
            )

    def follow(self) -> None:
        """Come after the work so far: a gate must not wait for what precedes the kernel."""
        self._domain.runtime.order_side()

    def meet(self, *, has_counts: bool) -> None:
        """Carry headers, and counts where the kernel tells them."""
        self._epoch += 1
        params = self._params(MEETING)
        params.has_counts = int(has_counts)
        self._carry(params, self._messages())

    def learn_rows(self) -> CarriedRows | None:
        """Wait for the counts; None where the operation does not take place.

        Raises:
            CommTimeout: A peer did not come within ``timeout_s``.
        """
        address, num_ranks = self._report.address, self._domain.topology.num_ranks
        self._domain.await_word(address, self._epoch, 1)
        if not ctypes.c_int32.from_address(address + self._words.is_good).value:
            return None

        def words(offset: int) -> tuple[int, ...]:
            return tuple((ctypes.c_int32 * num_ranks).from_address(address + offset))

        return CarriedRows(
            to=words(self._words.rows_to),
            from_=words(self._words.rows_from),
            ids_are_64=tuple(map(bool, words(self._words.ids_are_64))),
        )

    def carry_rows(self, rows: CarriedRows | None, row_bytes: RowBytes) -> None:
        """Carry what goes beside the rows, then rows part by part: who has the former may begin."""
        self._has_rows = rows is not None
        if rows is None:
            return
        spans = LandingSpans(self._exchange, self._domain.topology.rank, rows, row_bytes)
        self._part_rows = part = spans.part_rows(PART_BYTES)
        self._carry(self._params(ROUTING), self._messages(spans.routing))
        most = max((spans.num_rows(peer) for peer in self._peers()), default=0)
        for begin in range(0, most, part):
            self._carry_part(spans, begin, begin + part)

    def _carry_part(self, spans: LandingSpans, begin: int, end: int) -> None:
        params = self._params(ROWS)
        params.begin_row, params.end_row = begin, end
        params.landed = self._landed.address
        # A pair of ranks has as many parts as rows of the two ask for, whatever others have.
        peers = [peer for peer in self._peers() if spans.num_rows(peer) > begin]
        self._carry(params, self._messages(lambda peer: spans.part(peer, begin, end), peers))

    def landed(self) -> Landed:
        """Return what says which rows of the last dispatch are here."""
        return Landed(self._landed.address, self._part_rows)

    def carry_lost(self, node: Domain) -> None:
        """Carry what the stage inside the node says of lost tokens.

        Not where the rail's stage was called off: all of its ranks know that.
        """
        if not self._has_rows:
            return
        params = self._params(LOST)
        params.verdict = node.workspace.verdict.address
        self._carry(params, self._messages())

    def carry_pushed(
        self, rows: CarriedRows | None, plan: torch.Tensor, row_bytes: RowBytes, node: Domain
    ) -> None:
        """Carry sums and weights from the mirrors to the combine regions, part by part."""
        if rows is None:
            return
        part = max(PUSH_CHUNK, PART_BYTES // row_bytes.row // PUSH_CHUNK * PUSH_CHUNK)
        peers = self._peers()
        most = max((max(rows.to[peer], rows.from_[peer]) for peer in peers), default=0)
        for begin in range(0, most, part):
            end = min(begin + part, most)

            params = self._params(PUSHED)
            params.verdict = node.workspace.verdict.address
            params.plan = plan.data_ptr()
            params.begin_row, params.end_row = begin, end
            self._carry(params, self._pushed(rows, row_bytes, begin, end))
        with self._domain.runtime.on_side():
            self._domain.runtime.keep_alive(plan)

    def _pushed(
        self, rows: CarriedRows, row_bytes: RowBytes, begin: int, end: int
    ) -> list[Message]:
        """Return what is carried of rows [begin, end) of each peer."""
        exchange, own = self._exchange, self._domain.topology.rank
        here, there = exchange.layout.areas, exchange.there
        first_sums = rows.first_sums(own)

        def spans(base: int, areas: kernels.RowAreas, first: int, num_rows: int) -> Spans:
            count = max(0, min(end, num_rows) - begin)
            sizes = (
                (areas.combine_rows, row_bytes.row),
                (areas.combine_weights, row_bytes.weights),
            )
            return tuple(
                Span(base + at + (first + begin) * size, count * size) for at, size in sizes
            )

        # As for the parts of a dispatch.
        peers = [p for p in self._peers() if max(rows.to[p], rows.from_[p]) > begin]
        return self._messages(
            lambda peer: (
                spans(exchange.bases[peer], there, 0, rows.from_[peer]),
                spans(exchange.bases[own], here, first_sums[peer], rows.to[peer]),
            ),
            peers,
        )

    def close(self) -> None:
        """End the network; what it still carries for a failed buffer is given up."""
        if self._domain.failure.failed:
            self._network.abort()
        self._network.close()

    def describe(self) -> str:
        """Say how ranks are reached."""
        network = self._network
        return f"{network.name}: kernels write to mirrors, which {network.describe()} carries on"
