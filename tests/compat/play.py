# SPDX-License-Identifier: Apache-2.0
"""Ranks that call the facades as clients do, beside the reference.

A test's function runs on every rank with a ``Rank``: its inputs, and what the reference delivers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from collective.case import Case, Inputs, make_inputs, make_outputs

from deepcomm import RecvLayout, ScaledTensor, reference
from deepcomm.compat import ElasticBuffer
from deepcomm.group import as_group
from deepcomm.testing.oracle import assert_dispatch_equal

if TYPE_CHECKING:
    from collections.abc import Callable

    from compat.places import Place

    from deepcomm.compat import Buffer, EPHandle
    from deepcomm.types import CombineOutput, DispatchOutput

TOKEN, EXPERT, PADDED = RecvLayout


@dataclass(eq=False)
class Rank:
    """One rank of a case.

    Attributes:
        group: As clients pass it on.
        control: The same, with one interface for all kinds of groups.
        inputs: Of all ranks.
        expected: What the reference's dispatch delivers, on all ranks.
    """

    case: Case
    group: Any
    inputs: Inputs
    expected: list[Any]
    low_latency: bool

    def __post_init__(self) -> None:
        self.control = as_group(self.group)

    @property
    def rank(self) -> int:
        return self.control.rank

    @property
    def is_last(self) -> bool:
        return self.rank == self.case.num_ranks - 1

    def own(self, tensors: list[Any]) -> Any:
        """Return this rank's entry, on the case's device; FP8 rows as a tuple."""
        entry = tensors[self.rank]
        if isinstance(entry, ScaledTensor):
            return entry.data.to(self.case.device), entry.scales.to(self.case.device)
        return entry.to(self.case.device)

    @property
    def x(self) -> Any:
        return self.own(self.inputs.xs)

    @property
    def ids(self) -> torch.Tensor:
        return self.own(self.inputs.ids)

    @property
    def weights(self) -> torch.Tensor:
        return self.own(self.inputs.weights)

    def outputs(self, round_idx: int = 0) -> list[torch.Tensor]:
        """Return expert outputs of all ranks, NaN where no token lies."""
        return [
            make_outputs(self.case, expected, rank, round_idx)
            for rank, expected in enumerate(self.expected)
        ]

    def combined(self, ys: list[torch.Tensor], **options: Any) -> CombineOutput:
        """Return what the reference's combine brings back to this rank."""
        handles = [expected.handle for expected in self.expected]
        if self.low_latency:
            return reference.low_latency_combine(ys, handles, **options)[self.rank]
        return reference.combine(ys, handles, **options)[self.rank]

    def assert_received(self, rows: Any, **fields: Any) -> None:
        """Compare rows, and other fields of a dispatch, with the reference, bit for bit."""
        data, scales = rows if isinstance(rows, tuple) else (rows, None)
        expected = self.expected[self.rank]
        actual = replace(expected, x=data, scales=scales, **fields)
        assert_dispatch_equal(actual, expected, zero_padding=False, rank=self.rank)


def play(
    place: Place,
    case: Case,
    function: Callable[[Rank], Any],
    *,
    low_latency: bool = False,
    **options: Any,
) -> list[Any]:
    """Run ``function`` on every rank of a case; ``options`` are those of the reference."""
    inputs = make_inputs(case, 0)
    dispatch = reference.low_latency_dispatch if low_latency else reference.dispatch
    layout = {} if low_latency else {"recv_layout": case.layout}
    shared = {"config": case.config, **layout, **case.quantize, **options}
    expected = dispatch(inputs.xs, inputs.ids, inputs.weights, **shared)
    return place.run(lambda group: function(Rank(case, group, inputs, expected, low_latency)))


# ---- Calls as clients make them -----------------------------------------------------------------


def v1_dispatch(buffer: Buffer, rank: Rank, **options: Any) -> tuple[Any, ...]:
    """Count, then dispatch, as every V1 client does."""
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
        rank.ids, rank.case.num_experts
    )
    return buffer.dispatch(
        rank.x,
        topk_idx=rank.ids,
        topk_weights=rank.weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        previous_event=event if options.get("async_finish") else None,
        **options,
    )


def open_elastic(rank: Rank, **options: Any) -> ElasticBuffer:
    """Construct a buffer of the case's limits."""
    case = rank.case
    shape = {
        "num_max_tokens_per_rank": case.num_tokens,
        "hidden": case.hidden,
        "num_topk": case.num_topk,
    }
    return ElasticBuffer(rank.group, **{**shape, **options})


def v2_dispatch(buffer: ElasticBuffer, rank: Rank, **options: Any) -> tuple[Any, ...]:
    """Dispatch the case's tokens."""
    return buffer.dispatch(
        rank.x,
        topk_idx=rank.ids,
        topk_weights=rank.weights,
        num_experts=rank.case.num_experts,
        **options,
    )


def row_counts(expected: DispatchOutput, alignment: int) -> list[int]:
    """Return rows per local expert, rounded up."""
    counts = expected.num_tokens_per_expert.tolist()
    return [-(-count // alignment) * alignment for count in counts]


def ends_of_groups(handle: EPHandle | None, expected: DispatchOutput, alignment: int) -> list[int]:
    """Return where each expanded group's rows end; checks the handle's count of rows as well."""
    counts, ends, start = expected.num_tokens_per_expert.tolist(), [], 0
    for count in counts:
        ends.append(start + count)
        start += -(-count // alignment) * alignment
    assert handle is None or handle.num_expanded_tokens == start
    return ends
