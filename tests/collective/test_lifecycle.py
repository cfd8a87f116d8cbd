# SPDX-License-Identifier: Apache-2.0
"""Construction, growth, counters and the end of buffers."""

from __future__ import annotations

import gc
import os
import threading
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from collective.case import Case, case_params
from collective.session import Oracle, Session

from deepcomm import CommError, Handle, InvalidArgument, RecvLayout, buffer_bytes
from deepcomm.testing import LocalCluster

TOKEN, EXPERT, PADDED = RecvLayout
SHARED_MEMORY = Path("/dev/shm")
CLUSTERS = [Case(), Case(ranks_per_node=2)]


def run(case: Case, body: Any, **options: Any) -> list[Any]:
    oracle = Oracle()

    def on_rank(group: Any) -> Any:
        with Session(group, case, oracle, **options) as session:
            return body(session)

    return LocalCluster(case.num_ranks).run(on_rank)


def sizes_of(case: Case) -> dict[str, int | None]:
    return {
        "num_experts": case.num_experts,
        "num_topk": case.num_topk,
        "hidden": case.hidden,
        "max_tokens_per_rank": case.num_tokens,
        "ranks_per_node": case.ranks_per_node,
    }


# ---- leaks -----------------------------------------------------------------------------------


def own_segments() -> set[Path]:
    """Return the segments of this process that have names."""
    return set(SHARED_MEMORY.glob(f"deepcomm-{os.getpid()}-*"))


def resources() -> tuple[set[Path], int, int, int]:
    """Return this process's segments, descriptors, threads, and mappings of shared memory."""
    gc.collect()
    segments = own_segments()
    mappings = Path("/proc/self/maps").read_text().count("deepcomm")
    return segments, len(os.listdir("/proc/self/fd")), threading.active_count(), mappings  # noqa: PTH208


@pytest.mark.parametrize(
    ("case", "times"),
    [
        pytest.param(Case(num_ranks=2), 200, id="one-node"),
        pytest.param(Case(num_ranks=4, ranks_per_node=2), 20, id="two-nodes"),
    ],
)
def test_buffers_come_and_go_without_leaks(case: Case, times: int) -> None:
    def body(group: Any) -> None:
        for _ in range(times // 10):
            oracle = Oracle()
            with Session(group, case, oracle) as session:
                session.combine(session.dispatch(0))
            for _ in range(9):
                case.open(group).close()

    LocalCluster(case.num_ranks).run(body)
    before = resources()
    LocalCluster(case.num_ranks).run(body)
    after = resources()
    assert after[0] == set()
    assert after[1] <= before[1] + 2
    assert after[2] <= before[2]
    assert after[3] <= before[3]


def test_segments_have_no_names_once_constructed() -> None:
    def body(session: Session) -> set[Path]:
        session.combine(session.dispatch(0))
        return own_segments()

    assert run(Case(), body) == [set()] * 4


@pytest.mark.parametrize(**case_params(CLUSTERS))
def test_close_twice_and_use_after(case: Case) -> None:
    def body(session: Session) -> None:
        one = session.dispatch(0)
        buffer, inputs = session.buffer, session.inputs(0)
        x, ids = inputs.xs[session.rank], inputs.ids[session.rank]
        session.group.barrier()
        buffer.close()
        buffer.close()
        with pytest.raises(CommError, match="dispatch: the buffer is closed"):
            buffer.dispatch(x, ids)
        with pytest.raises(CommError, match="combine: the buffer is closed"):
            buffer.combine(one.actual.x, one.actual.handle)
        with pytest.raises(CommError, match="low_latency_dispatch: the buffer is closed"):
            buffer.low_latency_dispatch(x, ids)
        assert buffer.stats().num_dispatches == 1
        assert "cpu" in buffer.explain()

    run(case, body)


def test_handle_is_frozen() -> None:
    def body(session: Session) -> None:
        handle = session.dispatch(0).actual.handle
        assert isinstance(handle, Handle)
        with pytest.raises(FrozenInstanceError):
            handle.num_rows = 1

    run(Case(num_ranks=1), body)


# ---- several buffers -------------------------------------------------------------------------


@pytest.mark.parametrize(**case_params(CLUSTERS))
def test_two_buffers_are_independent(case: Case) -> None:
    other = replace(case, hidden=128, num_topk=3, wire="fp32", layout=EXPERT, num_tokens=9)
    oracles = Oracle(), Oracle()

    def body(group: Any) -> None:
        with Session(group, case, oracles[0]) as one, Session(group, other, oracles[1]) as two:
            for round_idx in range(4):
                first = one.dispatch(round_idx)
                second = two.dispatch(round_idx)
                one.combine(first, carried=True)
                flight = one.low_latency_dispatch(round_idx, return_hook=True)
                two.combine(second)
                flight.finish()
            two.buffer.close()
            one.combine(one.dispatch(9))

    LocalCluster(case.num_ranks).run(body)


def test_two_clusters_live_at_once() -> None:
    cases = Case(num_ranks=3), Case(num_ranks=2, ranks_per_node=1, layout=PADDED)

    def body(group: Any, case: Case, oracle: Oracle) -> None:
        with Session(group, case, oracle) as session:
            for round_idx in range(10):
                session.combine(session.dispatch(round_idx))

    threads = []
    errors: list[BaseException] = []

    def work(case: Case) -> None:
        oracle = Oracle()
        try:
            LocalCluster(case.num_ranks).run(lambda group: body(group, case, oracle))
        except BaseException as error:  # noqa: BLE001  # looked at below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# ---- memory and growth -----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_generations": 5, "num_low_latency_slots": 7}])
@pytest.mark.parametrize(**case_params([*CLUSTERS, Case(num_ranks=1, hidden=1000, num_topk=1)]))
def test_buffer_bytes_is_what_a_buffer_takes(case: Case, options: dict[str, int]) -> None:
    want = buffer_bytes(num_ranks=case.num_ranks, **sizes_of(case), **options)

    def body(session: Session) -> None:
        assert session.buffer.num_bytes == want.high_throughput
        session.combine(session.dispatch(0))
        assert session.buffer.num_bytes == want.high_throughput
        session.low_latency_combine(session.low_latency_dispatch(0))
        assert session.buffer.num_bytes <= want.total

    run(replace(case, layout=TOKEN), body, **options)


@pytest.mark.parametrize(
    **case_params(
        [
            Case(num_tokens=64, layout=layout, ranks_per_node=per_node, num_topk=3)
            for layout in RecvLayout
            for per_node in (None, 2)
        ]
    )
)
def test_growable_buffer_grows(case: Case) -> None:
    """Starts with room for 4 tokens a rank; rank 0 brings 64, rank 1 none."""

    def body(session: Session) -> None:
        buffer = session.buffer
        small = [torch.ones(n, case.hidden, dtype=torch.bfloat16) for n in (4, 0, 2, 3)]
        ids = [torch.arange(len(x))[:, None] % case.num_experts for x in small]
        old = buffer.dispatch(
            small[session.rank], ids[session.rank], recv_layout=case.layout, zero_padding=True
        )
        kept = old.x.clone()
        bytes_before, stats = buffer.num_bytes, buffer.stats()
        if case.layout is not PADDED:  # whose shape follows max_tokens_per_rank
            one = session.dispatch(0)
            session.combine(one, in_place=True)
            session.combine(session.dispatch(1, cached=one), carried=True)
        else:
            inputs = session.inputs(0)
            got = buffer.dispatch(
                inputs.xs[session.rank], inputs.ids[session.rank], recv_layout=PADDED
            )
            assert got.x.shape[1] == 4 * buffer.config.max_tokens_per_rank
        assert buffer.config.max_tokens_per_rank == 64
        assert buffer.num_bytes > bytes_before
        num_more = 1 if case.layout is PADDED else 2
        assert buffer.stats().num_dispatches == stats.num_dispatches + num_more
        assert buffer.stats().tokens_received > stats.tokens_received
        assert torch.equal(old.x, kept)
        back = buffer.combine(old.x, old.handle)
        assert torch.equal(back.x, small[session.rank])
        again = buffer.dispatch(small[session.rank], handle=old.handle, zero_padding=True)
        assert torch.equal(again.x, kept)

    run(case, body, max_tokens_per_rank=4, growable=True)


def test_buffer_that_may_not_grow_refuses_and_goes_on() -> None:
    case = Case(num_tokens=64)

    def body(session: Session) -> None:
        inputs = session.inputs(0)
        expected = InvalidArgument if session.rank in (0, 2, 3) else CommError
        with pytest.raises(expected, match="at most max_tokens_per_rank = 4 tokens"):
            session.buffer.dispatch(inputs.xs[session.rank], inputs.ids[session.rank])
        x = torch.ones(4, case.hidden, dtype=torch.bfloat16)
        got = session.buffer.dispatch(x, torch.full((4, 1), session.rank * 2))
        assert torch.equal(got.x, x)

    run(case, body, max_tokens_per_rank=4)


# ---- counters --------------------------------------------------------------------------------


def payload_bytes(case: Case, *, has_weights: bool) -> int:
    """Bytes of one token as dispatch sends it: row, scales, ids and weights."""
    item = 1 if case.quantize else 2
    scales = 4 * -(-case.hidden // 128) if case.quantize else 0
    return case.hidden * item + scales + case.num_topk * (8 if has_weights else 4)


def count_rows(session: Session, ids: list[torch.Tensor]) -> tuple[list[list[int]], list[int]]:
    """Return rows from each rank to each rank, and rows of this rank to other nodes."""
    case = session.case
    per_rank, per_node = case.experts_per_rank, case.config.ranks_per_node
    ranks = [
        [int(((of // per_rank == dst) & (of >= 0)).any(1).sum()) for dst in range(case.num_ranks)]
        for of in ids
    ]
    node_of_expert = per_rank * per_node
    nodes = [
        int(((ids[session.rank] // node_of_expert == node) & (ids[session.rank] >= 0)).any(1).sum())
        for node in range(case.num_nodes)
    ]
    return ranks, nodes


@pytest.mark.parametrize(
    **case_params(
        [
            Case(num_topk=3, ranks_per_node=per_node, wire=wire, routing="uniform")
            for per_node in (None, 2, 1)
            for wire in ("bf16", "fp8")
        ]
    )
)
def test_stats_count_bytes_by_link(case: Case) -> None:
    """Each token crosses the network once per node, and a link of the node once per rank."""

    def body(session: Session) -> None:
        one = session.dispatch(0)
        got, me = session.buffer.stats(), session.rank
        sent, to_nodes = count_rows(session, one.inputs.ids)
        size = payload_bytes(case, has_weights=True)
        topology = case.config
        node = me // topology.ranks_per_node
        # What a rank writes: its own tokens, and those of its rail peers that it forwards.
        rail = [r for r in range(4) if r % topology.ranks_per_node == me % topology.ranks_per_node]
        node_ranks = [r for r in range(4) if r // topology.ranks_per_node == node]
        peers = [r for r in node_ranks if r != me]
        assert got.bytes_local == size * sum(sent[source][me] for source in rail)
        assert got.bytes_node == size * sum(sent[s][dst] for s in rail for dst in peers)
        assert got.bytes_network == size * sum(
            rows for other, rows in enumerate(to_nodes) if other != node
        )
        assert (got.num_dispatches, got.num_combines) == (1, 0)
        assert got.tokens_sent == case.tokens_of(me)
        assert got.tokens_received == sum(row[me] for row in sent)
        assert len(got.wait_us) == 4

        session.combine(one)
        after = session.buffer.stats()
        returned = sum(
            rows
            for source in rail
            if source != me
            for rows in [count_rows_of(one.inputs.ids[source], case, node)]
        )
        assert after.bytes_network - got.bytes_network == case.hidden * 2 * returned
        assert after.num_combines == 1

    run(case, body)


def count_rows_of(ids: torch.Tensor, case: Case, node: int) -> int:
    """Return how many tokens have an expert on a node."""
    node_of_id = ids // (case.experts_per_rank * case.config.ranks_per_node)
    return int(((node_of_id == node) & (ids >= 0)).any(1).sum())


def test_stats_name_who_was_waited_for() -> None:
    late = 1

    def body(session: Session) -> list[int]:
        session.dispatch(0)
        if session.rank == late:
            threading.Event().wait(0.4)
        session.dispatch(1)
        return list(session.buffer.stats().wait_us)

    waits = run(Case(), body)
    assert waits[0][late] > 200_000
    assert waits[2][0] < waits[2][late]
    assert waits[late][late] < 200_000


@pytest.mark.parametrize(**case_params([*CLUSTERS, Case(num_threads=3)]))
def test_explain_states_the_choices(case: Case) -> None:
    def body(session: Session) -> str:
        return session.buffer.explain()

    for rank, text in enumerate(run(case, body, growable=True, num_generations=4)):
        assert f"rank {rank} of 4" in text
        assert f"{case.num_nodes} node(s) of {4 // case.num_nodes}" in text
        assert ("gloo over" in text) == (case.num_nodes > 1)
        assert "4 generations" in text
        assert "growable" in text
        if case.num_threads:
            assert "3 of" in text
            assert "as asked" in text
        assert text.isascii()
        assert max(len(line) for line in text.splitlines()) <= 120
