# SPDX-License-Identifier: Apache-2.0
"""Low-latency operations whose rails a network carries: csrc/kernels/PROTOCOLS.md.

What kernels would store to a rank of their rail they store to a mirror of its memory. The host
knows neither counts nor what becomes of an operation, so that the network carries what
``max_tokens_per_rank`` tokens take. It does so on the side stream, behind the launches that write;
what is received is launched behind it. No kernel waits for the network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

from deepcomm._C import kernels
from deepcomm.backends.cuda.low_latency_slots import ANNOUNCE, PASS_ON, RECEIVE, SEND
from deepcomm.backends.cuda.network import Message, Span
from deepcomm.backends.cuda.progress import PATIENCE, PROGRESS_BYTES, Progress, RailProgress
from deepcomm.errors import Error
from deepcomm.types import RecvLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from deepcomm.backends.cuda.low_latency_operation import CombineOperation, DispatchOperation
    from deepcomm.backends.cuda.low_latency_slots import Place, Slots
    from deepcomm.backends.cuda.runtime import Memory
    from deepcomm.types import Event

    Operation: TypeAlias = DispatchOperation | CombineOperation

__all__ = ["SlotCarrier", "sms_beside_network"]

CREDIT_BYTES: Final = 8
TELL, PASS_ON_REFUSAL, END = range(3)  # kernels::RefuseStep
NETWORK_SMS: Final = 16
"""Left to the network's kernels, which run beside those that wait inside a node."""


def sms_beside_network(num_sms: int) -> int:
    """Return how many of a device's SMs kernels may fill beside a network.

    A rank's kernels wait for those of its node. If these had to wait until their network gives SMs
    back, and it for one that finds none on another node, all of them would wait for ever.
    """
    return num_sms - min(NETWORK_SMS, num_sms // 8)


class SlotCarrier:
    """Launches operations of one rank, and the network between them.

    Attributes:
        block: All memory that the network reads or writes here: slots, mirrors among them.
        bytes_carried: To other ranks so far.
    """

    def __init__(self, place: Place, slots: Slots, timeout_s: float) -> None:
        """Carry the slots that have just been reserved; every rank of the buffer does so."""
        assert place.network is not None
        self._place = place
        self._network = place.network
        self._map = slots.map
        self._fp8_map = slots.fp8_map
        self._local = slots.local
        self.block = Span(slots.local, slots.memory.num_bytes)
        self.bytes_carried = 0
        self._stores_to = self._table(slots, self._mirror_base)
        self._credits_to = self._table(slots, self._own_credit_base)
        for params in (slots.dispatch_params, slots.combine_params, slots.refuse_params):
            params.base.comm.bases = self._stores_to.address
            params.base.credit_bases = self._credits_to.address
        self._num_moves = 0
        self._progress = place.runtime.host_memory(PROGRESS_BYTES)
        self._watch(timeout_s)

    def join(self) -> None:
        """Let the network move what is in the block; collective."""
        self._network.register(self.block.address, self.block.num_bytes)

    def leave(self) -> None:
        """Take the block back from the network; idempotent."""
        self._network.deregister(self.block.address)

    # ---- who stores where

    def _table(self, slots: Slots, base_on_rail: Callable[[int], int]) -> Memory:
        """Return what kernels take for the ranks' memory: 0 for ranks of another node and rail."""
        topology = self._place.topology
        bases = [0] * topology.num_ranks
        for rank in topology.rail_ranks:
            bases[rank] = base_on_rail(rank)
        for rank, base in slots.bases_in_node().items():
            bases[rank] = base
        return self._place.runtime.upload(b"".join(base.to_bytes(8, "little") for base in bases))

    def _mirror_base(self, peer: int) -> int:
        """Return whence a region of this rank's, as at the peer, lies in the peer's mirror."""
        own = self._place.topology.rank
        return self._mirror(0, peer) - int(self._map.header_offset(0, own))

    def _own_credit_base(self, peer: int) -> int:
        """Return whence the credit for the peer is the one that the peer would give to this rank.

        A slot may be written again once this rank has read it: what the peer has to read has been
        carried by then, and what it sends next is received behind that.
        """
        return self._local + CREDIT_BYTES * (peer - self._place.topology.rank)

    def _mirror(self, slot: int, peer: int) -> int:
        topology = self._place.topology
        node = peer // topology.ranks_per_node
        return self._local + int(self._map.mirror_offset(slot, node - (node > topology.node)))

    # ---- the network

    def _watch(self, timeout_s: float) -> None:
        """Let the network end once the rank has failed, or when it comes to no end itself."""
        progress = Progress(self._progress, PATIENCE * timeout_s)
        where = f"low latency: rank {self._place.topology.rank}"
        failure = self._place.failure
        self._network.watch(progress.watcher(failure, where), failure.condemn)

    def _mark(self, offset: int) -> None:
        """Tell the host that the side stream has come here."""
        assert self._place.functions.mark is not None
        params = kernels.LowLatencyMarkParams()
        params.word = self._progress.device_address + offset
        params.value = self._num_moves & 0xFFFFFFFF
        self._place.runtime.launch(self._place.functions.mark, 1, params)

    def _carry(self, slot: int, num_bytes: int) -> Event:
        """Carry the first bytes of a slot's regions behind the work so far; return the end."""
        runtime = self._place.runtime
        messages = self._messages(slot, num_bytes)
        self._num_moves += 1
        runtime.order_side()
        with runtime.on_side():
            self._mark(RailProgress.num_gates.offset)
            try:
                self._network.move(messages)
            except Error as error:
                self._place.failure.raise_fatal(error)
            self._mark(RailProgress.num_deliveries.offset)
            arrived = runtime.record_event()
        self.bytes_carried += num_bytes * len(messages)
        return arrived

    def _messages(self, slot: int, num_bytes: int) -> list[Message]:
        """Return what to carry: to and from the next node first, then the one after it."""
        topology = self._place.topology
        messages = []
        for step in range(1, topology.num_nodes):
            node = (topology.node + step) % topology.num_nodes
            peer = topology.rank_of(node, topology.local)
            sends = Span(self._mirror(slot, peer), num_bytes)
            receives = Span(self._local + int(self._map.header_offset(slot, peer)), num_bytes)
            messages.append(Message(node, (sends,), (receives,)))
        return messages

    # ---- operations

    def send(self, operation: Operation, slot: int) -> Event:
        """Launch the send phase and the network; return when what peers have sent is here."""
        launch, params = self._place.runtime.launch, operation.params
        launches = operation.plan.launches
        combine = params if isinstance(params, kernels.LowLatencyCombineParams) else None
        if combine is not None and combine.source_weights:
            launch(*launches[ANNOUNCE], params)
            self._place.runtime.wait_event(self._carry(slot, self._map.head_bytes()))
        launch(*launches[SEND], params)
        if combine is not None:
            launch(*launches[PASS_ON], params)
        return self._carry(slot, params.base.map.region_bytes())

    def receive(self, operation: Operation, arrived: Event) -> None:
        """Launch the receive phase behind the network."""
        self._place.runtime.wait_event(arrived)
        self._place.runtime.launch(*operation.plan.launches[RECEIVE], operation.params)

    def refuse(self, params: kernels.LowLatencyRefuseParams, request: Any, slot: int) -> None:
        """Take an operation's turn without delivering; the network carries what peers await."""
        is_half = not params.is_combine and request.sends_fp8
        has_weights = bool(params.is_combine) and has_source_weights(request)
        num_bytes = int((self._fp8_map if is_half else self._map).region_bytes())
        self._refuse(params, TELL)
        if has_weights:
            self._place.runtime.wait_event(self._carry(slot, self._map.head_bytes()))
        else:
            self._place.runtime.wait_event(self._carry(slot, num_bytes))
        self._refuse(params, PASS_ON_REFUSAL)
        if has_weights:
            self._place.runtime.wait_event(self._carry(slot, num_bytes))
        self._refuse(params, END)

    def _refuse(self, params: kernels.LowLatencyRefuseParams, step: int) -> None:
        assert self._place.functions.refuse is not None
        params.step = step
        self._place.runtime.launch(self._place.functions.refuse, 1, params)


def has_source_weights(request: Any) -> bool:
    """Return whether a combine, perhaps a wrong one, is given weights at the sources."""
    is_token = getattr(request.handle, "recv_layout", None) is RecvLayout.TOKEN
    return request.topk_weights is not None and bool(request.apply_weights) and not is_token
