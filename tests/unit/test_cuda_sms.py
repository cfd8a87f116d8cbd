# SPDX-License-Identifier: Apache-2.0
"""SMs of ranks that share a device must fit together: all their blocks wait for each other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fake_cuda.library import FakeCuda

from deepcomm.backends.cuda.backend import CudaBackend
from deepcomm.backends.cuda.device import CudaRuntime
from deepcomm.backends.cuda.sms import SmShare, share_sms
from deepcomm.config import BufferConfig
from deepcomm.errors import CommError, InvalidArgument
from deepcomm.testing import LocalCluster, LocalGroup

NUM_SMS = 132


def share(devices: str, asked: list[int | None]) -> list[SmShare]:
    """Return what each rank gets on the device that its letter names."""

    def use(group: LocalGroup) -> SmShare:
        runtime: Any = SimpleNamespace(device_id=devices[group.rank], num_sms=NUM_SMS)
        return share_sms(group, runtime, asked[group.rank])

    return LocalCluster(len(devices), device="cpu").run(use)


@pytest.mark.parametrize(
    ("devices", "asked", "expected"),
    [
        ("ab", [None, None], [(24, 132, 1), (24, 132, 1)]),
        ("aaaa", [None] * 4, [(24, 33, 4)] * 4),
        ("a" * 8, [None] * 8, [(16, 16, 8)] * 8),
        ("aab", [100, None, 132], [(100, 100, 2), (24, 32, 2), (132, 132, 1)]),
        ("aaa", [None, 130, None], [(1, 1, 3), (130, 130, 3), (1, 1, 3)]),
        ("aa", [66, 66], [(66, 66, 2), (66, 66, 2)]),
    ],
)
def test_ranks_share_the_sms_of_their_device(
    devices: str, asked: list[int | None], expected: list[tuple[int, int, int]]
) -> None:
    shares = share(devices, asked)
    assert shares == [SmShare(*each) for each in expected]
    for device in set(devices):
        here = [each for each, name in zip(shares, devices, strict=True) if name == device]
        assert sum(each.low_latency for each in here) <= NUM_SMS


@pytest.mark.parametrize(
    ("asked", "got"),
    [([100, 33], r"100 \+ 33"), ([132, None], r"132 \+ None"), ([None, 200], r"None \+ 200")],
)
def test_too_many_sms_are_refused_on_all_ranks(asked: list[int | None], got: str) -> None:
    message = f"num_sms: expected at most 132 SMs for 2 ranks on the device together, got {got}"

    def use(group: LocalGroup) -> None:
        device = "shared" if group.rank < 2 else "own"
        runtime: Any = SimpleNamespace(device_id=device, num_sms=NUM_SMS)
        error = InvalidArgument if group.rank < 2 else CommError
        with pytest.raises(error, match=message) as caught:
            share_sms(group, runtime, [*asked, None][group.rank])
        if group.rank == 2:
            assert caught.value.peer in (0, 1)  # type: ignore[union-attr]

    LocalCluster(3, device="cpu").run(use)


def test_buffer_of_a_shared_device_is_refused() -> None:
    fake = FakeCuda()  # 4 SMs
    sizes = {"num_experts": 2, "num_topk": 1, "hidden": 16, "max_tokens_per_rank": 4}

    def use(group: LocalGroup) -> None:
        compiler: Any = SimpleNamespace()
        runtime = CudaRuntime("cuda:1", driver=fake.driver(), compiler=compiler)
        with pytest.raises(InvalidArgument, match=r"at most 4 SMs for 2 ranks .*, got 2 \+ 3"):
            CudaBackend(group, BufferConfig(**sizes, num_sms=2 + group.rank), runtime)

    LocalCluster(2, device="cpu").run(use)
