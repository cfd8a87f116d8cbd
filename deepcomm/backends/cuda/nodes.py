# SPDX-License-Identifier: Apache-2.0
"""Operations of several nodes: on the rail to the nodes, then inside each node, and back.

A dispatch on the rail takes each token once to every node that owns one of its experts: there its
rank of the rail has it in a landing area, with ids that are those of the node. A second dispatch,
inside the node, takes it on from there, in the order of the tokens' ranks. Combine goes the same
way back: sums over the ranks of a node, then over nodes (``nodes_combine.py``). The stages follow
each other on the stream without the host: how many tokens there are to forward, and that an
operation is called off, the second learns from what the first has left in device memory.
csrc/kernels/PROTOCOLS.md: nodes.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from deepcomm.backends.cuda.carried_rows import RowBytes
from deepcomm.backends.cuda.dispatch import Dispatch
from deepcomm.backends.cuda.domain import Domain, Machine, Position
from deepcomm.backends.cuda.engine import Traffic
from deepcomm.backends.cuda.exchange import node_config, rail_config
from deepcomm.backends.cuda.inputs import asked_of_dispatch, host_waits
from deepcomm.backends.cuda.nodes_combine import NodesCombine
from deepcomm.backends.cuda.nodes_record import NodesRecord, record_of, routing_on_rail
from deepcomm.backends.cuda.routing import RoutingId, Stage, refuse, taking_turn
from deepcomm.backends.cuda.tensors import lease_landing
from deepcomm.checks import check_dispatch
from deepcomm.group import Group, SubGroup, agree_on
from deepcomm.types import DispatchOutput, RecvLayout, ScaledTensor

if TYPE_CHECKING:
    from deepcomm.backends.base import CombineRequest, DispatchRequest
    from deepcomm.backends.cuda.exchange import Exchange
    from deepcomm.backends.cuda.network import Network
    from deepcomm.backends.cuda.tensors import Forwarded
    from deepcomm.config import BufferConfig
    from deepcomm.topology import Topology

__all__ = ["NodesEngine"]


class NodesEngine:
    """Nodes that are domains of their own, and rails between them."""

    def __init__(
        self,
        group: Group,
        config: BufferConfig,
        machine: Machine,
        topology: Topology,
        networks: tuple[str, ...],
    ) -> None:
        """Load kernels and reserve memory; collective.

        Args:
            group: Of the buffer.
            config: Likewise.
            machine: Likewise.
            topology: Likewise.
            networks: Kinds of what is between the ranks of a rail, the best one first; none where
                they reach each other.
        """
        self.config = config
        self.topology = topology
        self._group = group
        num_nodes, ranks_per_node = topology.num_nodes, topology.ranks_per_node
        self.rail = Domain(
            SubGroup(group, topology.rail_ranks),
            rail_config(config),
            machine,
            Position(topology.local, ranks_per_node, is_rail=True, networks=networks),
        )
        try:
            self.node = Domain(
                SubGroup(group, topology.node_ranks),
                node_config(config, num_nodes),
                machine,
                Position(topology.node_ranks[0], 1, num_origins=num_nodes),
            )
        except BaseException:
            self.rail.close()  # its network is at work already
            raise
        self.landing: torch.Tensor | None = self._lease(self.rail.exchange)

    @property
    def num_bytes(self) -> int:
        """Bytes of symmetric memory reserved on this rank."""
        return self.rail.exchange.memory.num_bytes + self.node.exchange.memory.num_bytes

    @property
    def num_reserved(self) -> int:
        """How many generations are reserved for graphs."""
        return self.node.exchange.generations.num_reserved

    def dispatch(self, request: DispatchRequest, routing: RoutingId) -> NodesDispatch:
        """Check the arguments of a dispatch."""
        self.rail.carrier.check_capture()
        return NodesDispatch(self, routing, request)

    def combine(self, request: CombineRequest, buffer_id: bytes) -> NodesCombine:
        """Check the arguments of a combine."""
        self.rail.carrier.check_capture()
        return NodesCombine(self, request, buffer_id)

    def refuse_dispatch(self, request: DispatchRequest, buffer_id: bytes) -> None:
        """Tell the peers of both stages that this rank does not take part in a dispatch.

        Those of a cached one have told the network already what they will carry.
        """
        refuse(self.rail, Stage(is_last=False))
        if (routing := routing_on_rail(request.handle, buffer_id)) is not None:
            num_topk = int(routing.topk_idx.shape[1])
            row_bytes = RowBytes.of_dispatch(request, self.config.hidden, num_topk)
            self.rail.carrier.carry_rows(routing.rows, row_bytes)
        refuse(self.node, Stage(after=self.rail))

    def refuse_combine(self, request: CombineRequest, buffer_id: bytes) -> None:
        """Tell the peers of both stages that this rank does not take part in a combine.

        They have told the network already what they will carry.
        """
        refuse(self.rail, Stage(is_last=False))
        refuse(self.node, Stage(after=self.rail))
        if (routing := routing_on_rail(request.handle, buffer_id)) is not None:
            row_bytes = RowBytes.of_combine(request, self.config.hidden)
            self.rail.carrier.carry_pushed(routing.rows, routing.plan, row_bytes, self.node)

    def grow(self, max_tokens: int) -> None:
        """Make room for more tokens a rank; collective."""
        with contextlib.ExitStack() as undo:
            rail = self.rail.reserve(max_tokens)
            undo.callback(rail.close)
            node = self.node.reserve(max_tokens * self.topology.num_nodes)
            undo.callback(node.close)
            self.landing = self._lease(rail)
            undo.pop_all()
        self.rail.move_to(rail)
        self.node.move_to(node)
        self.config = replace(self.config, max_tokens_per_rank=max_tokens)

    def _lease(self, rail: Exchange) -> torch.Tensor:
        """Return the bytes of the only generation of a rail; collective."""
        return agree_on(self._group, "Buffer", lambda: lease_landing(rail, 0))

    def traffic(self) -> tuple[Traffic, Traffic]:
        """Return the counters inside the node and on the rail."""
        return Traffic(self.node), Traffic(self.rail)

    @property
    def network(self) -> Network | None:
        """What is between the ranks of a rail, None where they reach each other."""
        return self.rail.carrier.network

    @property
    def rail_name(self) -> str:
        """How ranks of a rail reach each other, as ``rail`` of a buffer names it."""
        return self.rail.network_name or "lsa"

    def describe_rail(self) -> str:
        """Say how ranks of a rail are reached, for ``explain()``."""
        return self.rail.carrier.describe()

    def close(self) -> None:
        """Release everything; idempotent."""
        self.landing = None
        self.rail.close()
        self.node.close()


class NodesDispatch:
    """One dispatch of one rank, in two stages."""

    def __init__(self, engine: NodesEngine, routing: RoutingId, request: DispatchRequest) -> None:
        """Check the arguments.

        Raises:
            InvalidArgument: The first argument that is wrong.
        """
        checked = check_dispatch(request, engine.config, engine.rail.device)
        self._engine = engine
        self._routing = routing
        self._request = request
        self._record = None if request.handle is None else record_of(request.handle)
        towards_nodes = replace(
            request,
            handle=None if self._record is None else self._record.rail,
            recv_layout=None if self._record else RecvLayout.TOKEN,
            expert_alignment=None,
            capacity=None,
            zero_padding=False,
            out=None,
        )
        self._asked = asked_of_dispatch(checked)
        stage = Stage(
            is_last=False,
            host_waits=host_waits(request, checked, engine.config),
            asked=self._asked,
        )
        self._on_rail = Dispatch(engine.rail, routing, towards_nodes, stage)
        self._in_node: Dispatch | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self._on_rail.num_tokens

    def run(self) -> DispatchOutput | None:
        """Launch; None where the operation has to be repeated in a larger buffer."""
        engine = self._engine
        assert engine.landing is not None
        # The peers of the second stage wait for this rank, also if the host fails before it.
        with taking_turn(engine.node, Stage(after=engine.rail)):
            forwarded = self._on_rail.run_towards_nodes(engine.landing)
            self._in_node = self._second_stage(forwarded)
            output = self._in_node.run()
        if output is None:
            return None
        inner, rail = output.handle, forwarded.handle
        handle = replace(
            inner,
            num_tokens=rail.num_tokens,
            topk_idx=rail.topk_idx,
            topk_weights=rail.topk_weights,
            records=NodesRecord(rail, inner),
        )
        return replace(output, handle=handle)

    def _second_stage(self, forwarded: Forwarded) -> Dispatch:
        engine, request = self._engine, self._request
        rows, is_new = forwarded.rows, self._record is None
        inside_node = replace(
            request,
            x=rows.x if rows.scales is None else ScaledTensor(rows.x, rows.scales),
            topk_idx=rows.topk_idx if is_new else None,
            topk_weights=rows.topk_weights,
            handle=None if self._record is None else self._record.node,
            quantize=None,
            scale_format="fp32",
        )
        stage = Stage(after=engine.rail, tokens_from=forwarded.tokens_from, asked=self._asked)
        return Dispatch(engine.node, self._routing, inside_node, stage)

    def inputs(self) -> list[torch.Tensor]:
        """Return the tensors that kernels read."""
        inside = [] if self._in_node is None else self._in_node.inputs()
        return self._on_rail.inputs() + inside

    def owned_outputs(self, output: DispatchOutput) -> list[torch.Tensor]:
        """Return the tensors of the result that are not views of symmetric memory."""
        assert self._in_node is not None
        record = record_of(output.handle)
        kept = [*record.rail.records.tensors, record.rail.topk_weights]
        inside = self._in_node.owned_outputs(replace(output, handle=record.node))
        return inside + [tensor for tensor in kept if tensor is not None]
