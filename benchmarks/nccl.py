# SPDX-License-Identifier: Apache-2.0
"""The same exchange over NCCL, as a torch user writes it: what the operations are compared with.

all_to_all_single of the same rows with the permutation around it, the routing known before; and
all-gather of all rows with a reduce-scatter of partial sums, which needs no routing at all. Rows
and scales travel, ids and weights do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from exchange import Timed, Workload

from deepcomm.cli.bench.baseline import TorchExchange


def timed_nccl(group: dist.ProcessGroup, load: Workload, routing: str) -> list[Timed]:
    """Return both ways of the exchange."""
    return [*timed_all_to_all(group, load, routing), *timed_gather(group, load, routing)]


def timed_all_to_all(group: dist.ProcessGroup, load: Workload, routing: str) -> list[Timed]:
    """Return the exchange of the rows that are needed."""
    setting, num_tokens = load.setting, load.setting.num_tokens
    user = TorchExchange(group, setting.num_experts, keep_tensors=True)
    plan = user.route(load.ids)
    y = torch.randn(sum(plan.recv_rows), setting.hidden, device="cuda").bfloat16()
    data, scales = load.scaled.data.view(torch.uint8), load.scaled.scales

    def exchange_rows(x: torch.Tensor) -> torch.Tensor:
        send = x.index_select(0, plan.token)
        recv = x.new_empty(sum(plan.recv_rows), x.shape[1])
        dist.all_to_all_single(recv, send, plan.recv_rows, plan.send_rows, group=group)
        return recv

    def exchange_scaled() -> None:
        exchange_rows(data)
        exchange_rows(scales)

    given, bf16 = load.row_bytes("given"), load.row_bytes("bf16")
    calls: list[tuple[str, Callable[[], Any], int, int]] = [
        ("NCCL dispatch, FP8 given", exchange_scaled, load.sent_rows, given),
        ("NCCL dispatch, BF16", lambda: exchange_rows(load.x), load.sent_rows, bf16),
        ("NCCL combine", lambda: user.combine(y, plan, num_tokens), load.back_rows, bf16),
    ]
    return [
        Timed(name, None, routing, call, 1, rows * row, load.recv_rows * row)
        for name, call, rows, row in calls
    ]


def timed_gather(group: dist.ProcessGroup, load: Workload, routing: str) -> list[Timed]:
    """Return the exchange of all rows."""
    num_ranks, num_tokens = dist.get_world_size(group), load.setting.num_tokens
    data, scales = load.scaled.data.view(torch.uint8), load.scaled.scales
    everything = {x: x.new_empty(num_ranks * len(x), x.shape[1]) for x in (load.x, data, scales)}
    sums = torch.empty_like(load.x)

    def gather(*some: torch.Tensor) -> None:
        for x in some:
            dist.all_gather_into_tensor(everything[x], x, group=group)

    def scatter() -> None:
        dist.reduce_scatter_tensor(sums, everything[load.x], group=group)

    rows = (num_ranks - 1) * num_tokens
    given, bf16 = load.row_bytes("given"), load.row_bytes("bf16")
    calls: list[tuple[str, Callable[[], Any], int]] = [
        ("NCCL all-gather, FP8 given", lambda: gather(data, scales), given),
        ("NCCL all-gather, BF16", lambda: gather(load.x), bf16),
        ("NCCL reduce-scatter", scatter, bf16),
    ]
    return [
        Timed(name, None, routing, call, 1, rows * row, num_ranks * num_tokens * row)
        for name, call, row in calls
    ]
