# SPDX-License-Identifier: Apache-2.0
"""Probes through ``CudaRuntime``, by ranks that are threads or processes."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gpu import params
from gpu.probes import payload

from deepcomm.backends.cuda.device import CudaRuntime
from deepcomm.group import as_group

if TYPE_CHECKING:
    from collections.abc import Sequence

RECORD_BYTES = 64
NUM_WORDS = 512
GRID = 2
SIGNAL_OFFSET = 0
PAYLOAD_OFFSET = 128
TIMEOUT_S = 60.0


class StructParams:
    """A ctypes struct as a kernel's argument."""

    def __init__(self, struct: Any) -> None:
        self.struct = struct
        self.address = ctypes.addressof(struct)
        self.num_bytes = ctypes.sizeof(struct)


class _Bytes:
    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def view(address: int, num_bytes: int, device: int) -> torch.Tensor:
    """Return bytes at an address as a tensor; nobody keeps them alive."""
    with torch.cuda.device(device):
        return torch.as_tensor(_Bytes(address, num_bytes), device=torch.device("cuda", device))


def signal_params(
    bases: Sequence[int],
    *,
    rank: int,
    num_rounds: int,
    record: int,
    timeout_s: float,
    sums: int,
) -> StructParams:
    """Let a rank signal the next one and hear from the one before."""
    peer = (rank + 1) % len(bases)
    probe = params.ProbeParams(
        rank, peer, peer, num_rounds, NUM_WORDS, int(timeout_s * 1e9), record
    )
    own, other = bases[rank], bases[peer]
    return StructParams(
        params.SignalParams(
            probe,
            other + PAYLOAD_OFFSET,
            other + SIGNAL_OFFSET,
            own + PAYLOAD_OFFSET,
            own + SIGNAL_OFFSET,
            sums,
        )
    )


def launch_signals(group: Any, runtime: CudaRuntime, num_rounds: int) -> int:
    """Let two ranks signal each other through a kernel; return the state of the error record."""
    heap = runtime.symmetric_memory(group, 1 << 20, TIMEOUT_S)
    record = runtime.host_memory(RECORD_BYTES)
    sums = runtime.memory(4 * num_rounds * GRID)
    function = runtime.load("probe_signal", {})
    arguments = signal_params(
        heap.bases,
        rank=group.rank,
        num_rounds=num_rounds,
        record=record.device_address,
        timeout_s=20.0,
        sums=sums.address,
    )
    group.all_gather("ready")
    runtime.launch(function, GRID, arguments)
    runtime.record_event().synchronize()
    received = view(sums.address, sums.num_bytes, runtime.device.index).cpu().numpy()
    words = payload(1 - group.rank, np.arange(num_rounds)[:, None], np.arange(NUM_WORDS))
    expected = words.astype(np.uint64).sum(axis=1).astype(np.uint32)
    got = received.view(np.uint32).reshape(num_rounds, GRID)
    assert np.array_equal(got, np.repeat(expected[:, None], GRID, 1)), "sums of the payload"
    group.all_gather("done")
    heap.close()
    return ctypes.c_uint32.from_address(record.address).value


def exchange_in_process(group: Any, num_devices: int) -> int:
    """Exchange heaps and signals with the other process, a few times; leave no descriptor."""
    control = as_group(group)
    runtime = CudaRuntime(torch.device("cuda", control.rank % num_devices))
    assert launch_signals(control, runtime, 5) == 0
    descriptors = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names only
    for _ in range(5):
        assert launch_signals(control, runtime, 5) == 0
    assert sorted(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208 - names only
    return control.rank
