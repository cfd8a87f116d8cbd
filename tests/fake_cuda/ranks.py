# SPDX-License-Identifier: Apache-2.0
"""What ranks do with symmetric memory of the driver without a GPU, as threads or processes."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Any

from fake_cuda.library import FakeCuda

from deepcomm._C import cuda
from deepcomm.backends.cuda.heap import open_heap
from deepcomm.group import as_group

if TYPE_CHECKING:
    from deepcomm.group import Group

TIMEOUT_S = 60.0


def open_descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names only


def exchange_words(group: Group, driver: cuda.Driver, device: int | None = None) -> list[int]:
    """Write a word into each rank's block; return what the ranks have written into the own one."""
    own = cuda.Device(driver, group.rank % 2 if device is None else device)
    heap, bases = open_heap(group, driver, own, 1000, TIMEOUT_S)
    assert len(set(bases)) == group.size
    assert bases[group.rank] == heap.base
    for peer, base in enumerate(bases):
        ctypes.c_uint32.from_address(base + 4 * group.rank).value = 1 + 100 * group.rank + peer
    group.all_gather("written")
    words = list((ctypes.c_uint32 * group.size).from_address(heap.base))
    group.all_gather("read")
    heap.close([])
    return words


def expected_words(num_ranks: int) -> list[list[int]]:
    return [[1 + 100 * source + rank for source in range(num_ranks)] for rank in range(num_ranks)]


def exchange_in_process(group: Any, attributes: dict[int, int]) -> list[int]:
    """Do it as a process of its own, several times; leave nothing behind."""
    fake = FakeCuda()
    for attribute, value in attributes.items():
        for device in range(2):
            fake.set_attribute(device, attribute, value)
    driver, control = fake.driver(), as_group(group)
    descriptors = open_descriptors()
    results = [exchange_words(control, driver) for _ in range(3)]
    assert fake.live() == {}
    assert open_descriptors() == descriptors
    assert results[0] == results[1] == results[2]
    return results[0]
