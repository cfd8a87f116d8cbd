# SPDX-License-Identifier: Apache-2.0
"""Combine on CUDA: one kernel, and nothing that the host waits for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deepcomm._C import kernels
from deepcomm.backends.cuda import failure as failures
from deepcomm.backends.cuda.carrier import RowBytes
from deepcomm.backends.cuda.inputs import asked_of_combine, bring_combine_inputs
from deepcomm.backends.cuda.routing import (
    ALONE,
    LAYOUTS,
    NO_CAPACITY,
    Stage,
    routing_table,
    taking_turn,
)
from deepcomm.backends.cuda.tensors import address_of, record_of
from deepcomm.checks import check_combine
from deepcomm.types import CombineOutput, RecvLayout

if TYPE_CHECKING:
    from deepcomm.backends.base import CombineRequest
    from deepcomm.backends.cuda.domain import Domain
    from deepcomm.checks import CheckedCombine

__all__ = ["Combine", "OwnSums"]


@dataclass(frozen=True, slots=True, eq=False)
class OwnSums:
    """Sums over a node of the tokens of one of its own ranks: written there, read on its rail.

    Attributes:
        sums: float32 [T, H].
        node: Index of the node.
    """

    sums: torch.Tensor
    node: int


class Combine:
    """One combine of one rank in one domain."""

    def __init__(
        self, domain: Domain, buffer_id: bytes, request: CombineRequest, stage: Stage = ALONE
    ) -> None:
        """Check the arguments.

        Raises:
            InvalidArgument: The first argument that is wrong.
        """
        self._domain = domain
        self._request = request
        self._stage = stage
        self._own_sums: OwnSums | None = None
        self._checked: CheckedCombine = check_combine(
            request, domain.config, domain.num_local_experts, domain.device
        )
        self._record = record_of(request.handle, buffer_id)

    def run(self, own_sums: OwnSums | None = None) -> CombineOutput:
        """Launch.

        Args:
            own_sums: With several nodes, what does not leave this rank's.
        """
        self._own_sums = own_sums
        with taking_turn(self._domain, self._stage):
            self._checked = bring_combine_inputs(self._request, self._checked, self._domain)
            return self._run()

    def _run(self) -> CombineOutput:
        domain, request, handle = self._domain, self._request, self._request.handle
        hidden, num_topk = domain.config.hidden, int(handle.topk_idx.shape[1])
        out = request.out
        if out is None or out.data_ptr() % 16:
            out = torch.empty(
                handle.num_tokens, hidden, dtype=self._checked.rows.dtype, device=domain.device
            )
        weights: torch.Tensor | None = None
        if self._checked.carried is not None:
            weights = torch.empty(
                handle.num_tokens, num_topk, dtype=torch.float32, device=domain.device
            )
        by_expert = handle.recv_layout is not RecvLayout.TOKEN
        params = self._params(out, weights)
        function = domain.functions.combine[by_expert]
        domain.launch(function, domain.num_sms, params, meets=True)
        row_bytes = RowBytes.of_combine(request, hidden)
        domain.carrier.carry_pushed(self._record.rows, self._record.plan, row_bytes)
        domain.runtime.flush()
        if request.out is not None and out is not request.out:
            out = request.out.copy_(out)
        return CombineOutput(x=out, topk_weights=weights)

    def inputs(self) -> list[torch.Tensor]:
        """Return the tensors that the kernel reads."""
        weights = self._request.handle.topk_weights
        checked = self._checked
        tensors = [checked.rows, checked.bias, checked.carried, weights, *self._record.tensors]
        if self._own_sums is not None:
            tensors.append(self._own_sums.sums)
        return [tensor for tensor in tensors if tensor is not None]

    def _params(self, out: torch.Tensor, weights: torch.Tensor | None) -> kernels.CombineParams:
        checked, record, handle = self._checked, self._record, self._request.handle
        params = kernels.CombineParams()
        params.meet = self._meet()
        params.table = routing_table(record)
        rows, bias = checked.rows, checked.bias
        params.outputs.rows = address_of(rows)
        params.outputs.row_stride = rows.stride(0) * rows.element_size()
        params.outputs.row_slots = address_of(record.row_slots)
        if checked.apply_weights:
            params.outputs.row_weights = address_of(record.row_weights)
            params.topk_weights = address_of(handle.topk_weights)
        params.outputs.carried = address_of(checked.carried)
        if self._own_sums is not None:
            params.own_origin = self._own_sums.node
            sums = address_of(self._own_sums.sums)
            params.outputs.own_sums = params.target.own_sums = sums
        params.target.out = address_of(out)
        if bias is not None:
            params.target.bias = address_of(bias)
            params.target.bias_stride = bias.stride(0) * bias.element_size()
        params.target.topk_weights = address_of(weights)
        params.num_tokens = handle.num_tokens
        params.num_topk = int(handle.topk_idx.shape[1])
        return params

    def _meet(self) -> kernels.MeetParams:
        checked, handle = self._checked, self._request.handle
        asked = self._stage.asked or asked_of_combine(self._request, checked)
        signature = failures.Signature(
            operation=2,
            layout=LAYOUTS[asked.layout],
            wire=asked.wire,
            scales=0,
            has_weights=int(checked.carried is not None),
            apply_weights=int(asked.apply_weights),
            num_topk=int(handle.topk_idx.shape[1]),
            handle=self._record.serial,
        )
        meet = self._domain.meet(self._stage.after, reports=self._stage.is_last)
        meet.header = kernels.Header(
            signature.pack(), NO_CAPACITY, handle.num_tokens, 0, asked.alignment, 0
        )
        return meet
