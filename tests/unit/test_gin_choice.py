# SPDX-License-Identifier: Apache-2.0
"""Which network is taken, why, and what the compiled agent says of NCCL's structs."""

from __future__ import annotations

import logging
import struct
from typing import TYPE_CHECKING, Any

import pytest
from fake_nccl.agent import AgentRuntime, World, synthetic_constants
from fake_nccl.gin_ranks import PROXY, TIMEOUT_S, end_of, exchange, with_gin
from fake_nccl.ranks import device, leaving_nothing, run

from deepcomm import jit
from deepcomm.backends.cuda.gin_facts import GinFacts
from deepcomm.backends.cuda.nccl import NcclNetwork, NcclOptions
from deepcomm.backends.cuda.network_choice import loaded_nccl_headers, open_network
from deepcomm.errors import NcclError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fake_nccl.library import FakeNccl

    from deepcomm.testing import LocalGroup


@pytest.fixture
def fake() -> FakeNccl:
    return with_gin()


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
def test_facts_of_the_installed_nccl(tmp_path: Path) -> None:
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
