# SPDX-License-Identifier: Apache-2.0
"""How a buffer's high-throughput operations are carried out: by one domain, or see ``nodes.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from deepcomm.backends.cuda.combine import Combine
from deepcomm.backends.cuda.dispatch import Dispatch
from deepcomm.backends.cuda.domain import Domain, Machine, Position
from deepcomm.backends.cuda.exchange import NUM_COUNTERS
from deepcomm.backends.cuda.routing import RoutingId, refuse

if TYPE_CHECKING:
    import torch

    from deepcomm.backends.base import CombineRequest, DispatchRequest
    from deepcomm.backends.cuda.network import Network
    from deepcomm.config import BufferConfig
    from deepcomm.group import Group
    from deepcomm.topology import Topology
    from deepcomm.types import CombineOutput, DispatchOutput

__all__ = [
    "CombineOperation",
    "DispatchOperation",
    "Engine",
    "FlatEngine",
    "Traffic",
    "waits_by_rank",
]


class DispatchOperation(Protocol):
    """A dispatch whose arguments are good."""

    @property
    def num_tokens(self) -> int:
        """T."""

    def run(self) -> DispatchOutput | None:
        """Launch; None where the operation has to be repeated in a larger buffer."""

    def inputs(self) -> list[torch.Tensor]:
        """Return the tensors that kernels read."""

    def owned_outputs(self, output: DispatchOutput) -> list[torch.Tensor]:
        """Return the tensors of the result that are not views of symmetric memory."""


class CombineOperation(Protocol):
    """A combine whose arguments are good."""

    def run(self) -> CombineOutput:
        """Launch."""

    def inputs(self) -> list[torch.Tensor]:
        """Return the tensors that kernels read."""


class Traffic:
    """Counters of a rank, read once.

    Attributes:
        bytes_local: Of rows and scales that stayed on the rank.
        bytes_peers: Of those that went to other ranks of the domain.
        tokens_received: Rows that arrived.
        wait_us: By rank of the domain.
    """

    def __init__(self, domain: Domain) -> None:
        """Read them; work that was launched is awaited."""
        counters = domain.workspace.counters.tolist()
        self.bytes_local, self.bytes_peers, self.tokens_received = counters[:3]
        self.wait_us = [wait_ns // 1000 for wait_ns in counters[NUM_COUNTERS:]]


def waits_by_rank(topology: Topology, node: Traffic, rail: Traffic | None) -> tuple[int, ...]:
    """Return how long each rank was awaited; those of other nodes and rails never are."""
    wait_us = dict(zip(topology.node_ranks, node.wait_us, strict=True))
    if rail is not None:
        for rank, waited in zip(topology.rail_ranks, rail.wait_us, strict=True):
            wait_us[rank] = wait_us.get(rank, 0) + waited
    return tuple(wait_us.get(rank, 0) for rank in range(topology.num_ranks))


class Engine(Protocol):
    """One rank's part in the high-throughput operations of a buffer."""

    @property
    def num_bytes(self) -> int:
        """Bytes of symmetric memory reserved on this rank."""

    @property
    def num_reserved(self) -> int:
        """How many generations are reserved for graphs."""

    def dispatch(self, request: DispatchRequest, routing: RoutingId) -> DispatchOperation:
        """Check the arguments of a dispatch.

        Raises:
            InvalidArgument: The first argument that is wrong.
        """

    def combine(self, request: CombineRequest, buffer_id: bytes) -> CombineOperation:
        """Check the arguments of a combine.

        Raises:
            InvalidArgument: The first argument that is wrong.
        """

    def refuse_dispatch(self, request: DispatchRequest, buffer_id: bytes) -> None:
        """Tell the peers that this rank does not take part in a dispatch."""

    def refuse_combine(self, request: CombineRequest, buffer_id: bytes) -> None:
        """Tell the peers that this rank does not take part in a combine."""

    def grow(self, max_tokens: int) -> None:
        """Make room for more tokens a rank; collective. What fails leaves everything as it was."""

    def traffic(self) -> tuple[Traffic, Traffic | None]:
        """Return the counters inside the node and, with several, on the rail."""

    def describe_rail(self) -> str:
        """Say how ranks of a rail are reached, for ``explain()``."""

    @property
    def network(self) -> Network | None:
        """What is between the ranks of a rail, None where they reach each other."""

    def close(self) -> None:
        """Release everything; idempotent."""


class FlatEngine:
    """All ranks are one domain."""

    network = None

    def __init__(self, group: Group, config: BufferConfig, machine: Machine) -> None:
        """Load kernels and reserve memory; collective."""
        self.domain = Domain(group, config, machine, Position())

    @property
    def num_bytes(self) -> int:
        """Bytes of symmetric memory reserved on this rank."""
        return self.domain.exchange.memory.num_bytes

    @property
    def num_reserved(self) -> int:
        """How many generations are reserved for graphs."""
        return self.domain.exchange.generations.num_reserved

    def dispatch(self, request: DispatchRequest, routing: RoutingId) -> Dispatch:
        """Check the arguments of a dispatch."""
        return Dispatch(self.domain, routing, request)

    def combine(self, request: CombineRequest, buffer_id: bytes) -> Combine:
        """Check the arguments of a combine."""
        return Combine(self.domain, buffer_id, request)

    def refuse_dispatch(self, request: DispatchRequest, buffer_id: bytes) -> None:
        """Tell the peers that this rank does not take part in a dispatch."""
        del request, buffer_id
        refuse(self.domain)

    def refuse_combine(self, request: CombineRequest, buffer_id: bytes) -> None:
        """Tell the peers that this rank does not take part in a combine."""
        del request, buffer_id
        refuse(self.domain)

    def grow(self, max_tokens: int) -> None:
        """Make room for more tokens a rank; collective."""
        self.domain.move_to(self.domain.reserve(max_tokens))

    def traffic(self) -> tuple[Traffic, None]:
        """Return the counters."""
        return Traffic(self.domain), None

    def describe_rail(self) -> str:
        """Say that there is none."""
        return "none"

    def close(self) -> None:
        """Release everything."""
        self.domain.close()
