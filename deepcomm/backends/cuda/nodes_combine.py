# SPDX-License-Identifier: Apache-2.0
"""Combine of several nodes: the rail meets, each node sums and sends, the rail adds up.

All that the host does beside launching comes before the first launch: a host that fails there
refuses both stages. csrc/kernels/PROTOCOLS.md: nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deepcomm._C import kernels
from deepcomm.backends.cuda.carried_rows import RowBytes
from deepcomm.backends.cuda.combine import CombineTensors, combine_header, name_inputs
from deepcomm.backends.cuda.inputs import asked_of_combine, bring_combine_inputs
from deepcomm.backends.cuda.nodes_record import record_of
from deepcomm.backends.cuda.routing import Stage, routing_table, taking_turn
from deepcomm.backends.cuda.tensors import address_of
from deepcomm.backends.cuda.tensors import record_of as record_of_stage
from deepcomm.checks import check_combine
from deepcomm.types import CombineOutput, RecvLayout

if TYPE_CHECKING:
    from deepcomm.backends.base import CombineRequest
    from deepcomm.backends.cuda.nodes import NodesEngine
    from deepcomm.backends.cuda.runtime import Function
    from deepcomm.checks import CheckedCombine

__all__ = ["NodesCombine"]


@dataclass(frozen=True, slots=True, eq=False)
class OwnSums:
    """What does not leave a node: written inside it, read on the rail.

    Attributes:
        sums: float32 [T, H], of this rank's own tokens.
        weights: float32 [T, K] that are carried back to them, or None.
    """

    sums: torch.Tensor
    weights: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Launches:
    """Kernels of one combine and their arguments, in their order."""

    open: tuple[Function, kernels.CombineOpenParams]
    inside: tuple[Function, kernels.CombineParams]
    between: tuple[Function, kernels.CombineParams]


class NodesCombine:
    """One combine of one rank, in two stages."""

    def __init__(self, engine: NodesEngine, request: CombineRequest, buffer_id: bytes) -> None:
        """Check the arguments.

        Raises:
            InvalidArgument: The first argument that is wrong.
        """
        self._engine = engine
        self._request = request
        self._buffer_id = buffer_id
        self._checked: CheckedCombine = check_combine(
            request, engine.config, engine.node.num_local_experts, engine.rail.device
        )
        self._handles = record_of(request.handle)
        self._rail_record = record_of_stage(self._handles.rail, buffer_id)
        self._node_record = record_of_stage(self._handles.node, buffer_id)
        self._own: OwnSums | None = None

    def run(self) -> CombineOutput:
        """Launch."""
        engine, runtime = self._engine, self._engine.rail.runtime
        try:
            tensors, launches = self._prepare()
        except Exception:
            if not runtime.is_capturing():
                engine.refuse_combine(self._request, self._buffer_id)
            raise
        # The peers of both stages wait for this rank, also if the host fails on the way.
        with (
            taking_turn(engine.node, Stage(after=engine.rail)),
            taking_turn(engine.rail, Stage(is_last=False)),
        ):
            self._launch(launches)
        runtime.flush()
        return tensors.output()

    def _launch(self, launches: Launches) -> None:
        rail, node = self._engine.rail, self._engine.node
        function, opening = launches.open
        rail.launch(function, 1, opening, meets=True)
        function, params = launches.inside
        node.launch(function, node.num_sms, params, meets=True)
        # A part is on its way while later tokens are still being summed.
        record = self._rail_record
        row_bytes = RowBytes.of_combine(self._request, self._engine.config.hidden)
        rail.carrier.carry_pushed(record.rows, record.plan, row_bytes, node)
        function, params = launches.between
        rail.launch(function, rail.num_sms, params)

    def _prepare(self) -> tuple[CombineTensors, Launches]:
        """Allocate, copy inputs that kernels cannot take, and fill all arguments."""
        engine, request = self._engine, self._request
        checked = bring_combine_inputs(request, self._checked, engine.node)
        self._checked = checked
        tensors = CombineTensors(request, checked)
        shape = (self._handles.rail.num_tokens, engine.config.hidden)
        weights = tensors.topk_weights
        own = OwnSums(
            checked.rows.new_empty(shape, dtype=torch.float32),
            None if weights is None else torch.empty_like(weights),
        )
        self._own = own
        between, opening = engine.rail.functions.combine_nodes, engine.rail.functions.combine_open
        assert between is not None
        assert opening is not None
        by_expert = request.handle.recv_layout is not RecvLayout.TOKEN
        rail = engine.rail.meet(reports=False)
        launches = Launches(
            (opening, self._opening(rail)),
            (engine.node.functions.combine[by_expert], self._inside(own, rail)),
            (between, self._between(own, tensors)),
        )
        return tensors, launches

    def _opening(self, rail: kernels.MeetParams) -> kernels.CombineOpenParams:
        handle, record = self._handles.rail, self._rail_record
        params = kernels.CombineOpenParams()
        params.meet = rail
        asked = asked_of_combine(self._request, self._checked)
        params.meet.header = combine_header(handle, record, self._checked, asked)
        params.rail_made = address_of(record.plan[-1:])  # the last word: layout/plan.hpp
        params.node_made = address_of(self._node_record.plan[-1:])
        params.num_tokens = handle.num_tokens
        return params

    def _inside(self, own: OwnSums, rail: kernels.MeetParams) -> kernels.CombineParams:
        handle, record = self._handles.node, self._node_record
        params = kernels.CombineParams()
        params.meet = self._engine.node.meet(self._engine.rail)
        asked = asked_of_combine(self._request, self._checked)
        params.meet.header = combine_header(handle, record, self._checked, asked)
        name_inputs(params, handle, record, self._checked)
        params.target.own_sums = address_of(own.sums)
        params.target.topk_weights = address_of(own.weights)
        params.rail.on_rail(rail)
        params.rail.plan = address_of(self._rail_record.plan)
        return params

    def _between(self, own: OwnSums, tensors: CombineTensors) -> kernels.CombineParams:
        handle = self._handles.rail
        params = kernels.CombineParams()
        params.meet = self._engine.rail.meet(self._engine.node)
        params.table = routing_table(self._rail_record)
        params.num_tokens = handle.num_tokens
        params.num_topk = int(handle.topk_idx.shape[1])
        params.outputs.own_sums = address_of(own.sums)
        params.outputs.carried = address_of(own.weights)
        tensors.name(params, self._checked.bias)
        return params

    def inputs(self) -> list[torch.Tensor]:
        """Return the tensors that kernels read."""
        checked, own = self._checked, self._own
        tensors = [
            *(checked.rows, checked.bias, checked.carried, self._handles.node.topk_weights),
            *self._node_record.tensors,
            *self._rail_record.tensors,
            *((own.sums, own.weights) if own is not None else ()),
        ]
        return [tensor for tensor in tensors if tensor is not None]
