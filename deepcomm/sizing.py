# SPDX-License-Identifier: Apache-2.0
"""How much symmetric memory a buffer takes, before there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepcomm.config import BufferConfig
from deepcomm.errors import InvalidArgument
from deepcomm.types import SCALE_TILE

if TYPE_CHECKING:
    from deepcomm._C import cpu

__all__ = ["BufferBytes", "buffer_bytes"]


@dataclass(frozen=True, slots=True)
class BufferBytes:
    """Bytes of symmetric memory of one rank.

    Attributes:
        high_throughput: Reserved at construction: the generations of the ring, for bfloat16 rows of
            ``TOKEN`` layout. On CPUs wider rows and ``EXPERT`` rows reserve more when they come.
        low_latency: Reserved by the first low-latency operation, for bfloat16 rows.
    """

    high_throughput: int
    low_latency: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.high_throughput + self.low_latency


def buffer_bytes(
    *,
    num_ranks: int,
    num_experts: int,
    num_topk: int,
    hidden: int,
    max_tokens_per_rank: int,
    ranks_per_node: int | None = None,
    num_generations: int = 3,
    num_low_latency_slots: int = 4,
    device: str = "cpu",
    rail: str = "auto",
) -> BufferBytes:
    """Return the symmetric memory of one rank of a buffer; needs no group and no GPU.

    Args:
        num_ranks: R, ranks of the group.
        num_experts: As for ``Buffer``, like the others.
        num_topk: See ``Buffer``.
        hidden: See ``Buffer``.
        max_tokens_per_rank: See ``Buffer``.
        ranks_per_node: See ``Buffer``; None is one node.
        num_generations: See ``Buffer``.
        num_low_latency_slots: See ``Buffer``.
        device: "cpu" or "cuda".
        rail: See ``Buffer``; "gin" and "nccl" need mirrors of the other nodes' memory.

    Raises:
        InvalidArgument: An argument is out of range.
    """
    from deepcomm._C import cpu

    if num_ranks < 1:
        raise InvalidArgument(f"num_ranks: expected at least 1, got {num_ranks}")
    config = BufferConfig(
        num_experts=num_experts,
        num_topk=num_topk,
        hidden=hidden,
        max_tokens_per_rank=max_tokens_per_rank,
        ranks_per_node=ranks_per_node,
        num_generations=num_generations,
        num_low_latency_slots=num_low_latency_slots,
        rail=rail,
    )
    config.check(num_ranks)
    if device != "cpu":
        return _cuda_bytes(config, num_ranks, device)
    native = native_config(config, rank=0, num_ranks=num_ranks, num_threads=1)
    row_bytes = hidden * 2
    scale_bytes = -(-hidden // SCALE_TILE) * 4
    return BufferBytes(
        high_throughput=cpu.reserved_bytes(native),
        low_latency=cpu.low_latency_bytes(native, row_bytes, scale_bytes)
        if num_low_latency_slots
        else 0,
    )


def _cuda_bytes(config: BufferConfig, num_ranks: int, device: str) -> BufferBytes:
    from deepcomm.backends.cuda.exchange import (
        exchange_layout,
        mirrored_bytes,
        node_config,
        rail_config,
    )
    from deepcomm.backends.cuda.low_latency_slots import low_latency_layout
    from deepcomm.topology import Topology

    if device != "cuda":
        raise InvalidArgument(f"device: expected 'cpu' or 'cuda', got {device!r}")
    topology = Topology(0, num_ranks, config.ranks_per_node or num_ranks)
    num_nodes, ranks_per_node = topology.num_nodes, topology.ranks_per_node
    if num_nodes == 1:
        high_throughput = exchange_layout(config, num_ranks, 1).total_bytes
    else:
        rail = exchange_layout(rail_config(config), num_nodes, 1)
        node = exchange_layout(node_config(config, num_nodes), ranks_per_node, num_nodes)
        on_rail = mirrored_bytes(rail) if config.is_carried else rail.total_bytes
        high_throughput = on_rail + node.total_bytes
    return BufferBytes(
        high_throughput=high_throughput,
        low_latency=low_latency_layout(config, topology).total_bytes
        if config.num_low_latency_slots
        else 0,
    )


def native_config(
    config: BufferConfig, *, rank: int, num_ranks: int, num_threads: int
) -> cpu.EndpointConfig:
    """Return the native form of a configuration whose nodes are known."""
    from deepcomm._C import cpu

    native = cpu.EndpointConfig()
    native.rank = rank
    native.num_ranks = num_ranks
    native.ranks_per_node = config.ranks_per_node or num_ranks
    native.num_experts = config.num_experts
    native.num_topk = config.num_topk
    native.hidden = config.hidden
    native.max_tokens = config.max_tokens_per_rank
    native.num_generations = config.num_generations
    native.num_slots = config.num_low_latency_slots
    native.num_threads = num_threads
    return native
