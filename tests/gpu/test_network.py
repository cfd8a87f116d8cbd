# SPDX-License-Identifier: Apache-2.0
"""The network of ``CudaRuntime`` on GPUs: NCCL, as torch has loaded it, between threads."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from deepcomm.backends.cuda.device import CudaRuntime
from deepcomm.backends.cuda.nccl import Found, probe_nccl
from deepcomm.backends.cuda.network import Message, Network, Span
from deepcomm.errors import CommError, NcclError
from deepcomm.testing import LocalCluster, LocalGroup

pytestmark = pytest.mark.gpu(2)

TIMEOUT_S = 60.0
SIZES = (0, 1, 77, 1 << 20, (1 << 24) + 3)


def span(tensor: torch.Tensor) -> Span:
    return Span(tensor.data_ptr(), tensor.numel())


def coded(src: int, dst: int, index: int, num_bytes: int) -> torch.Tensor:
    """Return bytes that say where they come from and where they belong."""
    numbers = torch.arange(num_bytes, dtype=torch.int64, device="cuda")
    return ((numbers * 31 + 7 * src + 3 * dst + index) % 251).to(torch.uint8)


def exchange(group: LocalGroup, network: Network) -> None:
    """Send spans to each rank, itself too; check what has come, in the order of the stream."""
    sent = [
        [coded(group.rank, peer, i, n) for i, n in enumerate(SIZES)] for peer in range(group.size)
    ]
    received = [
        [torch.full((n,), 0xEE, dtype=torch.uint8, device="cuda") for n in SIZES]
        for _ in range(group.size)
    ]
    network.move(
        [
            Message(peer, tuple(map(span, sent[peer])), tuple(map(span, received[peer])))
            for peer in range(group.size)
        ]
    )
    for peer in range(group.size):
        for index, tensor in enumerate(received[peer]):
            assert torch.equal(tensor, coded(peer, group.rank, index, tensor.numel()))


def test_network_is_torchs_nccl() -> None:
    found = probe_nccl()
    assert isinstance(found, Found), found
    assert found.was_loaded
    version = torch.cuda.nccl.version()
    assert found.version == ".".join(map(str, version[:3]))


def test_network_moves_bytes_between_devices() -> None:
    def use(group: LocalGroup) -> None:
        network = CudaRuntime().network(group, TIMEOUT_S, None, ("nccl",))
        for _ in range(20):
            exchange(group, network)
        torch.cuda.current_stream().synchronize()
        group.barrier()
        network.close()

    LocalCluster(2, device="cuda").run(use)


def test_abort_ends_a_move_that_no_peer_meets() -> None:
    def use(group: LocalGroup) -> None:
        network = CudaRuntime().network(group, TIMEOUT_S, None, ("nccl",))
        exchange(group, network)
        stream = torch.cuda.current_stream()
        stream.synchronize()
        group.barrier()
        if group.rank == 0:
            memory = torch.zeros(64, dtype=torch.uint8, device="cuda")
            network.move([Message(1, (), (span(memory),))])
            time.sleep(0.2)
            assert not stream.query()
            aborting = threading.Thread(target=network.abort)
            aborting.start()
            aborting.join(TIMEOUT_S)
            stream.synchronize()
            with pytest.raises(CommError, match=r"got one that was aborted$"):
                network.move([])
        group.barrier()
        network.abort()
        network.close()
        assert torch.ones(3, device="cuda").sum().item() == 3, "the context is well"

    LocalCluster(2, device="cuda").run(use)


def test_ranks_that_share_a_device_are_refused_by_nccl() -> None:
    def use(group: LocalGroup) -> None:
        with pytest.raises((NcclError, CommError), match=r"invalid usage|Duplicate GPU"):
            CudaRuntime().network(group, TIMEOUT_S, None, ("nccl",))

    LocalCluster(2, device="cuda:0").run(use)
