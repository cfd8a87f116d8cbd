# SPDX-License-Identifier: Apache-2.0
"""What the ranks of the process tests do; a module of its own as ``spawn_workers`` explains."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from collective.case import Case
from collective.scenario import exchange, low_latency_exchange
from collective.session import Oracle, Session

from deepcomm import RecvLayout
from deepcomm.testing.oracle import assert_dispatch_equal

if TYPE_CHECKING:
    from collections.abc import Sequence


def exchange_all(group: Any, cases: Sequence[Case]) -> list[str]:
    """Run all scenarios of all cases; return what each buffer explains."""
    explained = []
    for case in cases:
        exchange(group, case)
        if case.layout is not RecvLayout.EXPERT:
            low_latency_exchange(group, case)
        with case.open(group) as buffer:
            explained.append(buffer.explain())
    return explained


def exchange_with_own_threads(group: Any, cases: Sequence[Case]) -> list[str]:
    """The same, each rank with another number of threads."""
    threads = 1 + dist.get_rank(group)
    return exchange_all(group, [replace(case, num_threads=threads) for case in cases])


def call_many_times(group: Any, case: Case, num_calls: int, num_generations: int) -> int:
    """Repeat a cycle of operations of both modes; return the number of operations.

    With two generations one is leased throughout, and every operation gets the other.
    """
    with Session(group, case, num_generations=num_generations) as session:
        kept = session.dispatch(20) if num_generations == 2 else None
        start, count = session.step, 0
        while count < num_calls:
            session.rewind(start)
            cycle(session)
            stats = session.buffer.stats()
            count = stats.num_dispatches + stats.num_combines
        if kept is not None:
            assert_dispatch_equal(kept.actual, kept.expected[session.rank], rank=session.rank)
        return count


def cycle(session: Session) -> None:
    """Run operations whose landing areas held other rows before."""
    in_place = session.case.wire == "bf16"
    first = session.dispatch(0)
    second = session.dispatch(1)
    flying = [session.low_latency_dispatch(i, return_hook=True) for i in (2, 3, 4)]
    session.combine(first, carried=True)
    session.combine(session.dispatch(5, cached=second), in_place=in_place)
    flying[0].finish()
    back = session.low_latency_combine(flying[0], return_hook=True)
    for operation in (*flying[1:], back):
        operation.finish()
    session.combine(second, extras=True)
    session.combine(first)
    session.combine(second, carried=True)
    session.combine(session.dispatch(6), in_place=in_place)


def exchange_in_subgroups(group: Any, ranks_of_groups: list[list[int]], case: Case) -> int:
    """Use buffers of WORLD and of every subgroup of this rank at once; return how many."""
    subgroups = [
        (ranks, subgroup)
        for ranks in ranks_of_groups
        for subgroup in [dist.new_group(ranks)]
        if dist.get_rank() in ranks
    ]
    world = replace(case, num_ranks=dist.get_world_size(), num_topk=1)
    with Session(group, world) as outer:
        first = outer.dispatch(0)
        for ranks, subgroup in subgroups:
            inner = replace(case, num_ranks=len(ranks))
            with Session(subgroup, inner) as session:
                assert session.rank == ranks.index(dist.get_rank())
                session.combine(session.dispatch(1), carried=True)
                outer_stats = outer.buffer.stats()
                low = session.low_latency_dispatch(2)
                session.low_latency_combine(low, apply_weights=False)
                assert outer.buffer.stats() == outer_stats
            exchange(subgroup, inner)
        outer.combine(first, carried=True)
    return len(subgroups)


class Communicator:
    """The part of an mpi4py communicator that is used, over a process group."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def Get_rank(self) -> int:  # mpi4py's name
        return dist.get_rank(self._group)

    def Get_size(self) -> int:
        return dist.get_world_size(self._group)

    def allgather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.Get_size()
        dist.all_gather_object(values, value, group=self._group)
        return values


def exchange_over_communicator(group: Any, cases: Sequence[Case]) -> None:
    """Use a communicator shaped like mpi4py's."""
    exchange_all(Communicator(group), cases)


def sum_of_ranks(group: Any, case: Case) -> torch.Tensor:
    """Leave the user's group usable beside a buffer of several nodes."""
    total = torch.tensor(float(dist.get_rank(group)))
    with Session(group, case, Oracle()) as session:
        session.combine(session.dispatch(0))
        dist.all_reduce(total, group=group)
        session.combine(session.dispatch(1))
    dist.all_reduce(total, group=group)
    return total
