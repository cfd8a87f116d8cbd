# SPDX-License-Identifier: Apache-2.0
"""Memory of the high-throughput operations of one buffer, at one size."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from deepcomm._C import kernels
from deepcomm.backends.cuda.generations import Generations
from deepcomm.group import agree_on, alone_of

if TYPE_CHECKING:
    from deepcomm.backends.cuda.failure import Failure
    from deepcomm.backends.cuda.network import Network
    from deepcomm.backends.cuda.runtime import Runtime
    from deepcomm.config import BufferConfig
    from deepcomm.group import Group
    from deepcomm.topology import Topology

__all__ = [
    "CountReport",
    "Exchange",
    "MirroredExchange",
    "Workspace",
    "exchange_layout",
    "mirrored_bytes",
    "node_config",
    "rail_config",
]

MAX_COUNT_BLOCKS = 16
NUM_COUNTERS = 4
EPOCH_STATE_BYTES = 8
NUM_QUEUES = 3  # kernels::kNumQueues, and kQueueBetweenNodes behind them


class CountReport(ctypes.Structure):
    """kernels::CountReport."""

    _fields_ = (
        ("tag", ctypes.c_uint64),
        ("num_rows", ctypes.c_int32),
        ("num_recv", ctypes.c_int32),
        ("status", ctypes.c_int32),
        ("num_tokens", ctypes.c_int32),
    )


class Workspace:
    """Words that live as long as the buffer: epochs, partial counts, what the host reads."""

    def __init__(
        self, runtime: Runtime, config: BufferConfig, num_ranks: int, num_origins: int
    ) -> None:
        """Reserve and zero them."""
        self.epoch = runtime.memory(EPOCH_STATE_BYTES)
        self.verdict = runtime.memory(kernels.VERDICT_BYTES)
        self.taken = runtime.memory(4 * NUM_QUEUES)  # pieces of work that warps have taken
        self.lost = runtime.memory(4 * num_origins)  # whether tokens of each origin were
        self.no_tokens = runtime.memory(4 * (num_origins + 1))  # of any origin
        num_partials = num_origins * (num_ranks + config.num_experts) + 1
        self.partials = runtime.memory(MAX_COUNT_BLOCKS * num_partials * 8)
        # bytes local and to peers, tokens received, one unused; then ns awaited of each rank.
        self.counters = torch.zeros(
            NUM_COUNTERS + num_ranks, dtype=torch.int64, device=runtime.device
        )
        self.report_memory = runtime.host_memory(ctypes.sizeof(CountReport))
        self.report = CountReport.from_address(self.report_memory.address)


def exchange_layout(
    config: BufferConfig, num_ranks: int, num_origins: int
) -> kernels.ExchangeLayout:
    """Return the map of one rank's symmetric memory."""
    shape = kernels.ExchangeShape()
    shape.num_ranks = num_ranks
    shape.num_experts = config.num_experts
    shape.num_topk = config.num_topk
    shape.hidden = config.hidden
    shape.max_tokens = config.max_tokens_per_rank
    shape.num_generations = config.num_generations
    shape.num_origins = num_origins
    return kernels.ExchangeLayout.make(shape)


def mirrored_bytes(layout: kernels.ExchangeLayout) -> int:
    """Return the bytes of one rank's memory, of mirrors of all its peers', and of their words."""
    num_ranks: int = layout.shape.num_ranks
    mirror: int = kernels.ExchangeLayout.make_mirror(layout.shape).total_bytes
    return int(layout.total_bytes) + (num_ranks - 1) * mirror + 2 * num_ranks * words_bytes(layout)


def words_bytes(layout: kernels.ExchangeLayout) -> int:
    """Return the bytes of what one rank tells another beside rows, where a network carries it."""
    num_bytes: int = kernels.RailWords(layout.shape.num_counters).num_bytes
    return num_bytes


def rail_config(config: BufferConfig) -> BufferConfig:
    """Return what a buffer over several nodes asks of a rail: no view stays in its landing area."""
    return replace(config, ranks_per_node=None, num_generations=1)


def node_config(config: BufferConfig, num_nodes: int) -> BufferConfig:
    """Return what it asks of a node, each of whose ranks brings the tokens of its rail."""
    return replace(
        config,
        ranks_per_node=None,
        num_experts=config.num_experts // num_nodes,
        max_tokens_per_rank=config.max_tokens_per_rank * num_nodes,
    )


class Exchange:
    """Symmetric memory at one ``max_tokens_per_rank``, and the ring of its generations."""

    def __init__(
        self,
        runtime: Runtime,
        group: Group,
        config: BufferConfig,
        topology: Topology,
        num_origins: int,
    ) -> None:
        """Reserve symmetric memory; collective."""
        self.layout = exchange_layout(config, topology.num_ranks, num_origins)
        self.there = self.layout.areas
        self._reserve(runtime, group, config.timeout_s)
        try:
            agree_on(group, "symmetric memory", lambda: self._prepare(runtime))
        except BaseException:
            self.memory.close()
            raise
        self.generations = Generations(self.memory, config.num_generations)
        self.max_rows = topology.num_ranks * config.max_tokens_per_rank
        self.max_tokens = config.max_tokens_per_rank

    def _reserve(self, runtime: Runtime, group: Group, timeout_s: float) -> None:
        """Reserve the memory of all ranks; collective."""
        self.memory = runtime.symmetric_memory(group, self.layout.total_bytes, timeout_s)
        self.bases = self.memory.bases

    def _prepare(self, runtime: Runtime) -> None:
        """Reserve what belongs to it."""
        self._bases = runtime.upload(b"".join(base.to_bytes(8, "little") for base in self.bases))
        self.round = runtime.memory(EPOCH_STATE_BYTES)  # counts with what arrivals add to

    def meet_params(
        self, workspace: Workspace, failure: Failure, topology: Topology, timeout_s: float
    ) -> kernels.MeetParams:
        """Return what every operation hands to its kernels, but for the header."""
        meet = kernels.MeetParams()
        meet.comm.rank = topology.rank
        meet.comm.num_ranks = topology.num_ranks
        meet.comm.timeout_ns = int(timeout_s * 1e9)
        meet.comm.record = failure.record_device_address
        meet.comm.failed = failure.failed_address
        meet.comm.bases = self._bases.address
        meet.layout = self.layout
        meet.there = self.there
        meet.max_tokens = self.max_tokens
        meet.epoch = workspace.epoch.address
        meet.verdict = workspace.verdict.address
        meet.trouble = failure.trouble_device_address
        meet.has_trouble = failure.has_trouble_address
        meet.counters = workspace.counters.data_ptr()
        meet.taken = workspace.taken.address
        return meet

    def close(self) -> None:
        """Free the memory once no view is left; idempotent."""
        self.memory.close()


class MirroredExchange(Exchange):
    """The same where peers' memory is out of reach: mirrors of it, and words for a network.

    Attributes:
        bases: Of this rank's memory and of the mirrors, by rank.
        outbox: Address of words for each rank (layout/rail.hpp).
        inbox: Likewise, from each rank.
        words_bytes: Of one rank's words.
        rail_state: kernels::RailState.
    """

    _network: Network | None = None

    def _reserve(self, runtime: Runtime, group: Group, timeout_s: float) -> None:
        mirror = kernels.ExchangeLayout.make_mirror(self.layout.shape)
        self.there = mirror.areas
        own_bytes, mirror_bytes = self.layout.total_bytes, mirror.total_bytes
        num_bytes = mirrored_bytes(self.layout)
        self.memory = runtime.symmetric_memory(alone_of(group), num_bytes, timeout_s)
        base = self.memory.bases[0]
        first = base + own_bytes
        self.bases = tuple(
            base if peer == group.rank else first + (peer - (peer > group.rank)) * mirror_bytes
            for peer in range(group.size)
        )
        self.words_bytes = words_bytes(self.layout)
        self.outbox = first + (group.size - 1) * mirror_bytes
        self.inbox = self.outbox + group.size * self.words_bytes

    def _prepare(self, runtime: Runtime) -> None:
        super()._prepare(runtime)
        self.rail_state = runtime.memory(kernels.RAIL_STATE_BYTES)

    def join(self, network: Network) -> None:
        """Let a network move what is in the memory; collective."""
        network.register(self.memory.bases[0], mirrored_bytes(self.layout))
        self._network = network

    def close(self) -> None:
        """Take the memory back from the network first."""
        if self._network is not None:
            self._network.deregister(self.memory.bases[0])
            self._network = None
        super().close()

    def meet_params(
        self, workspace: Workspace, failure: Failure, topology: Topology, timeout_s: float
    ) -> kernels.MeetParams:
        """Return what every operation hands to its kernels, but for the header."""
        meet = super().meet_params(workspace, failure, topology, timeout_s)
        meet.is_carried = 1
        return meet
