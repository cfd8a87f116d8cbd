# SPDX-License-Identifier: Apache-2.0
"""``LocalCluster``: where its ranks are, what they run on, and what the driver is told before."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda.library import FakeCuda

from deepcomm._C import cuda
from deepcomm.backends.cuda import driver as drivers
from deepcomm.errors import InvalidArgument
from deepcomm.testing import LocalCluster, LocalGroup, local_devices
from deepcomm.testing.local_devices import ENVIRONMENT, place_ranks


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Let torch have the devices of a driver without a GPU."""
    fake = FakeCuda()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(drivers, "default_driver", fake.driver)
    return fake


def indices(device: torch.device | str | None, num_ranks: int) -> list[int | None]:
    return [place and place.index for place in place_ranks(device, num_ranks)]


def environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_ranks_on_cpus_leave_the_environment_alone(device: Any) -> None:
    assert place_ranks(device, 2) == (None, None)
    assert environment() == {}


def test_ranks_are_on_cpus_where_torch_knows_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version in (None, "13.0"):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert place_ranks(None, 2) == (None, None)
    with pytest.raises(InvalidArgument, match="one of torch's 0 CUDA devices, got cuda"):
        place_ranks("cuda", 2)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("device", "expected"),
    [(None, [0, 1, 0]), ("cuda", [0, 1, 0]), ("cuda:1", [1, 1, 1]), ("cuda:0", [0, 0, 0])],
)
def test_ranks_are_on_gpus(
    caplog: pytest.LogCaptureFixture, device: str | None, expected: list[int]
) -> None:
    assert indices(device, 3) == expected
    assert environment() == ENVIRONMENT
    assert indices(device, 3) == expected, "a second cluster"
    assert caplog.messages == []


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:2", "one of torch's 2 CUDA devices, got cuda:2"), ("meta", "cpu or cuda, got meta")],
)
def test_devices_that_are_not_there_are_refused(device: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"device: expected {message}"):
        LocalCluster(2, device=device)


def test_context_that_exists_already_is_warned_of(
    fake: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    device = cuda.Device(fake.driver(), 1)
    with caplog.at_level(logging.WARNING, "deepcomm"):
        place_ranks("cuda:1", 2)
    assert environment() == {}, "it would say what does not hold"
    assert [message.split(":")[1].split()[:3] for message in caplog.messages] == [
        [name, "is", "unset"] for name in ENVIRONMENT
    ]
    assert "cuda:1 is in use already" in caplog.messages[0]
    del device


@pytest.mark.usefixtures("fake")
def test_value_of_the_user_is_kept_and_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with caplog.at_level(logging.WARNING, "deepcomm"):
        place_ranks(None, 2)
    assert environment() == {**ENVIRONMENT, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    (message,) = caplog.messages
    assert "CUDA_DEVICE_MAX_CONNECTIONS is 1 (set by somebody else)" in message
    assert "set it to 32 before CUDA is first used" in message


@pytest.mark.usefixtures("fake")
def test_each_rank_has_a_device_and_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    seen: dict[int, list[Any]] = {}

    class Stream:
        def __init__(self, handle: int, index: int) -> None:
            self.handle, self.index, self.waits = handle, index, 0
            made.append(self)

        def synchronize(self) -> None:
            self.waits += 1

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    def use(group: LocalGroup) -> int:
        group.barrier()
        return group.rank

    pool = drivers.StreamPool(lambda device, priority: len(made) + 100 * device + priority)
    monkeypatch.setattr(drivers, "stream_pool", lambda: pool)
    monkeypatch.setattr(drivers, "wrap_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: seen.setdefault(device.index, []).append(device)
    )
    assert LocalCluster(3).run(use) == [0, 1, 2]
    assert {index: len(devices) for index, devices in seen.items()} == {0: 2, 1: 1}
    assert sorted(stream.index for stream in made) == [0, 0, 1]
    assert [stream.waits for stream in made] == [1, 1, 1]


def test_current_device_of_a_cpu_rank_is_nothing() -> None:
    was_initialized = torch.cuda.is_initialized()
    with local_devices.current_device(None):
        assert torch.cuda.is_initialized() == was_initialized


def test_runtime_is_made_in_each_ranks_thread() -> None:
    made: list[tuple[int, int]] = []

    def make(rank: int, size: int) -> Any:
        made.append((rank, size))
        return SimpleNamespace(rank=rank)

    ranks = LocalCluster(3, runtime=make).run(lambda group: group.runtime.rank)  # type: ignore[union-attr]
    assert ranks == [0, 1, 2]
    assert sorted(made) == [(0, 3), (1, 3), (2, 3)]
    assert LocalCluster(1, device="cpu").run(lambda group: group.runtime) == [None]


def test_runtime_that_cannot_be_made_fails_the_run() -> None:
    def make(rank: int, _: int) -> Any:
        if rank == 1:
            raise InvalidArgument("no machine")
        return None

    with pytest.raises(InvalidArgument, match="no machine"):
        LocalCluster(2, runtime=make).run(lambda group: group.barrier())
