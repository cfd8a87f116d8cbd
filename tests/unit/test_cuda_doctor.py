# SPDX-License-Identifier: Apache-2.0
"""What ``deepcomm doctor`` says of memory that GPUs share, over a driver without a GPU."""

from __future__ import annotations

import pytest
from fake_cuda.library import FakeCuda

from deepcomm._C import cuda
from deepcomm.cli.checks import gpu_memory
from deepcomm.cli.checks.finding import Finding, Status


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(gpu_memory, "default_driver", fake.driver)
    return fake


def findings() -> dict[str, Finding]:
    return {finding.name: finding for finding in gpu_memory.check_gpu_memory()}


def test_doctor_reports_each_way_to_share_memory(fake: FakeCuda) -> None:
    fake.set_attribute(1, cuda.RDMA_SUPPORTED, 1)
    found = findings()
    assert {name: (entry.status, entry.detail) for name, entry in found.items()} == {
        "virtual memory": (Status.OK, "on all 2 devices"),
        "POSIX descriptors": (Status.OK, "on all 2 devices"),
        "GPUDirect RDMA": (Status.INFO, "not on cuda:0 of 2"),
        "fabric handles": (Status.INFO, "none: NVLink does not leave this host"),
    }
    assert fake.num_calls("cuDevicePrimaryCtxRetain") == 0, "no context for attributes"


def test_doctor_warns_of_devices_of_no_use(fake: FakeCuda) -> None:
    for attribute in (cuda.VIRTUAL_MEMORY_SUPPORTED, cuda.POSIX_FD_SUPPORTED):
        fake.set_attribute(0, attribute, 0)
    found = findings()
    assert found["virtual memory"].status is Status.WARN
    assert found["POSIX descriptors"].status is Status.WARN
    assert "LocalCluster" in str(found["POSIX descriptors"].remedy)


def test_doctor_tries_fabric_handles(fake: FakeCuda) -> None:
    fake.set_attribute(1, cuda.FABRIC_SUPPORTED, 1)
    assert findings()["fabric handles"].detail == "on 1 of 2 devices"
    fake.fail_call("cuMemCreate", 800)
    refused = findings()["fabric handles"]
    assert (refused.status, refused.detail) == (
        Status.INFO,
        "a trial allocation is refused on cuda:1",
    )
    assert "IMEX" in str(refused.remedy)
    assert fake.live() == {}


def test_doctor_is_content_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_memory, "default_driver", lambda: cuda.Driver("libnone.so"))
    (finding,) = gpu_memory.check_gpu_memory()
    assert finding.status is Status.INFO
    assert "libnone.so cannot be opened" in finding.detail
