# SPDX-License-Identifier: Apache-2.0
"""Checks of what symmetric memory of GPUs needs of driver and devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepcomm._C import cuda
from deepcomm.backends.cuda.driver import default_driver
from deepcomm.cli.checks.finding import Finding, Status
from deepcomm.errors import Error

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_gpu_memory"]

SECTION = "cuda"
ATTRIBUTES = (
    (
        "virtual memory",
        cuda.VIRTUAL_MEMORY_SUPPORTED,
        Status.WARN,
        "the CUDA backend cannot use such a device",
    ),
    (
        "POSIX descriptors",
        cuda.POSIX_FD_SUPPORTED,
        Status.WARN,
        "ranks of a host must be threads of one process there (LocalCluster)",
    ),
    (
        "GPUDirect RDMA",
        cuda.RDMA_SUPPORTED,
        Status.INFO,
        "between hosts, data passes through host memory there",
    ),
)


def check_gpu_memory() -> Iterator[Finding]:
    """Ask the driver how ranks can share memory of each device."""
    try:
        driver = default_driver()
        count = driver.num_devices
    except Error as error:
        # Whether that matters here is what the check of the driver says.
        yield Finding(SECTION, "GPU memory", Status.INFO, f"not looked at: {error}")
        return
    for name, attribute, lack, consequence in ATTRIBUTES:
        without = [index for index in range(count) if not driver.attribute(index, attribute)]
        yield _finding(name, without, count, lack, consequence)
    yield _fabric(driver, count)


def _finding(name: str, without: list[int], count: int, lack: Status, remedy: str) -> Finding:
    if without:
        return Finding(SECTION, name, lack, f"not on {_devices(without)} of {count}", remedy)
    return Finding(SECTION, name, Status.OK, f"on all {count} devices")


def _fabric(driver: cuda.Driver, count: int) -> Finding:
    """Report fabric handles, which only hosts that share an NVLink domain need."""
    name = "fabric handles"
    able = [index for index in range(count) if driver.attribute(index, cuda.FABRIC_SUPPORTED)]
    if not able:
        return Finding(SECTION, name, Status.INFO, "none: NVLink does not leave this host")
    refused = [index for index in able if not cuda.Device(driver, index).has_fabric]
    if refused:
        detail = f"a trial allocation is refused on {_devices(refused)}"
        remedy = "only for NVLink between hosts: start the IMEX service and give it a channel"
        return Finding(SECTION, name, Status.INFO, detail, remedy)
    return Finding(SECTION, name, Status.OK, f"on {len(able)} of {count} devices")


def _devices(indices: list[int]) -> str:
    return ", ".join(f"cuda:{index}" for index in indices)
