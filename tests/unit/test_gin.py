# SPDX-License-Identifier: Apache-2.0
"""The host's half of moves over GIN: windows, words for the agent, failures, the end, fallbacks.

The library and the machine have no GPU; agents are threads that really move bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from fake_nccl.agent import AgentRuntime, World, synthetic_constants
from fake_nccl.library import FakeNccl
from fake_nccl.ranks import POISON, SOON_S, device, leaving_nothing, run, text

from deepcomm import jit
from deepcomm._C import kernels
from deepcomm.backends.cuda.gin import NUM_SLOTS, GinNetwork
from deepcomm.backends.cuda.gin_facts import GinFacts
from deepcomm.backends.cuda.nccl import NcclNetwork, NcclOptions
from deepcomm.backends.cuda.network import Message, Network, Span
from deepcomm.backends.cuda.network_choice import open_network
from deepcomm.errors import CommError, CommTimeout, Error, InvalidArgument, NcclError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from deepcomm.testing import LocalGroup

TIMEOUT_S = 20.0
BLOCK_BYTES = 4096
PROXY = 2


@pytest.fixture
def fake() -> FakeNccl:
    made = FakeNccl()
    made.wish("version", 23007)
    made.wish("railed gin type", PROXY)
    return made


@dataclass
class End:
    """One rank's network, machine and memory."""

    group: LocalGroup
    network: Network
    runtime: AgentRuntime
    memory: Any

    def span(self, begin: int, num_bytes: int) -> Span:
        return Span(self.memory.address + begin, num_bytes)

    def write(self, begin: int, content: bytes) -> Span:
        ctypes.memmove(self.memory.address + begin, content, len(content))
        return self.span(begin, len(content))

    def read(self, span: Span) -> bytes:
        return ctypes.string_at(span.address, span.num_bytes)

    def move(self, messages: Sequence[Message]) -> None:
        """Move, and wait for the agent, which no stream does here."""
        self.network.move(messages)
        self.runtime.join()


@contextlib.contextmanager
def end_of(
    group: LocalGroup,
    fake: FakeNccl,
    world: World,
    *,
    timeout_s: float = TIMEOUT_S,
    kinds: Sequence[str] = ("gin", "nccl"),
    constants: dict[str, bytes] | None = None,
) -> Iterator[End]:
    """Open a network with a block of memory; leave at the end."""
    runtime: Any = AgentRuntime(world, group.rank, constants)
    options = NcclOptions(timeout_s)
    network = open_network(group, runtime, device(group.rank % 2), options, kinds, fake.library)
    memory = runtime.host_memory(BLOCK_BYTES)
    network.register(memory.address, BLOCK_BYTES)
    try:
        yield End(group, network, runtime, memory)
    finally:
        network.close()
        assert all(block.is_closed for block in runtime.blocks)


def exchange(end: End, sizes: Sequence[int]) -> None:
    """Send spans of these sizes from each rank to each other; check what has come."""
    rank, num_ranks = end.group.rank, end.group.size
    begin, messages = 0, []
    for peer in (peer for peer in range(num_ranks) if peer != rank):
        sends, receives = [], []
        for index, size in enumerate(sizes):
            sends.append(end.write(begin, text(rank, peer, index, size)))
            receives.append(end.write(begin + size, POISON * size))
            begin += 2 * size
        messages.append(Message(peer, tuple(sends), tuple(receives)))
    end.move(messages)
    for message in messages:
        for index, span in enumerate(message.receives):
            assert end.read(span) == text(message.peer, rank, index, span.num_bytes)


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


# Which network


def refuse_version(fake: FakeNccl) -> None:
    fake.wish("version", 22809)


def has_no_type(fake: FakeNccl) -> None:
    fake.wish("railed gin type", 0)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (refuse_version, "expected NCCL 2.30.4 or newer for its device API, got 2.28.9"),
        (has_no_type, "expected GIN between the ranks, got type NONE"),
        (lambda fake: fake.wish("no device api"), "got a communicator without"),
        (lambda fake: fake.wish("lsa teams", 1), "got type NONE"),
        (lambda fake: fake.wish("fail ncclDevCommCreate", 2), "ncclDevCommCreate() failed: 2"),
        (lambda fake: fake.wish("no windows"), "expected a window, got none"),
        (lambda fake: fake.wish("fail ncclCommWindowRegister", 3), "Register() failed: 3"),
    ],
    ids=["version", "type", "api", "teams", "create", "no window", "window"],
)
def test_without_gin_there_is_nccl_or_an_error(
    fake: FakeNccl,
    prepare: Callable[[FakeNccl], None],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    prepare(fake)
    world = World()

    def use(group: LocalGroup) -> str:
        with end_of(group, fake, world) as end:
            assert isinstance(end.network, NcclNetwork)
            group.barrier()
            return end.network.describe()

    def insist(group: LocalGroup) -> None:
        with end_of(group, fake, world, kinds=("gin",)):
            pytest.fail("there is none")

    with leaving_nothing(fake), caplog.at_level(logging.INFO, "deepcomm"):
        said = run(2, use)
    assert "; no GIN: rank 0: " in said[0]
    assert reason in said[0]
    assert reason in caplog.text
    with leaving_nothing(fake), pytest.raises(NcclError, match="rail: expected 'gin' as asked"):
        run(2, insist)


def test_one_rank_without_gin_decides_for_all(fake: FakeNccl) -> None:
    world = World()

    class Without(AgentRuntime):
        def load(self, kernel: str, spec: dict[str, int]) -> Any:
            raise jit.HeadersMissing(f"{kernel}: no headers {spec}")

    def use(group: LocalGroup) -> str:
        kind = Without if group.rank == 1 else AgentRuntime
        runtime: Any = kind(world, group.rank)
        options, kinds = NcclOptions(TIMEOUT_S), ("gin", "nccl")
        network = open_network(group, runtime, device(group.rank), options, kinds, fake.library)
        group.barrier()
        network.close()
        return network.describe()

    with leaving_nothing(fake):
        said = run(2, use)
    for text_of_rank in said:
        assert text_of_rank.endswith("; no GIN: rank 1: gin_move: no headers {}")


def test_connections_are_full_where_ranks_share_a_team(fake: FakeNccl) -> None:
    fake.wish("lsa teams", 1)
    fake.wish("gin type", PROXY)
    world = World()

    def use(group: LocalGroup) -> None:
        with end_of(group, fake, world) as end:
            exchange(end, (8,))
            group.barrier()

    run(2, use)
    assert fake.requirements()[6] == 1


# What the kernel says of NCCL's structs


def test_facts_find_the_fields() -> None:
    facts = GinFacts.of(synthetic_constants())
    assert (facts.version, facts.dev_comm_bytes) == (23007, 24)
    filled = struct.pack("<8i", 32, 0, 8, 4, 2, 3, 1, 0)
    properties = facts.read_properties(filled)
    assert (properties.num_ranks, properties.num_lsa_teams) == (8, 4)
    assert (properties.gin_type, properties.railed_gin_type) == (2, 3)
    assert properties.has_device_api


@pytest.mark.nvrtc
@pytest.mark.nccl
def test_facts_of_the_installed_nccl(tmp_path: Any) -> None:
    from deepcomm.backends.cuda.network_choice import loaded_nccl_headers

    (agent,) = (kernel for kernel in jit.KERNELS if kernel.uses_nccl)
    compiler = jit.KernelCompiler(
        jit.find_nvrtc(), jit.source_root(), jit.DiskCache(tmp_path / "cache")
    )
    nccl = loaded_nccl_headers()
    facts = GinFacts.of(compiler.compile(agent, arch="sm_90a", nccl=nccl).constants)
    major, minor, patch = map(int, nccl.version.split("."))
    assert facts.version == 10000 * major + 100 * minor + patch
    size, magic, version = struct.unpack_from("<QII", facts.requirements(4, is_railed=True))
    assert (size, magic, version) == (
        len(facts.requirements(4, is_railed=True)), 0xCAFEBEEF, facts.version,
    )  # fmt: skip
    assert facts.requirements(4, is_railed=True) != facts.requirements(4, is_railed=False)
    assert facts.read_properties(facts.properties).num_ranks == 0
