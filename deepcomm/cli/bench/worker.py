# SPDX-License-Identifier: Apache-2.0
"""The program of one rank: check, measure and, on rank 0, report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from deepcomm.buffer import Buffer
from deepcomm.cli.bench.figures import Contenders, Result, Traffic, make_figures
from deepcomm.cli.bench.measure import Limits, measure
from deepcomm.cli.bench.operations import list_operations
from deepcomm.cli.bench.opponents import list_baseline, list_copies
from deepcomm.cli.bench.plot import write_plot
from deepcomm.cli.bench.report import print_intro, print_results, write_json
from deepcomm.cli.bench.verify import Mismatch
from deepcomm.cli.bench.workload import Workload
from deepcomm.cli.console import note
from deepcomm.types import BufferStats

if TYPE_CHECKING:
    from deepcomm.cli.bench.args import BenchConfig
    from deepcomm.cli.bench.operations import Operation

__all__ = ["WrongResultError", "run_rank"]


class WrongResultError(Exception):
    """An operation gave a wrong result on some rank; raised on all of them."""


def run_rank(config: BenchConfig, local_rank: int) -> None:
    """Run the whole benchmark as one rank of the default process group, which moves CPU tensors.

    Raises:
        WrongResultError: A check failed on some rank; nothing was measured.
        deepcomm.errors.Error: What deepcomm raised.
    """
    torch.set_num_threads(config.threads)
    device = torch.device("cpu")
    if config.backend == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    leader = dist.get_rank() == 0
    if leader:
        print_intro(config)
    results = [_run_case(config, num_tokens, device) for num_tokens in config.tokens]
    if not leader:
        return
    print_results(config, results)
    if config.json is not None:
        write_json(config.json, config, results)
        note(f"wrote {config.json}")
    if config.plot is not None:
        write_plot(config.plot, config, results)
        note(f"wrote {config.plot}")


def _run_case(config: BenchConfig, num_tokens: int, device: torch.device) -> Result:
    leader = dist.get_rank() == 0
    if leader:
        note(f"checking {num_tokens} tokens a rank")
    buffer = Buffer(
        dist.group.WORLD,
        num_experts=config.experts,
        num_topk=config.topk,
        hidden=config.hidden,
        max_tokens_per_rank=num_tokens,
        device=device,
        ranks_per_node=config.ranks_per_node,
        num_threads=config.threads,
        rail=config.rail,
    )
    workload = Workload(config, dist.get_rank(), num_tokens, device)
    contenders = _prepare(workload, buffer)
    counters = _check(contenders, buffer)
    everything = [*contenders.ours, *contenders.baseline, *contenders.copies]
    limits = Limits(config.warmup, config.iters, config.max_seconds)
    title = f"measuring {num_tokens} tokens a rank" if leader else None
    timings = measure(everything, limits, device, title)
    traffic = Traffic.of(workload)
    figures = make_figures(contenders, timings, traffic, config.hidden)
    explanation = buffer.explain()
    # Not closed on failure: closing is collective, and a rank that failed must not wait for others.
    buffer.close()
    return Result(num_tokens, traffic, figures, timings, counters, explanation)


def _prepare(workload: Workload, buffer: Buffer) -> Contenders:
    """List all operations; what deepcomm gets wrong already here is reported like other checks."""
    ours: list[Operation] = []
    failure = None
    try:
        ours = list_operations(workload, buffer)
    except Mismatch as error:
        failure = f"first dispatch: {error}"
    _agree(failure)
    baseline = []
    if workload.config.baseline != "none":
        gloo = workload.config.baseline.startswith("gloo")
        group = dist.group.WORLD if gloo else dist.new_group(backend="nccl")
        assert group is not None
        baseline = list_baseline(workload, group)
    return Contenders(ours, baseline, list_copies(workload))


def _check(contenders: Contenders, buffer: Buffer) -> BufferStats:
    """Run and check every operation once on all ranks; return what the first one counted."""
    before, counted = buffer.stats(), None
    for operation in [*contenders.ours, *contenders.baseline, *contenders.copies]:
        failure = None
        result = operation.run()
        counted = counted or _difference(before, buffer.stats())
        try:
            operation.check(result)
        except Mismatch as error:
            failure = f"{operation.name}: {error}"
        del result
        _agree(failure)
    assert counted is not None
    return counted


def _agree(failure: str | None) -> None:
    """Raise on every rank what any rank found wrong."""
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    wrong = [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text]
    if wrong:
        raise WrongResultError("wrong result\n" + "\n".join(wrong))


def _difference(before: BufferStats, after: BufferStats) -> BufferStats:
    names = [name for name in BufferStats.__slots__ if name != "wait_us"]
    change = {name: getattr(after, name) - getattr(before, name) for name in names}
    waited = zip(after.wait_us, before.wait_us, strict=True)
    return BufferStats(**change, wait_us=tuple(late - early for late, early in waited))
