# SPDX-License-Identifier: Apache-2.0
"""The executable specification: the operations in plain torch, one process, an entry per rank.

Backends match it bit for bit. It owns what results are; how bytes travel, argument checks, views
and events are the backends'. Slots, and the letters at the end of names, are explained in
``slots``, the FP8 cast in ``fp8``.

Capacity. With a capacity, ``x`` has exactly that many rows, and what lies in a slot at or beyond it
is lost: counts, offsets and ``num_recv_tokens`` are clipped to what was delivered, and ``overflow``
is set on the rank that dropped rows and on the ranks whose tokens they were. ``combine`` gives NaN
for the whole row of a token that lost a row anywhere, and for the carried weight of a lost pair.

Padding rows hold arbitrary bytes in ``x`` and ``scales``, zeros with ``zero_padding``. Their
weights are 0 and their ids -1 always.

Sums. y's dtype is the wire dtype; every sum is FP32, starts at +0 and takes its terms in ascending
order. Rank partial: ``TOKEN``, the row itself; expert layouts, the sum over the token's local
experts of row, or with ``apply_weights`` of weight * row (rounded before it is added); rounded to
the wire dtype. Node partial: the sum over the node's ranks; rounded to the wire dtype unless the
node is the token's own. Result: the sum over the nodes, plus bias, rounded to the wire dtype. Ranks
without an expert of the token take no part, so a token without a destination gives zeros plus bias.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from deepcomm.errors import InvalidArgument
from deepcomm.fp8 import dequantize_fp8, quantize_fp8
from deepcomm.slots import Placement, ReferenceConfig, Routing, place_rows
from deepcomm.types import CombineOutput, DispatchOutput, Handle, RecvLayout, ScaledTensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet

__all__ = [
    "ReferenceConfig",
    "combine",
    "dequantize_fp8",
    "dispatch",
    "low_latency_combine",
    "low_latency_dispatch",
    "quantize_fp8",
]

SCALE_ROW_ALIGN = 4
POISON_BYTE = 0xEE


def dispatch(  # noqa: PLR0913 - mirrors Buffer.dispatch
    xs: Sequence[torch.Tensor | ScaledTensor],
    topk_idxs: Sequence[torch.Tensor] | None = None,
    topk_weights: Sequence[torch.Tensor] | None = None,
    *,
    config: ReferenceConfig,
    handles: Sequence[Handle] | None = None,
    recv_layout: RecvLayout = RecvLayout.TOKEN,
    expert_alignment: int = 1,
    quantize: str | None = None,
    scale_format: str = "fp32",
    capacities: Sequence[int | None] | None = None,
    zero_padding: bool = False,
) -> list[DispatchOutput]:
    """``Buffer.dispatch`` of all ranks; shapes and meanings are those of its arguments.

    With ``handles`` the routing, layout, alignment and capacities are theirs, and so is the dtype
    of the ids; weights are those given now, in the outputs as in the new handles.
    """
    if handles is not None:
        routing = _routing_of(handles)
    else:
        routing = Routing(
            config=config,
            recv_layout=recv_layout,
            expert_alignment=expert_alignment,
            capacities=tuple(capacities or [None] * config.num_ranks),
            low_latency=False,
            source_g=_source_ranks(xs),
            topk_idx_gk=torch.cat(list(topk_idxs or ())),
        )
        routing = place_rows(routing)
    routing = replace(routing, topk_weights_gk=_cat(topk_weights))
    rows_g = _concatenate_rows(xs, quantize, scale_format)
    return [_deliver(routing, rows_g, rank, zero_padding) for rank in range(config.num_ranks)]


def low_latency_dispatch(
    xs: Sequence[torch.Tensor | ScaledTensor],
    topk_idxs: Sequence[torch.Tensor],
    topk_weights: Sequence[torch.Tensor] | None = None,
    *,
    config: ReferenceConfig,
    recv_layout: RecvLayout = RecvLayout.EXPERT_PADDED,
    quantize: str | None = None,
    scale_format: str = "fp32",
    zero_padding: bool = False,
    masked: AbstractSet[int] = frozenset(),
) -> list[DispatchOutput | None]:
    """``Buffer.low_latency_dispatch`` of all ranks, the hook called; None for ``masked`` ranks.

    ``TOKEN`` has R * max_tokens_per_rank rows, of which the first ``num_recv_tokens`` hold tokens.
    A token does not reach a rank that is not connected to its own: as if it had not been sent.
    """
    routing = Routing(
        config=config,
        recv_layout=recv_layout,
        expert_alignment=1,
        capacities=(None,) * config.num_ranks,
        low_latency=True,
        source_g=_source_ranks(xs),
        topk_idx_gk=torch.cat(list(topk_idxs)),
        topk_weights_gk=_cat(topk_weights),
    )
    routing, rows_g = place_rows(routing, masked), _concatenate_rows(xs, quantize, scale_format)
    outputs = [_deliver(routing, rows_g, rank, zero_padding) for rank in range(config.num_ranks)]
    return [None if rank in masked else output for rank, output in enumerate(outputs)]


def combine(
    ys: Sequence[torch.Tensor],
    handles: Sequence[Handle],
    *,
    topk_weights: Sequence[torch.Tensor] | None = None,
    apply_weights: bool = False,
    biases: Sequence[torch.Tensor | None] | None = None,
) -> list[CombineOutput]:
    """``Buffer.combine`` of all ranks; shapes and meanings are those of its arguments.

    ``topk_weights`` is carried back: result [t, k] is what the rank that owns expert
    topk_idx[t, k] gave in that pair's place, 0 where the id is -1, NaN where the pair was lost.

    Raises:
        InvalidArgument: ``apply_weights`` with ``TOKEN``, or without weights in the handles.
    """
    routing = _routing_of(handles)
    if apply_weights and routing.recv_layout is RecvLayout.TOKEN:
        raise InvalidArgument("apply_weights: expected an expert layout, got TOKEN")
    weights_gk = _recorded_weights(routing) if apply_weights else None
    return _combine(routing, ys, weights_gk, topk_weights, biases, frozenset())


def low_latency_combine(
    ys: Sequence[torch.Tensor | None],
    handles: Sequence[Handle | None],
    *,
    topk_weights: Sequence[torch.Tensor | None] | None = None,
    source_weights: Sequence[torch.Tensor] | None = None,
    apply_weights: bool = True,
    biases: Sequence[torch.Tensor | None] | None = None,
    masked: AbstractSet[int] = frozenset(),
) -> list[CombineOutput | None]:
    """``Buffer.low_latency_combine`` of all ranks, the hook called; None for ``masked`` ranks.

    ``topk_weights`` is carried back as in ``combine``; ``source_weights``, [T, K] on each token's
    own rank, are applied instead of those recorded at dispatch. ``TOKEN`` rows are summed plainly
    in any case. What a rank holds of a token counts as absent where the two ranks are not
    connected, at dispatch (as recorded) or now (``masked``).

    Raises:
        InvalidArgument: ``apply_weights`` without weights, in the handles or now.
    """
    routing = _routing_of(handles)
    weights_gk = _cat(source_weights)
    if routing.recv_layout is RecvLayout.TOKEN or not apply_weights:
        weights_gk = None
    elif weights_gk is None:
        weights_gk = _recorded_weights(routing)
    outputs = _combine(routing, ys, weights_gk, topk_weights, biases, masked)
    return [None if rank in masked else output for rank, output in enumerate(outputs)]


# ---- What one rank receives -----------------------------------------------------------------


def _deliver(
    routing: Routing, rows_g: torch.Tensor | ScaledTensor, rank: int, zero_padding: bool
) -> DispatchOutput:
    place = routing.placements_r[rank]
    fill = 0 if zero_padding else POISON_BYTE
    scales = None
    if isinstance(rows_g, ScaledTensor):
        scales = _received_scales(routing, _rows_at_slots(rows_g.scales, place, fill))
        rows_g = rows_g.data
    num_local = routing.config.num_local_experts
    counts_l = torch.bincount(place.expert_p[place.delivered_p], minlength=num_local)
    is_padded = routing.recv_layout is RecvLayout.EXPERT_PADDED
    num_recv = int(counts_l.sum()) if is_padded else min(place.num_slots, place.num_rows)
    has_lost = ~place.delivered_p.all() | routing.lost_g[routing.source_g == rank].any()
    return DispatchOutput(
        x=_in_blocks(routing, _rows_at_slots(rows_g, place, fill)),
        scales=scales,
        topk_idx=_received_ids(routing, place),
        topk_weights=_received_weights(routing, place),
        num_tokens_per_expert=counts_l.int(),
        expert_offsets=place.clipped_offsets_l,
        num_recv_tokens=torch.tensor(num_recv, dtype=torch.int32),
        overflow=has_lost,
        handle=_make_handle(routing, rank),
    )


def _rows_at_slots(rows_g: torch.Tensor, place: Placement, fill: int) -> torch.Tensor:
    """Copy each delivered row to its slot; every byte of the other rows is ``fill``."""
    bytes_gb = rows_g.contiguous().view(torch.uint8)
    bytes_nb = bytes_gb.new_full((place.num_rows, bytes_gb.shape[1]), fill)
    delivered = place.select(place.delivered_p)
    bytes_nb[delivered.slot_p] = bytes_gb[delivered.token_p]
    return bytes_nb.view(rows_g.dtype)


def _in_blocks(routing: Routing, rows_n: torch.Tensor) -> torch.Tensor:
    """View [L * M, ...] as [L, M, ...] where the layout is ``EXPERT_PADDED``."""
    if routing.recv_layout is not RecvLayout.EXPERT_PADDED:
        return rows_n
    config = routing.config
    return rows_n.view(config.num_local_experts, config.max_recv_tokens, *rows_n.shape[1:])


def _received_scales(routing: Routing, scales_ns: torch.Tensor) -> torch.Tensor:
    """Lay the scales out as grouped GEMMs take them, rows next to each other, unless ``TOKEN``."""
    if routing.recv_layout is RecvLayout.TOKEN:
        return scales_ns
    scales = _in_blocks(routing, scales_ns)
    *blocks, num_rows, width = scales.shape
    storage = scales.new_zeros(*blocks, width, num_rows + -num_rows % SCALE_ROW_ALIGN)
    return storage[..., :num_rows].transpose(-1, -2).copy_(scales)


def _received_ids(routing: Routing, place: Placement) -> torch.Tensor | None:
    if routing.recv_layout is not RecvLayout.TOKEN:
        return None
    ids_nk = routing.topk_idx_gk.new_full((place.num_rows, routing.topk_idx_gk.shape[1]), -1)
    delivered = place.select(place.delivered_p)
    ids_nk[delivered.slot_p, delivered.k_p] = delivered.expert_p.to(ids_nk.dtype)
    return ids_nk


def _received_weights(routing: Routing, place: Placement) -> torch.Tensor | None:
    """Return the weight of each pair in its slot, [N, K] for ``TOKEN``, and 0 elsewhere."""
    weights_gk = routing.topk_weights_gk
    if weights_gk is None:
        return None
    delivered = place.select(place.delivered_p)
    weight_p = weights_gk[delivered.token_p, delivered.k_p]
    if routing.recv_layout is RecvLayout.TOKEN:
        weights_nk = weights_gk.new_zeros(place.num_rows, weights_gk.shape[1])
        weights_nk[delivered.slot_p, delivered.k_p] = weight_p
        return weights_nk
    weights_n = weights_gk.new_zeros(place.num_rows)
    weights_n[delivered.slot_p] = weight_p
    return _in_blocks(routing, weights_n)


def _make_handle(routing: Routing, rank: int) -> Handle:
    mine_g = routing.source_g == rank
    weights_gk = routing.topk_weights_gk
    return Handle(
        recv_layout=routing.recv_layout,
        expert_alignment=routing.expert_alignment,
        capacity=routing.capacities[rank],
        num_tokens=int(mine_g.sum()),
        num_rows=routing.placements_r[rank].num_rows,
        topk_idx=routing.topk_idx_gk[mine_g].int(),
        topk_weights=None if weights_gk is None else weights_gk[mine_g],
        low_latency=routing.low_latency,
        records=routing,
    )


# ---- What comes back ------------------------------------------------------------------------


def _combine(
    routing: Routing,
    ys: Sequence[torch.Tensor | None],
    weights_gk: torch.Tensor | None,
    carried_weights: Sequence[torch.Tensor | None] | None,
    biases: Sequence[torch.Tensor | None] | None,
    masked: AbstractSet[int],
) -> list[CombineOutput]:
    sum_gh = _sum_over_nodes(routing, ys, weights_gk, masked)
    carried_gk = _carry_back(routing, carried_weights, masked)
    dtype = next(y.dtype for y in ys if y is not None)
    outputs = []
    for rank, bias_th in enumerate(biases or [None] * len(ys)):
        mine_g = routing.source_g == rank
        sum_th = sum_gh[mine_g] if bias_th is None else sum_gh[mine_g] + bias_th.float()
        weights_tk = None if carried_gk is None else carried_gk[mine_g]
        outputs.append(CombineOutput(x=sum_th.to(dtype), topk_weights=weights_tk))
    return outputs


def _sum_over_nodes(
    routing: Routing,
    ys: Sequence[torch.Tensor | None],
    weights_gk: torch.Tensor | None,
    masked: AbstractSet[int],
) -> torch.Tensor:
    """Return the FP32 sums [G, H] before bias; NaN for tokens that lost a row."""
    dtype, hidden = next((y.dtype, y.shape[-1]) for y in ys if y is not None)
    ranks_per_node = routing.config.ranks_per_node
    node_g = routing.source_g // ranks_per_node
    sum_gh = torch.zeros(len(node_g), hidden)
    for node in range(routing.config.num_ranks // ranks_per_node):
        node_gh = torch.zeros_like(sum_gh)
        takes_part_g = torch.zeros_like(node_g, dtype=torch.bool)
        for rank in range(node * ranks_per_node, (node + 1) * ranks_per_node):
            y = ys[rank]
            if y is None:
                continue
            pairs = routing.present_pairs(rank, masked)
            held_g = torch.zeros_like(takes_part_g).index_fill(0, pairs.token_p, value=True)
            node_gh[held_g] += _sum_over_experts(routing, pairs, y, weights_gk)[held_g]
            takes_part_g |= held_g
        travels_g = node_g != node
        node_gh[travels_g] = node_gh[travels_g].to(dtype).float()
        sum_gh[takes_part_g] += node_gh[takes_part_g]
    sum_gh[routing.lost_g] = torch.nan
    return sum_gh


def _sum_over_experts(
    routing: Routing, pairs: Placement, y: torch.Tensor, weights_gk: torch.Tensor | None
) -> torch.Tensor:
    """Return the rank partials [G, H], rounded to the wire dtype, as FP32."""
    rows_nh = y.reshape(-1, y.shape[-1])
    rank_gh = torch.zeros(len(routing.source_g), y.shape[-1])
    if routing.recv_layout is RecvLayout.TOKEN:
        rank_gh[pairs.token_p] = rows_nh[pairs.slot_p].float()
        return rank_gh
    for expert in range(routing.config.num_local_experts):
        its = pairs.select(pairs.expert_p == expert)
        term_ph = rows_nh[its.slot_p].float()
        if weights_gk is not None:
            term_ph = weights_gk[its.token_p, its.k_p, None] * term_ph
        rank_gh[its.token_p] = rank_gh[its.token_p] + term_ph
    return rank_gh.to(y.dtype).float()


def _carry_back(
    routing: Routing,
    weights: Sequence[torch.Tensor | None] | None,
    masked: AbstractSet[int],
) -> torch.Tensor | None:
    """Return float32 [G, K]: the value that each pair has on the rank that received it."""
    if weights is None:
        return None
    carried_gk = torch.zeros(routing.topk_idx_gk.shape)
    for rank, weight in enumerate(weights):
        place = routing.placements_r[rank]
        lost = place.select(~place.delivered_p)
        carried_gk[lost.token_p, lost.k_p] = torch.nan
        if weight is None:
            continue
        pairs = routing.present_pairs(rank, masked)
        if routing.recv_layout is RecvLayout.TOKEN:
            value_p = weight[pairs.slot_p, pairs.k_p]
        else:
            value_p = weight.reshape(-1)[pairs.slot_p]
        carried_gk[pairs.token_p, pairs.k_p] = value_p
    return carried_gk


# ---- From lists of per-rank tensors to tensors of all ranks ---------------------------------


def _routing_of(handles: Sequence[Handle | None]) -> Routing:
    return cast("Routing", next(handle.records for handle in handles if handle is not None))


def _recorded_weights(routing: Routing) -> torch.Tensor:
    if routing.topk_weights_gk is None:
        raise InvalidArgument("apply_weights: expected a dispatch with topk_weights, got none")
    return routing.topk_weights_gk


def _source_ranks(xs: Sequence[torch.Tensor | ScaledTensor]) -> torch.Tensor:
    """Return int64 [G]: the rank that holds each token."""
    num_tokens_r = [len(x.data if isinstance(x, ScaledTensor) else x) for x in xs]
    return torch.arange(len(xs)).repeat_interleave(torch.tensor(num_tokens_r))


def _concatenate_rows(
    xs: Sequence[torch.Tensor | ScaledTensor], quantize: str | None, scale_format: str
) -> torch.Tensor | ScaledTensor:
    """Return the rows of all ranks as they travel."""
    scaled = [x for x in xs if isinstance(x, ScaledTensor)]
    if scaled:
        data = torch.cat([x.data for x in scaled])
        return ScaledTensor(data, torch.cat([x.scales for x in scaled]))
    rows_gh = torch.cat([x for x in xs if isinstance(x, torch.Tensor)])
    return rows_gh if quantize is None else quantize_fp8(rows_gh, scale_format)


def _cat(tensors: Sequence[torch.Tensor] | None) -> torch.Tensor | None:
    return None if tensors is None else torch.cat(list(tensors))
