# SPDX-License-Identifier: Apache-2.0
"""Combine on CUDA: one kernel, and nothing that the host waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from deepcomm._C import kernels
from deepcomm.backends.cuda import failure as failures
from deepcomm.backends.cuda.inputs import asked_of_combine, bring_combine_inputs
from deepcomm.backends.cuda.routing import LAYOUTS, NO_CAPACITY, Asked, routing_table, taking_turn
from deepcomm.backends.cuda.tensors import address_of, record_of
from deepcomm.checks import check_combine
from deepcomm.types import CombineOutput, RecvLayout

if TYPE_CHECKING:
    from deepcomm.backends.base import CombineRequest
    from deepcomm.backends.cuda.domain import Domain
    from deepcomm.backends.cuda.tensors import CudaRecord
    from deepcomm.checks import CheckedCombine
    from deepcomm.types import Handle

__all__ = ["Combine", "CombineTensors", "combine_header", "name_inputs"]


class CombineTensors:
    """What a combine returns.

    Attributes:
        x: [T, H], at a multiple of 16 bytes.
        topk_weights: [T, K], or None.
    """

    def __init__(self, request: CombineRequest, checked: CheckedCombine) -> None:
        """Allocate what the user does not give."""
        self._given = request.out
        num_tokens, num_topk = request.handle.num_tokens, int(request.handle.topk_idx.shape[1])
        rows = checked.rows
        x = request.out
        if x is None or x.data_ptr() % 16:
            x = rows.new_empty(num_tokens, rows.shape[1])
        self.x = x
        self.topk_weights: torch.Tensor | None = None
        if checked.carried is not None:
            self.topk_weights = rows.new_empty(num_tokens, num_topk, dtype=torch.float32)

    def name(self, params: kernels.CombineParams, bias: torch.Tensor | None) -> None:
        """Name them, and what is added to each row."""
        target = params.target
        target.out = address_of(self.x)
        target.topk_weights = address_of(self.topk_weights)
        if bias is not None:
            target.bias = address_of(bias)
            target.bias_stride = bias.stride(0) * bias.element_size()

    def output(self) -> CombineOutput:
        """Return them, in the user's memory where that was given."""
        x = self.x
        if self._given is not None and x is not self._given:
            x = self._given.copy_(x)
        return CombineOutput(x=x, topk_weights=self.topk_weights)


class Combine:
    """One combine of one rank, where all ranks are one domain."""

    def __init__(self, domain: Domain, buffer_id: bytes, request: CombineRequest) -> None:
        """Check the arguments.

        Raises:
            InvalidArgument: The first argument that is wrong.
        """
        self._domain = domain
        self._request = request
        self._checked: CheckedCombine = check_combine(
            request, domain.config, domain.num_local_experts, domain.device
        )
        self._record = record_of(request.handle, buffer_id)

    def run(self) -> CombineOutput:
        """Launch."""
        with taking_turn(self._domain):
            self._checked = bring_combine_inputs(self._request, self._checked, self._domain)
            return self._run()

    def _run(self) -> CombineOutput:
        domain, request, checked = self._domain, self._request, self._checked
        tensors = CombineTensors(request, checked)
        params = kernels.CombineParams()
        params.meet = domain.meet()
        asked = asked_of_combine(request, checked)
        params.meet.header = combine_header(request.handle, self._record, checked, asked)
        name_inputs(params, request.handle, self._record, checked)
        tensors.name(params, checked.bias)
        by_expert = request.handle.recv_layout is not RecvLayout.TOKEN
        domain.launch(domain.functions.combine[by_expert], domain.num_sms, params, meets=True)
        domain.runtime.flush()
        return tensors.output()

    def inputs(self) -> list[torch.Tensor]:
        """Return the tensors that the kernel reads."""
        weights = self._request.handle.topk_weights
        checked = self._checked
        tensors = [checked.rows, checked.bias, checked.carried, weights, *self._record.tensors]
        return [tensor for tensor in tensors if tensor is not None]


def combine_header(
    handle: Handle, record: CudaRecord, checked: CheckedCombine, asked: Asked
) -> kernels.Header:
    """Return what a rank tells the others of a domain whose handle and record are given."""
    signature = failures.Signature(
        operation=2,
        layout=LAYOUTS[asked.layout],
        wire=asked.wire,
        scales=0,
        has_weights=int(checked.carried is not None),
        apply_weights=int(asked.apply_weights),
        num_topk=int(handle.topk_idx.shape[1]),
        handle=record.serial,
    )
    return kernels.Header(signature.pack(), NO_CAPACITY, handle.num_tokens, 0, asked.alignment, 0)


def name_inputs(
    params: kernels.CombineParams, handle: Handle, record: CudaRecord, checked: CheckedCombine
) -> None:
    """Name what is summed, and by which tables."""
    rows = checked.rows
    params.table = routing_table(record)
    params.num_tokens = handle.num_tokens
    params.num_topk = int(handle.topk_idx.shape[1])
    outputs = params.outputs
    outputs.rows = address_of(rows)
    outputs.row_stride = rows.stride(0) * rows.element_size()
    outputs.row_slots = address_of(record.row_slots)
    outputs.carried = address_of(checked.carried)
    if checked.apply_weights:
        outputs.row_weights = address_of(record.row_weights)
        params.topk_weights = address_of(handle.topk_weights)
