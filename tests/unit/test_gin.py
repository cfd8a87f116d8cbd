# SPDX-License-Identifier: Apache-2.0
"""The host's half of moves over GIN: windows, words for the agent, failures, the end.

The library and the machine have no GPU; agents are threads that really move bytes.
"""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING, Any

import pytest
from fake_nccl.agent import AgentRuntime, World
from fake_nccl.gin_ranks import BLOCK_BYTES, TIMEOUT_S, end_of, exchange, with_gin
from fake_nccl.ranks import SOON_S, device, leaving_nothing, run

from deepcomm._C import kernels
from deepcomm.backends.cuda.gin import NUM_SLOTS, GinNetwork
from deepcomm.backends.cuda.nccl import NcclOptions
from deepcomm.backends.cuda.network import Message, Span
from deepcomm.backends.cuda.network_choice import open_network
from deepcomm.backends.cuda.progress import WATCH_S
from deepcomm.errors import CommError, CommTimeout, Error, InvalidArgument

if TYPE_CHECKING:
    from fake_nccl.library import FakeNccl

    from deepcomm.testing import LocalGroup


@pytest.fixture
def fake() -> FakeNccl:
    return with_gin()


# Moves


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_moves_bring_bytes_where_they_belong(fake: FakeNccl, num_ranks: int) -> None:
    world = World()

    def use(group: LocalGroup) -> str:
        with end_of(group, fake, world) as end:
            for _ in range(NUM_SLOTS + 3):  # each slot is used again
                exchange(end, (8, 0, 77))
            assert isinstance(end.network, GinNetwork)
            group.barrier()
            return end.network.describe()

    with leaving_nothing(fake):
        said = run(num_ranks, use)
    assert said[0] == f"GIN of NCCL 2.30.7, {fake.path}"
    # One context, two signals and a counter a rank, along rails.
    assert fake.requirements() == (32, 0xBEEF, 0, 1, 2 * num_ranks, num_ranks, 2, 0)


def test_moves_count_what_went_each_way(fake: FakeNccl) -> None:
    world = World()

    def use(group: LocalGroup) -> None:
        rank, peer = group.rank, 1 - group.rank
        with end_of(group, fake, world) as end:
            there, back = end.span(0, 16), end.span(16, 32)
            one_way = Message(peer, (there,), ()) if rank == 0 else Message(peer, (), (there,))
            for _ in range(3):
                end.move([one_way])
            end.move([Message(peer, (), ())])  # nothing: no agent
            end.move([Message(peer, (there, back), (there, back))])
            assert len(end.runtime.launched) == 4
            assert end.network._puts[peer] == 3 + 2 + 1
            assert end.network._sends[peer] == (4 if rank == 0 else 1)
            assert end.network._receives[peer] == (1 if rank == 0 else 4)
            group.barrier()

    run(2, use)


def test_windows_come_and_go(fake: FakeNccl) -> None:
    world = World()

    def use(group: LocalGroup) -> None:
        with end_of(group, fake, world) as end:
            for _ in range(2 * kernels.GIN_MOST_WINDOWS):  # their places are used again
                old, end.memory = end.memory, end.runtime.host_memory(BLOCK_BYTES)
                end.network.register(end.memory.address, BLOCK_BYTES)
                end.network.deregister(old.address)
                exchange(end, (24,))
            with pytest.raises(InvalidArgument, match="span: expected registered memory, got 8"):
                end.network.move([Message(1 - group.rank, (Span(old.address, 8),), ())])
            group.barrier()

    with leaving_nothing(fake):
        run(2, use)


def test_wrong_messages_are_refused(fake: FakeNccl) -> None:
    world = World()

    def use(group: LocalGroup) -> None:
        with end_of(group, fake, world) as end:
            span = end.span(0, 8)
            for peer in (-1, 2, group.rank):
                with pytest.raises(InvalidArgument, match=f"peer: expected .* got {peer}"):
                    end.network.move([Message(peer, (span,), ())])
            with pytest.raises(InvalidArgument, match=r"spans: expected at most 10 .* got 11"):
                end.network.move([Message(1 - group.rank, (span,) * 11, ())])
            with pytest.raises(InvalidArgument, match="registered"):
                end.network.move([Message(1 - group.rank, (end.span(BLOCK_BYTES - 7, 8),), ())])
            exchange(end, (8,))  # they left no trace
            group.barrier()

    run(2, use)


def test_worked_example_of_moves(fake: FakeNccl) -> None:
    world = World()

    def use(group: LocalGroup) -> tuple[Any, ...]:
        rank, peer = group.rank, 1 - group.rank
        with end_of(group, fake, world) as end:
            pair = (end.span(0, 8), end.span(8, 8))
            for _ in range(2):
                end.move([Message(peer, pair, pair)])
            sends, receives = [((0, 14336), (20480, 64)), ((512, 96),)][:: 1 - 2 * rank]
            places = [((1024, 96),), ((4096, 14336), (18432, 64))][rank]
            assert [size for _, size in places] == [size for _, size in receives]
            spans = [tuple(end.span(*place) for place in side) for side in (sends, places)]
            end.move([Message(peer, *spans)])
            group.barrier()
            (words,) = end.runtime.moves[-1].peers
            return (
                *(words.num_puts, words.num_ready, words.num_data),
                *(words.sends, words.receives),
                end.network._puts[peer],
            )

    assert run(2, use) == [
        (6, 3, 3, [(1, 0, 14336), (1, 20480, 64)], [(1, 1024, 96)], 9),
        (6, 3, 3, [(1, 512, 96)], [(1, 4096, 14336), (1, 18432, 64)], 8),
    ]


# Failures


def test_sizes_that_differ_are_told(fake: FakeNccl) -> None:
    world = World()

    def use(group: LocalGroup) -> Error:
        with end_of(group, fake, world, timeout_s=0.2) as end:
            span = end.span(0, 64 if group.rank == 0 else 48)
            sides = ((span,), ()) if group.rank == 0 else ((), (span,))
            end.move([Message(1 - group.rank, *sides)])
            with pytest.raises(CommError) as caught:
                end.network.move([])
            return caught.value

    with leaving_nothing(fake):
        of_sender, of_receiver = run(2, use)
    assert str(of_sender) == (
        "rail: rank 0: rank 1 expects other bytes than it is sent: size of span 0: expected 64, "
        "got 48"
    )
    assert isinstance(of_receiver, CommTimeout)
    assert "rank 1: rank 0 did not send its bytes within 0.4 s" in str(of_receiver)


def test_absent_peer_is_told_to_who_watches(fake: FakeNccl) -> None:
    world = World()

    def use(group: LocalGroup) -> None:
        with end_of(group, fake, world, timeout_s=0.2) as end:
            told: list[Error] = []
            end.network.watch(lambda: False, told.append)
            if group.rank == 0:
                end.move([Message(1, (end.span(0, 8),), ())])
                limit = time.monotonic() + SOON_S
                while not told and time.monotonic() < limit:
                    time.sleep(0.01)
                assert "rank 1 did not say where the bytes for it go" in str(told[0])
            group.barrier()

    with leaving_nothing(fake):
        run(2, use)


def test_watch_ends_moves_once_the_rank_has_failed(fake: FakeNccl) -> None:
    world = World()

    def use(group: LocalGroup) -> None:
        with end_of(group, fake, world) as end:
            end.network.watch(lambda: bool(end.runtime.launched), pytest.fail)
            if group.rank == 0:
                start = time.monotonic()
                end.move([Message(1, (end.span(0, 8),), ())])
                assert time.monotonic() - start < SOON_S
                with pytest.raises(CommError, match="rail: the network was aborted"):
                    end.network.move([])
            group.barrier()

    with leaving_nothing(fake):
        run(2, use)


def test_abort_by_one_who_watches_is_no_failure_for_another(fake: FakeNccl) -> None:
    world = World()

    def use(group: LocalGroup) -> None:
        with end_of(group, fake, world) as end:
            told: list[Error] = []
            end.network.watch(lambda: bool(end.runtime.launched), told.append)
            end.network.watch(lambda: False, told.append)
            if group.rank == 0:
                end.move([Message(1, (end.span(0, 8),), ())])
                time.sleep(3 * WATCH_S)
                assert not told
            group.barrier()

    with leaving_nothing(fake):
        run(2, use)


def test_close_is_idempotent_and_ends_what_does_not_end(fake: FakeNccl) -> None:
    world = World()

    def use(group: LocalGroup) -> None:
        with end_of(group, fake, world, timeout_s=0.1) as end:
            if group.rank == 0:
                end.network.move([Message(1, (end.span(0, 8),), ())])
            end.network.close()
            end.network.close()
            end.network.deregister(end.memory.address)
            with pytest.raises(CommError, match="rail: the network is closed"):
                end.network.move([])

    with leaving_nothing(fake):
        run(2, use)


def test_network_that_nobody_closes_outlives_its_agents(fake: FakeNccl) -> None:
    world = World()

    def use(group: LocalGroup) -> None:
        runtime: Any = AgentRuntime(world, group.rank)
        library, options = fake.library, NcclOptions(TIMEOUT_S)
        network = open_network(group, runtime, device(group.rank), options, ("gin",), library)
        memory = runtime.host_memory(BLOCK_BYTES)
        network.register(memory.address, BLOCK_BYTES)
        group.barrier()
        if group.rank == 0:
            network.move([Message(1, (Span(memory.address, 8),), ())])
            agent, moves = runtime.launched[-1], network._moves  # type: ignore[attr-defined]
            assert agent.is_alive()
            del network
            gc.collect()
            assert moves.record.is_set
            assert moves.is_idle()
        group.barrier()

    run(2, use)
