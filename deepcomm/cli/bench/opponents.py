# SPDX-License-Identifier: Apache-2.0
"""What our operations are compared with: the baseline's, and plain copies of as many bytes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from deepcomm.cli.bench.baseline import TorchExchange
from deepcomm.cli.bench.operations import Kind, Operation, row_bytes
from deepcomm.cli.bench.verify import check_combine, check_rows, expert_output_
from deepcomm.types import RecvLayout, ScaledTensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    import torch.distributed as dist

    from deepcomm.cli.bench.workload import Workload

__all__ = ["list_baseline", "list_copies"]

MIN_COPIED_BYTES = 128 << 20
"""Tens of milliseconds of copying."""

MAX_REPEATS = 1000


def list_baseline(workload: Workload, group: dist.ProcessGroup) -> list[Operation]:
    """Return the baseline's operations, one of each kind that is measured; collective."""
    config = workload.config
    exchange = TorchExchange(group, config.experts, keep_tensors=config.baseline == "gloo-kept")
    x, routed = workload.x, workload.routed
    topk_idx = routed.topk_idx
    plan = exchange.route(topk_idx)
    y = expert_output_(exchange.dispatch(x, routed, plan).clone(), workload.rank)
    calls: dict[Kind, Callable[[], Any]] = {
        Kind.DISPATCH: lambda: exchange.dispatch(x, routed, exchange.route(topk_idx)),
        Kind.DISPATCH_FP8: lambda: exchange.dispatch_fp8(x, routed, exchange.route(topk_idx)),
        Kind.CACHED_DISPATCH: lambda: exchange.dispatch(x, routed, plan),
        Kind.COMBINE: lambda: exchange.combine(y, plan, workload.num_tokens),
    }
    if not config.fp8:
        del calls[Kind.DISPATCH_FP8]
    if config.low_latency:
        del calls[Kind.CACHED_DISPATCH]
    operations = []
    for kind, call in calls.items():
        steps = (("call", lambda _, call=call: call()),)
        name = f"{config.baseline} {kind.value}"
        operations.append(Operation(name, kind, steps, _checker(workload, kind)))
    return operations


def list_copies(workload: Workload) -> list[Operation]:
    """Return plain copies, by one thread of each rank at once, of the bytes each kind receives.

    Source and destination are private, warm and distinct. Combine receives as many rows as this
    rank sent. Ranks that share a core take turns in slices of milliseconds: a call repeats the copy
    until it spans several, or each rank would find the machine idle in its own slice.
    """
    config = workload.config
    arriving, returning = workload.rows_between.sum(0), workload.rows_between.sum(1)
    rows = {Kind.DISPATCH: arriving, Kind.COMBINE: returning}
    if config.fp8:
        rows[Kind.DISPATCH_FP8] = arriving
    num_bytes = {kind: count * row_bytes(kind, config.hidden) for kind, count in rows.items()}
    largest = max(int(count[workload.rank]) for count in num_bytes.values())
    source = torch.ones(largest, dtype=torch.uint8, device=workload.device)
    target = torch.zeros_like(source)
    copies = []
    for kind, count in num_bytes.items():
        own = int(count[workload.rank])
        # The same on all ranks: whoever copies most decides.
        repeats = min(-(-MIN_COPIED_BYTES // max(int(count.max()), 1)), MAX_REPEATS)
        copy = partial(_copy, target[:own], source[:own], repeats)
        steps = (("call", lambda _, copy=copy: copy()),)
        copies.append(Operation(f"memcpy for {kind.value}", kind, steps, _accept, repeats))
    return copies


def _copy(target: torch.Tensor, source: torch.Tensor, repeats: int) -> None:
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    for _ in range(repeats):
        target.copy_(source)
    if threads > 1:
        torch.set_num_threads(threads)


def _accept(result: Any) -> None:
    """Accept anything: a plain copy needs no check."""


def _checker(workload: Workload, kind: Kind) -> Callable[[Any], None]:
    def check(result: Any) -> None:
        if kind is Kind.COMBINE:
            # index_add_ rounds after every rank's term.
            roundings = workload.config.ranks + 1
            check_combine(workload, result, weighted=False, num_roundings=roundings)
            return
        expected = workload.arrivals_in(RecvLayout.TOKEN)
        if isinstance(result, ScaledTensor):
            check_rows(workload, expected, result.data, result.scales)
        else:
            check_rows(workload, expected, result, None)

    return check
