# SPDX-License-Identifier: Apache-2.0
"""What low-latency operations of a buffer keep: memory, and how many are in flight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from deepcomm._C import kernels
from deepcomm.backends.cuda.low_latency_status import Status
from deepcomm.errors import Error, InvalidArgument
from deepcomm.group import SubGroup, agree_on

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from deepcomm.backends.cuda.functions import LowLatencyFunctions
    from deepcomm.backends.cuda.network import Network
    from deepcomm.backends.cuda.runtime import Function, Memory, Runtime
    from deepcomm.config import BufferConfig
    from deepcomm.group import Group
    from deepcomm.topology import Topology

__all__ = [
    "ANNOUNCE",
    "BOTH",
    "BOTH_KEEPING",
    "CARRIED",
    "MAX_BLOCKS_PER_SM",
    "OVER_NODES",
    "PASS_ON",
    "RECEIVE",
    "SEND",
    "Failure",
    "Launches",
    "Place",
    "Slots",
    "find_excess",
    "has_nodes",
    "is_carried",
    "low_latency_layout",
]

SEND, RECEIVE, BOTH = 1, 2, 3
"""Phases of a launch; csrc/kernels/low_latency/params.hpp."""
ANNOUNCE, PASS_ON = 16, 32
"""Launches of a combine where a network carries the rails, before and after the one that sends."""
OVER_NODES: Final = 4
"""Added to them in a kernel's template argument: the operation spans several nodes."""
CARRIED: Final = 8
"""Likewise: a network is between these."""
BOTH_KEEPING: Final = 67
"""Both phases of a combine, whose blocks keep sums of own rows: faster where each has several."""

PATIENCE: Final = (2, 4, 4, 3, 1)
"""Over several nodes, how many ``timeout_s`` a wait may take, by layout::Role.

Who passes on (the last role) waits for a rank of another node; its node waits for it with the
headers, it for its node's sums, and the token's rank for its sum. A wait ends after those that it
depends on, so that a rank that has stopped is named by those who know.
"""

MAX_BLOCKS_PER_SM: Final = 3
TOKEN_BITS: Final = 32


class Failure(Protocol):
    """What the backend knows of waits that ran out."""

    @property
    def record_address(self) -> int:
        """Of layout::ErrorRecord, for the host."""

    @property
    def record_device_address(self) -> int:
        """Of the same, where kernels write it."""

    @property
    def failed_address(self) -> int:
        """Where they note, on the device, that there is one."""

    @property
    def failed(self) -> bool:
        """Whether the buffer can only be closed."""

    def check_usable(self, operation: str) -> None:
        """Raise CommTimeout or CommError once a wait has run out."""

    def raise_fatal(self, error: Error) -> None:
        """Raise an error after which the buffer can only be closed."""

    def condemn(self, error: Error) -> None:
        """Let later calls raise: the buffer can only be closed."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the operations of one buffer take place.

    Attributes:
        buffer_id: Of the buffer at its present size, alike on its ranks.
        num_sms: SMs that this rank's kernels may count on.
        network: Between the ranks of a rail, None where they reach each other.
    """

    group: Group
    runtime: Runtime
    topology: Topology
    buffer_id: bytes
    failure: Failure
    functions: LowLatencyFunctions
    num_sms: int
    network: Network | None = None


def is_carried(config: BufferConfig, topology: Topology) -> bool:
    """Return whether a network is between the ranks of a rail."""
    return config.is_carried and topology.num_nodes > 1


def has_nodes(config: BufferConfig, topology: Topology) -> bool:
    """Return whether ranks pass on what comes from other nodes.

    Where each node is one rank, all of them are of one rail, and every way is direct unless a
    network is there.
    """
    is_alone = topology.ranks_per_node == 1 and not is_carried(config, topology)
    return topology.num_nodes > 1 and not is_alone


def low_latency_shape(config: BufferConfig, topology: Topology) -> kernels.LowLatencyShape:
    """Return the sizes that decide the map of the symmetric memory."""
    num_ranks = topology.num_ranks
    shape = kernels.LowLatencyShape()
    shape.num_ranks = num_ranks
    shape.num_experts = config.num_experts
    shape.num_topk = config.num_topk
    shape.hidden = config.hidden
    shape.max_tokens = config.max_tokens_per_rank
    shape.num_slots = config.num_low_latency_slots
    passes_on = has_nodes(config, topology)
    shape.ranks_per_node = topology.ranks_per_node if passes_on else num_ranks
    shape.is_carried = is_carried(config, topology)
    return shape


def low_latency_layout(config: BufferConfig, topology: Topology) -> kernels.LowLatencyLayout:
    """Return the map of one rank's symmetric memory."""
    return kernels.LowLatencyLayout.make(low_latency_shape(config, topology), topology.local)


def find_excess(config: BufferConfig, topology: Topology) -> str | None:
    """Return what is beyond the kernels of this mode, None where all is well."""
    limits = (
        ("ranks", topology.num_ranks, kernels.MAX_LOW_LATENCY_RANKS),
        ("num_experts", config.num_experts, kernels.MAX_LOW_LATENCY_EXPERTS),
        ("hidden", config.hidden, kernels.MAX_LOW_LATENCY_HIDDEN),
        (
            "max_tokens_per_rank",
            -(-config.max_tokens_per_rank // TOKEN_BITS) * topology.num_ranks,
            kernels.MAX_LOW_LATENCY_TOKEN_WORDS,
        ),
    )
    for name, value, most in limits:
        if value <= most:
            continue
        if name == "max_tokens_per_rank":
            most = most // topology.num_ranks * TOKEN_BITS
            value = config.max_tokens_per_rank
        return f"{name}: expected at most {most} for low-latency operations, got {value}"
    return None


class Launches(dict[int, tuple["Function", int]]):
    """Function and grid of an operation by phase, found when a phase is first launched."""

    def __init__(
        self, functions: Mapping[int, Function], num_wanted: Mapping[int, int], num_sms: int
    ) -> None:
        """Choose among ``functions``, for the blocks that each phase would like."""
        super().__init__()
        self._functions = functions
        self._num_wanted = num_wanted
        self._num_sms = num_sms

    def __missing__(self, phase: int) -> tuple[Function, int]:
        """Launch as many blocks as are resident at once."""
        function = self._functions[phase]
        per_sm = min(function.blocks_per_sm, MAX_BLOCKS_PER_SM)
        grid = max(1, min(self._num_wanted[phase], self._num_sms * per_sm))
        function.spread_over(self._num_sms)
        self[phase] = (function, grid)
        return function, grid


class Slots:
    """Symmetric memory of the slots, and what this rank's kernels share beside it.

    Attributes:
        map: Of it.
        fp8_map: The same with FP8 rows closer together, where a network carries them.
        local: Where it begins.
        turns: Operations that have begun; kernels count likewise unless graphs are replayed.
    """

    def __init__(self, place: Place, config: BufferConfig, mask: Memory, late_ranks: int) -> None:
        """Reserve; collective over the group.

        Args:
            place: Where operations take place.
            config: Of the buffer.
            mask: uint32 [R], which peers are skipped.
            late_ranks: Address on the device of uint32 [R] shared with the host.
        """
        if (excess := find_excess(config, place.topology)) is not None:
            raise InvalidArgument(excess)
        topology = place.topology
        self.map = low_latency_layout(config, topology)
        is_apart = is_carried(config, topology)
        self.fp8_map = self.map.with_fp8_rows() if is_apart else self.map
        self._place = place
        self._config = config
        self._members = topology.node_ranks if is_apart else list(range(topology.num_ranks))
        self.memory = place.runtime.symmetric_memory(
            SubGroup(place.group, self._members) if is_apart else place.group,
            self.map.total_bytes,
            config.timeout_s,
        )
        self.local = self.memory.bases[self._members.index(topology.rank)]
        try:
            agree_on(place.group, "symmetric memory", self._reserve)
        except BaseException:
            self.memory.close()
            raise
        self._keep = mask
        self.turns = kernels.LowLatencyTurns(config.num_low_latency_slots)
        addresses = mask.address, late_ranks
        self.dispatch_params = kernels.LowLatencyDispatchParams()
        self.combine_params = kernels.LowLatencyCombineParams()
        self.refuse_params = kernels.LowLatencyRefuseParams()
        for params in (self.dispatch_params, self.combine_params, self.refuse_params):
            self._fill(params.base, addresses)
        self.dispatch_params.num_experts = config.num_experts

    def _reserve(self) -> None:
        """Reserve what is beside the symmetric memory."""
        runtime, topology, config = self._place.runtime, self._place.topology, self._config
        status = runtime.host_memory(kernels.LOW_LATENCY_STATUS_BYTES)
        self.status = Status(status, topology.rank, config.num_experts)
        self._bases = runtime.upload(b"".join(self._bases_of_peers()))
        self._state = runtime.memory(kernels.LOW_LATENCY_STATE_BYTES)
        num_decisions = topology.num_ranks * config.num_low_latency_slots
        self._decisions = runtime.memory(8 * num_decisions)
        self._unread = runtime.memory(8 * 2 * (num_decisions + config.num_low_latency_slots))

    def _bases_of_peers(self) -> Iterator[bytes]:
        """Yield where the memory of each rank is; 0 for ranks that this one never stores to."""
        topology = self._place.topology
        bases = dict(zip(self._members, self.memory.bases, strict=True))
        peers = {*topology.node_ranks, *topology.rail_ranks}
        for rank in range(topology.num_ranks):
            yield (bases.get(rank, 0) if rank in peers else 0).to_bytes(8, "little")

    def bases_in_node(self) -> dict[int, int]:
        """Return where the memory of each rank of this node is."""
        bases = dict(zip(self._members, self.memory.bases, strict=True))
        return {rank: bases[rank] for rank in self._place.topology.node_ranks}

    def _fill(self, base: kernels.LowLatencyParams, addresses: tuple[int, int]) -> None:
        """Fill what does not change from one operation to the next."""
        topology = self._place.topology
        base.comm.rank = topology.rank
        base.comm.num_ranks = topology.num_ranks
        patience = PATIENCE if has_nodes(self._config, topology) else (1,) * len(PATIENCE)
        timeout_ns = int(self._config.timeout_s * 1e9)
        base.comm.timeout_ns = timeout_ns
        base.set_timeouts([factor * timeout_ns for factor in patience])
        base.node_idx, base.rail_idx = topology.node, topology.local
        base.comm.record = self._place.failure.record_device_address
        base.comm.failed = self._place.failure.failed_address
        base.comm.bases = base.credit_bases = self._bases.address
        base.map = self.map
        base.local = self.local
        base.state = self._state.address
        base.rank_mask, base.late_ranks = addresses
        base.decisions = self._decisions.address
        base.unread = 0 if has_nodes(self._config, topology) else self._unread.address
        base.status = self.status.device_address

    # ---- operations in flight

    def check_free(self, operation: str) -> None:
        """Raise InvalidArgument unless another operation may begin."""
        if not self.turns.has_free_slot:
            raise InvalidArgument(
                f"{operation}: expected at most num_low_latency_slots = "
                f"{self._config.num_low_latency_slots} operations in flight: call the hook of the "
                "oldest first"
            )

    def close(self) -> None:
        """Give the symmetric memory back."""
        self.memory.close()
