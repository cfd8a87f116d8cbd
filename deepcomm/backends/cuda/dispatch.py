# SPDX-License-Identifier: Apache-2.0
"""Dispatch on CUDA: arguments of its two kernels, and what they leave behind.

Exact ``TOKEN``: both kernels are launched, then the host waits for the counts alone and returns
views whose rows are still on their way. Exact expert layouts: the host waits for the counts between
the kernels, to allocate. With a capacity, or cached, the host waits for nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from deepcomm._C import kernels
from deepcomm.backends.cuda import failure as failures
from deepcomm.backends.cuda.carried_rows import RowBytes
from deepcomm.backends.cuda.exchange import MAX_COUNT_BLOCKS, Exchange
from deepcomm.backends.cuda.generations import Landing
from deepcomm.backends.cuda.inputs import (
    asked_of_dispatch,
    bring_dispatch_inputs,
    host_waits,
)
from deepcomm.backends.cuda.routing import (
    ALONE,
    LAYOUTS,
    NO_CAPACITY,
    RoutingId,
    Stage,
    fill_count_outputs,
    fill_rail_side,
    routing_table,
    taking_turn,
)
from deepcomm.backends.cuda.scales import turn_scales
from deepcomm.backends.cuda.tensors import (
    Counted,
    CudaRecord,
    Forwarded,
    Outputs,
    RowFormat,
    address_of,
    expert_outputs,
    lease_landing,
    owned_copy,
    record_of,
    row_format,
    token_views,
)
from deepcomm.checks import check_dispatch, check_out_shape
from deepcomm.types import DispatchOutput, Handle, RecvLayout

if TYPE_CHECKING:
    from deepcomm.backends.base import DispatchRequest
    from deepcomm.backends.cuda.domain import Domain
    from deepcomm.checks import CheckedDispatch

__all__ = ["Dispatch"]

LANDING_IDS_ARE_64 = 1 << 31
TOKENS_PER_COUNT_BLOCK = 64
WAITS_OF_STAGES = 3
"""Of the device before the counts are there: the meetings of both stages, arrivals of the first."""


class Dispatch:
    """One dispatch of one rank in one domain."""

    def __init__(
        self, domain: Domain, routing: RoutingId, request: DispatchRequest, stage: Stage = ALONE
    ) -> None:
        """Check the arguments.

        Raises:
            InvalidArgument: The first argument that is wrong.
        """
        self._domain = domain
        self._routing = routing
        self._request = request
        self._stage = stage
        self._checked: CheckedDispatch = check_dispatch(request, domain.config, domain.device)
        self._cached = (
            None if request.handle is None else record_of(request.handle, routing.buffer_id)
        )
        if self._cached is not None:
            self._checked = replace(self._checked, id_dtype=self._cached.id_dtype)
        self._format: RowFormat = row_format(self._checked)
        self._by_expert = self._checked.recv_layout is not RecvLayout.TOKEN
        self._has_views = False
        self._scale_rows: torch.Tensor | None = None
        self._kept_weights: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self._checked.num_tokens

    @property
    def is_exact(self) -> bool:
        """Whether the host has to know how many rows arrive."""
        return self._cached is None and self._checked.is_exact

    @property
    def is_padded(self) -> bool:
        """Whether ``x`` has the static shape of EXPERT_PADDED."""
        return self._checked.recv_layout is RecvLayout.EXPERT_PADDED

    @property
    def waits(self) -> bool:
        """Whether the host waits for the verdict on the whole operation."""
        if self._stage.host_waits is not None:
            return self._stage.host_waits
        return host_waits(self._request, self._checked, self._domain.config)

    def run(self) -> DispatchOutput | None:
        """Launch; None where the operation has to be repeated in a larger buffer."""
        with taking_turn(self._domain, self._stage):
            self._checked = bring_dispatch_inputs(self._request, self._checked, self._domain)
            return self._run()

    def _run(self) -> DispatchOutput | None:
        domain, exchange = self._domain, self._domain.exchange
        landing = exchange.generations.choose(domain.runtime.is_capturing())
        record = self._cached or self._count(landing)
        if self._by_expert:
            if (counted := self._learn_counts(exchange)) is None:
                return None
            shape = self._blocks(counted)
            outputs = expert_outputs(self._request, self._checked, self._format, shape)
            record = self._with_row_records(record, counted)
            self._send(landing, record, outputs)
            if outputs.scales is not None:
                self._turn_scales(outputs.scales, record.counts)
        else:
            self._send(landing, record, None)
            if (counted := self._learn_counts(exchange)) is None:
                return None
            outputs = self._token_outputs(exchange, landing, counted)
        domain.runtime.flush()
        return self._output(record, outputs, counted)

    def run_towards_nodes(self, landing: torch.Tensor) -> Forwarded:
        """Launch on a rail: rows land in its only generation, and the host waits for nothing.

        Args:
            landing: The bytes of that generation.
        """
        only, exchange = Landing(0, may_lease=False), self._domain.exchange
        with taking_turn(self._domain, self._stage):
            self._checked = bring_dispatch_inputs(self._request, self._checked, self._domain)
            record = self._cached or self._count(only)
            self._send(only, record, None)
            record = self._carry(record)
        # A handle may be older than the latest growth.
        given = self._request.handle
        num_rows = exchange.max_rows if given is None else given.num_rows
        outputs = token_views(
            landing, exchange.layout.areas.landing, self._checked, self._format, num_rows
        )
        handle = self._handle(record, Counted(num_rows, num_rows))
        # A plan begins with the first row of each rank here: of the node whose tokens they are.
        return Forwarded(outputs, handle, record.plan.data_ptr())

    def _carry(self, record: CudaRecord) -> CudaRecord:
        """Let a network carry the rows, where the rail is one; the handle keeps how many."""
        carrier, checked = self._domain.carrier, self._checked
        rows = carrier.learn_rows() if self._cached is None else record.rows
        hidden = self._domain.config.hidden
        carrier.carry_rows(rows, RowBytes.of_dispatch(self._request, hidden, checked.num_topk))
        return replace(record, rows=rows)

    def inputs(self) -> list[torch.Tensor]:
        """Return the tensors that kernels read."""
        checked = self._checked
        tensors = [checked.rows, checked.scales, checked.topk_idx, checked.topk_weights]
        if self._cached is not None:
            tensors += self._cached.tensors
        return [tensor for tensor in tensors if tensor is not None]

    def owned_outputs(self, output: DispatchOutput) -> list[torch.Tensor]:
        """Return the tensors of the result that are not views of symmetric memory."""
        record: CudaRecord = output.handle.records
        tensors = [*record.tensors, output.num_recv_tokens, output.handle.topk_weights]
        if self._by_expert or not self._has_views:
            tensors += [output.x, output.scales, output.topk_idx, output.topk_weights]
        return [tensor for tensor in tensors if tensor is not None]

    # ---- dispatch_count

    def _meet(self, landing: Landing, serial: int) -> kernels.MeetParams:
        checked = self._checked
        asked = self._stage.asked or asked_of_dispatch(checked)
        signature = failures.Signature(
            operation=0 if self._cached is None else 1,
            layout=LAYOUTS[asked.layout],
            wire=asked.wire,
            scales=self._format.scales,
            has_weights=int(checked.topk_weights is not None),
            apply_weights=0,
            num_topk=checked.num_topk,
            handle=serial,
        )
        landing_word = landing.generation
        if checked.id_dtype == torch.int64:
            landing_word |= LANDING_IDS_ARE_64
        meet = self._domain.meet(self._stage.after, reports=self._stage.is_last)
        meet.header = kernels.Header(
            signature.pack(),
            NO_CAPACITY if checked.capacity is None else checked.capacity,
            checked.num_tokens,
            landing_word,
            asked.alignment,
            0,
        )
        return meet

    def _count(self, landing: Landing) -> CudaRecord:
        """Launch dispatch_count; return the routing that it will have written."""
        domain, checked = self._domain, self._checked
        topk_idx = checked.topk_idx
        assert topk_idx is not None
        device, shape = domain.device, (checked.num_tokens, checked.num_topk)
        num_origins = domain.position.num_origins
        tables = torch.empty(3 if self._by_expert else 2, *shape, dtype=torch.int32, device=device)
        plan_words = kernels.plan_words(domain.topology.num_ranks, num_origins)
        record = CudaRecord(
            buffer_id=self._routing.buffer_id,
            serial=self._routing.serial,
            num_origins=num_origins,
            id_dtype=checked.id_dtype,
            topk_idx=tables[0],
            token_slot=tables[1],
            pair_slot=tables[2] if self._by_expert else None,
            plan=torch.empty(plan_words, dtype=torch.int32, device=device),
            row_slots=None,
            row_weights=None,
            counts=torch.empty(2 * domain.num_local_experts + 3, dtype=torch.int32, device=device),
        )
        params = kernels.CountParams()
        params.meet = self._meet(landing, 0)
        params.meet.host_waits = int(self.waits)
        params.table = routing_table(record)
        params.topk_idx = address_of(topk_idx)
        params.ids_are_64 = int(topk_idx.dtype == torch.int64)
        params.tokens_from = self._stage.tokens_from
        params.num_tokens, params.num_topk = shape
        params.recv_layout = LAYOUTS[checked.recv_layout]
        fill_count_outputs(domain, params, record.counts)
        num_blocks = -(-checked.num_tokens // TOKENS_PER_COUNT_BLOCK)
        grid = max(1, min(num_blocks, MAX_COUNT_BLOCKS, domain.num_sms))
        domain.launch(domain.functions.count, grid, params, meets=True, has_counts=True)
        return record

    def _learn_counts(self, exchange: Exchange) -> Counted | None:
        """Return what arrives, waiting for it where the shapes depend on it; None: must grow."""
        domain = self._domain
        handle = self._request.handle
        if self.waits:
            report = domain.wait_report(WAITS_OF_STAGES if self._stage.after else 1)
            if report.status == failures.MUST_GROW:
                return None
            if report.status != failures.GOOD:
                domain.runtime.flush()
                domain.failure.raise_trouble()
            if self.is_exact:
                return Counted(report.num_rows, report.num_tokens)
        if handle is not None:
            return Counted(handle.num_rows, exchange.max_rows)
        num_rows = self._checked.capacity
        if num_rows is None:  # EXPERT_PADDED
            num_rows = domain.num_local_experts * exchange.max_rows
        return Counted(num_rows, exchange.max_rows)

    # ---- dispatch_send

    def _blocks(self, counted: Counted) -> tuple[int, int]:
        if self.is_padded:
            num_local = self._domain.num_local_experts
            return num_local, counted.num_rows // num_local
        return 1, counted.num_rows

    def _with_row_records(self, record: CudaRecord, counted: Counted) -> CudaRecord:
        """Return the record with room for the slots of the rows that arrive."""
        checked = self._checked
        shape = (counted.num_tokens, checked.num_topk)
        slots = torch.empty(shape, dtype=torch.int32, device=self._domain.device)
        has_weights = checked.topk_weights is not None
        weights = torch.empty_like(slots, dtype=torch.float32) if has_weights else None
        return replace(record, row_slots=slots, row_weights=weights)

    def _send(self, landing: Landing, record: CudaRecord, outputs: Outputs | None) -> None:
        domain, checked, fmt = self._domain, self._checked, self._format
        params = kernels.SendParams()
        if checked.topk_weights is not None:
            self._kept_weights = torch.empty_like(checked.topk_weights)
        params.meet = self._meet(landing, record.serial if self._cached is not None else 0)
        params.table = routing_table(record)
        params.table.topk_weights = address_of(self._kept_weights)
        rows, scales = checked.rows, checked.scales
        params.source.rows = address_of(rows)
        params.source.row_stride = rows.stride(0) * rows.element_size()
        if scales is not None:
            params.source.scales = address_of(scales)
            params.source.scale_stride = scales.stride(0) * scales.element_size()
        params.topk_weights = address_of(checked.topk_weights)
        if outputs is not None:
            self._fill_target(params.target, record, outputs)
        if (rail := self._stage.after) is not None:
            made_here = record.counts if self._cached is None else None
            fill_rail_side(params.rail, domain, rail, made_here)
        params.round = domain.exchange.round.address
        params.counts = address_of(record.counts) if self._cached is None else 0
        params.num_origins = record.num_origins
        params.num_tokens, params.num_topk = checked.num_tokens, checked.num_topk
        params.opens = int(self._cached is not None)
        params.zero_padding = int(self._request.zero_padding)
        params.scale_words = fmt.scale_words
        params.scales_are_ue8m0 = int(fmt.scales == 2)
        kernel = domain.functions.send[fmt.wire, self._by_expert]
        domain.launch(kernel, domain.num_sms, params, meets=self._cached is not None)
        if rail is not None and self._cached is None:
            rail.carrier.carry_lost(domain)

    def _fill_target(
        self, target: kernels.ExpertTarget, record: CudaRecord, outputs: Outputs
    ) -> None:
        target.rows = address_of(outputs.x)
        if outputs.scales is not None:
            # Between the experts of EXPERT; rows after the used ones stay as they were allocated.
            has_gaps = self._request.zero_padding and not self.is_padded
            make = torch.zeros if has_gaps else torch.empty
            self._scale_rows = make(
                outputs.scales.shape, dtype=outputs.scales.dtype, device=outputs.scales.device
            )
            target.scales = address_of(self._scale_rows)
        target.topk_weights = address_of(outputs.topk_weights)
        target.row_slots = address_of(record.row_slots)
        target.row_weights = address_of(record.row_weights)

    def _turn_scales(self, scales: torch.Tensor, counts: torch.Tensor) -> None:
        """Launch dispatch_scales, from the rows that dispatch_send has written."""
        assert self._scale_rows is not None
        # Rows of each expert, or the end of the last one's: the last of the offsets.
        used = counts if self.is_padded else counts[2 * self._domain.num_local_experts :]
        turn_scales(self._domain, self._scale_rows, scales, used)

    # ---- results

    def _token_outputs(self, exchange: Exchange, landing: Landing, counted: Counted) -> Outputs:
        """Return views of what lands, or copies where no view may stay."""
        request, num_rows = self._request, counted.num_rows
        views = token_views(
            lease_landing(exchange, landing.generation),
            exchange.layout.areas.landing,
            self._checked,
            self._format,
            min(num_rows, exchange.max_rows),
        )
        may_view = landing.may_lease and not request.owned and request.out is None
        self._has_views = may_view and 0 < num_rows <= exchange.max_rows
        if self._has_views:
            return views
        self._domain.runtime.flush()
        return owned_copy(views, num_rows, request.out)

    def _output(self, record: CudaRecord, outputs: Outputs, counted: Counted) -> DispatchOutput:
        request, num_local = self._request, self._domain.num_local_experts
        if request.out is not None and outputs.x.data_ptr() != request.out.data_ptr():
            self._domain.runtime.flush()
            check_out_shape(request.out, tuple(outputs.x.shape), outputs.x.dtype)
        counts = record.counts if self._cached is None else record.counts.clone()
        is_expert = self._checked.recv_layout is RecvLayout.EXPERT
        return DispatchOutput(
            x=outputs.x,
            scales=outputs.scales,
            topk_idx=outputs.topk_idx,
            topk_weights=outputs.topk_weights,
            num_tokens_per_expert=counts[:num_local],
            expert_offsets=counts[num_local : 2 * num_local + 1] if is_expert else None,
            num_recv_tokens=counts[2 * num_local + 1],
            overflow=counts[2 * num_local + 2 :].view(torch.bool)[0],
            handle=self._handle(record, counted),
        )

    def _handle(self, record: CudaRecord, counted: Counted) -> Handle:
        checked = self._checked
        return Handle(
            recv_layout=checked.recv_layout,
            expert_alignment=checked.expert_alignment,
            capacity=checked.capacity,
            num_tokens=checked.num_tokens,
            num_rows=counted.num_rows,
            topk_idx=record.topk_idx,
            topk_weights=self._kept_weights,
            low_latency=False,
            records=record,
        )
