# SPDX-License-Identifier: Apache-2.0
"""What nodes a buffer finds in its group, and which it refuses."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from collective.case import Case
from collective.session import Oracle, Session

from deepcomm import Buffer, InvalidArgument, topology
from deepcomm.testing import LocalCluster


def play_hosts(monkeypatch: pytest.MonkeyPatch, hosts: list[set[int]]) -> dict[str, int]:
    """Let the ranks of a ``LocalCluster`` see the probes of their host alone.

    Returns the ranks of all probes, once there are any.
    """
    num_ranks = sum(len(host) for host in hosts)
    probes: dict[str, int] = {}
    lock = threading.Lock()
    probe_file = topology.probe_file

    def recorded(group: Any) -> Any:
        return Recording(probe_file(group), probes, lock)

    def is_visible(name: str | None) -> bool:
        rank = int(threading.current_thread().name.removeprefix("rank"))
        own = next(host for host in hosts if rank in host)
        return name is not None and probes[name] in own

    assert num_ranks == len(set().union(*hosts))
    monkeypatch.setattr(topology, "probe_file", recorded)
    monkeypatch.setattr(topology, "is_visible", is_visible)
    return probes


class Recording:
    """A context manager of probe names that notes whose each is."""

    def __init__(self, context: Any, probes: dict[str, int], lock: threading.Lock) -> None:
        self._context, self._probes, self._lock = context, probes, lock

    def __enter__(self) -> list[str]:
        names = self._context.__enter__()
        with self._lock:
            self._probes.update((name, rank) for rank, name in enumerate(names))
        return names

    def __exit__(self, *details: Any) -> Any:
        return self._context.__exit__(*details)


def construct(num_ranks: int, case: Case) -> list[str | int]:
    """Return each rank's error, or its ranks a node."""

    def body(group: Any) -> str | int:
        try:
            with case.open(group) as buffer:
                return buffer.ranks_per_node
        except InvalidArgument as error:
            return str(error)

    return LocalCluster(num_ranks).run(body)


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        pytest.param([{0, 2}, {1, 3}], "expected node-major ranks", id="interleaved"),
        pytest.param([{0, 3}, {1, 2}], "expected node-major ranks", id="wrapped"),
        pytest.param([{0, 1, 2}, {3}], "nodes with equal numbers of ranks", id="uneven"),
        pytest.param([{0}, {1, 2, 3}], "nodes with equal numbers of ranks", id="uneven-first"),
        pytest.param([{0, 1}, {2}, {3}], "nodes with equal numbers of ranks", id="three-hosts"),
    ],
)
def test_groups_that_are_not_even_and_node_major_are_refused(
    monkeypatch: pytest.MonkeyPatch, hosts: list[set[int]], message: str
) -> None:
    play_hosts(monkeypatch, hosts)
    for error in construct(4, Case()):
        assert isinstance(error, str)
        assert message in error


def test_nodes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    play_hosts(monkeypatch, [{0, 1}, {2, 3}, {4, 5}])
    case, oracle = Case(num_ranks=6, ranks_per_node=2), Oracle()

    def body(group: Any) -> None:
        # The reference has two ranks a node; the buffer is not told.
        with Session(group, case, oracle, ranks_per_node=None) as session:
            assert session.buffer.ranks_per_node == 2
            session.combine(session.dispatch(0), carried=True)

    LocalCluster(6).run(body)


def test_ranks_that_share_no_memory_make_nodes_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    play_hosts(monkeypatch, [{0}, {1}, {2}, {3}])
    assert construct(4, Case()) == [1] * 4


def test_chosen_nodes_may_be_smaller_than_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    play_hosts(monkeypatch, [{0, 1}, {2, 3}])
    assert construct(4, Case(ranks_per_node=1)) == [1] * 4
    assert construct(4, Case(ranks_per_node=2)) == [2] * 4


def test_chosen_nodes_may_not_span_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    play_hosts(monkeypatch, [{0, 1}, {2, 3}])
    for error in construct(4, Case(ranks_per_node=4)):
        assert "expected ranks 0..3 to share memory" in str(error)


def test_probes_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = play_hosts(monkeypatch, [{0, 2}, {1, 3}])
    construct(4, Case())
    assert len(probes) == 4
    assert not any((topology.SHARED_MEMORY / name).exists() for name in probes)


@pytest.mark.parametrize("group", [None, 3, "WORLD", object()])
def test_what_is_no_group_is_refused(group: Any) -> None:
    with pytest.raises(InvalidArgument, match="group: expected a torch"):
        Buffer(group, num_experts=2, num_topk=1, hidden=8, max_tokens_per_rank=1, device="cpu")


def test_one_rank_needs_no_peers() -> None:
    case = Case(num_ranks=1, num_topk=2)

    def body(group: Any) -> None:
        with Session(group, case) as session:
            session.combine(session.dispatch(0), in_place=True)

    LocalCluster(1).run(body)
