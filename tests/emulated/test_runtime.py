# SPDX-License-Identifier: Apache-2.0
"""The emulated ``Runtime``: kernels that ranks as threads launch, by the protocol's calls."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from emulated.cluster import EmulatedGroup, Settings
from emulated.runtime import EmulatedMemory, EmulatedRuntime, run_emulated
from gpu import params
from gpu.probes import fold, payload

SEEDS = 20
NUM_WORDS, NUM_SLOTS, NUM_ROUNDS = 48, 2, 6
TIMEOUT_NS = 1_000_000_000
RECORD_BYTES = 64


@dataclass(frozen=True)
class Params:
    """A ctypes struct as ``KernelParams``."""

    struct: ctypes.Structure

    @property
    def address(self) -> int:
        return ctypes.addressof(self.struct)

    @property
    def num_bytes(self) -> int:
        return ctypes.sizeof(self.struct)


def neighbours(group: EmulatedGroup) -> tuple[int, int]:
    return (group.rank + 1) % group.size, (group.rank - 1) % group.size


def probe(group: EmulatedGroup, record: EmulatedMemory, num_rounds: int) -> params.ProbeParams:
    dst, src = neighbours(group)
    return params.ProbeParams(
        group.rank, dst, src, num_rounds, NUM_WORDS, TIMEOUT_NS, record.device_address
    )


class Ring:
    """probe_ring on symmetric memory: any number of launches, each going on where one ended."""

    TAIL, HEAD, SLOTS = 0, 128, 256

    def __init__(self, group: EmulatedGroup) -> None:
        self.group = group
        self.runtime: EmulatedRuntime = group.runtime
        self.memory = self.runtime.symmetric_memory(group, 256 + NUM_SLOTS * NUM_WORDS * 4)
        self.record = self.runtime.host_memory(RECORD_BYTES)
        self.kernel = self.runtime.load("probe_ring", {})
        self.folds = torch.zeros(NUM_ROUNDS, NUM_WORDS, dtype=torch.int32)
        self.first = 0

    def launch(self) -> None:
        dst, src = neighbours(self.group)
        at, to, back = (self.memory.bases[rank] for rank in (self.group.rank, dst, src))
        struct = params.RingParams(
            probe(self.group, self.record, NUM_ROUNDS),
            self.first,
            *(to + self.SLOTS, to + self.TAIL, at + self.HEAD),
            *(at + self.SLOTS, at + self.TAIL, back + self.HEAD),
            self.folds.data_ptr(),
            NUM_SLOTS,
        )
        self.runtime.launch_block(self.kernel, 2, 64, Params(struct))
        self.first += NUM_ROUNDS

    def check(self) -> None:
        rounds = np.arange(NUM_ROUNDS)[:, None]
        words = payload(neighbours(self.group)[1], rounds, np.arange(NUM_WORDS))
        expected = fold(words, self.first - NUM_ROUNDS + rounds + 1)
        assert np.array_equal(self.folds.numpy().view(np.uint32), expected)


def play_ring(group: EmulatedGroup, num_launches: int = 3) -> int:
    ring = Ring(group)
    for _ in range(num_launches):
        ring.launch()
        ring.runtime.flush()
        ring.check()
    return ring.first


@pytest.mark.parametrize("seed", range(SEEDS))
def test_runtime_keeps_memory_and_knowledge_between_launches(seed: int) -> None:
    assert run_emulated(play_ring, 3, Settings(seed)) == [3 * NUM_ROUNDS] * 3
