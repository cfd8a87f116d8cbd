# SPDX-License-Identifier: Apache-2.0
"""``CudaRuntime``, streams, and the choice of a backend, over a driver without a GPU."""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda.library import FakeCuda
from fake_nccl.library import FakeNccl
from fake_nccl.ranks import exchange

from deepcomm import jit
from deepcomm._C import cuda, kernels
from deepcomm.backends import base
from deepcomm.backends.cuda import device as devices
from deepcomm.backends.cuda import driver as drivers
from deepcomm.backends.cuda.device import CudaRuntime
from deepcomm.backends.cuda.network import Network
from deepcomm.backends.cuda.network_choice import open_network
from deepcomm.backends.cuda.runtime import Runtime
from deepcomm.errors import CommError, CudaError, InvalidArgument
from deepcomm.event import CudaEvent
from deepcomm.testing import LocalCluster, LocalGroup

STREAM = 0xABC
TIMEOUT_S = 60.0


@dataclass
class FakeCompiler:
    """Compiles nothing, and remembers for what."""

    awaits_ahead: bool = False
    asked: list[tuple[str, str, dict[str, int]]] = field(default_factory=list)

    def compile(self, kernel: jit.Kernel, *, arch: str, spec: dict[str, int], nccl: Any) -> Any:
        assert (nccl is not None) == kernel.uses_nccl
        self.asked.append((kernel.name, arch, spec))
        return SimpleNamespace(
            cubin=b"cubin",
            symbol="symbol",
            shared_bytes=32,
            max_threads=None,
            awaits_ahead=self.awaits_ahead,
            constants={},
        )


@pytest.fixture
def fake() -> FakeCuda:
    return FakeCuda()


@pytest.fixture(autouse=True)
def _stream(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch may be built for CPUs.
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: STREAM, raising=False)


def make(fake: FakeCuda, device: str = "cuda:1", compiler: Any = None) -> CudaRuntime:
    return CudaRuntime(device, driver=fake.driver(), compiler=compiler or FakeCompiler())


def test_runtime_implements_the_protocol(fake: FakeCuda) -> None:
    runtime: Runtime = make(fake)
    members = {name for name in vars(Runtime) if not name.startswith("_")}
    assert members - set(dir(runtime)) == set()
    assert (runtime.device, runtime.num_sms) == (torch.device("cuda", 1), 4)
    runtime.flush()


def test_runtime_makes_memory(fake: FakeCuda) -> None:
    runtime = make(fake)
    memory, uploaded = runtime.memory(64), runtime.upload(b"content")
    assert bytes((ctypes.c_uint8 * 64).from_address(memory.address)) == bytes(64)
    assert bytes((ctypes.c_uint8 * 7).from_address(uploaded.address)) == b"content"
    host = runtime.host_memory(64)
    assert runtime.wait_word(host.address, 0, host.address, 1.0)
    del memory, uploaded, host, runtime
    assert fake.live() == {}


def test_what_waits_for_kernels_is_freed_when_memory_is_reserved(fake: FakeCuda) -> None:
    runtime = make(fake)
    host, function = runtime.host_memory(64), runtime.load(jit.KERNELS[0].name, {})
    del host, function
    live = fake.live(put_off=True)
    assert (live["host memory"], live["module"]) == (1, 1)
    heap = cuda.SymmetricHeap(cuda.Device(fake.driver(), 0), 100)
    assert not {"host memory", "module"} & set(fake.live(put_off=True))
    lease = heap.lease(0, 0, 10)
    heap.close([])
    del lease
    assert fake.live(put_off=True)["mapping"] == 1
    assert "mapping" not in fake.live()


def test_heap_that_nobody_closed_stays_until_kernels_are_done(fake: FakeCuda) -> None:
    runtime = make(fake)
    heap = cuda.SymmetricHeap(cuda.Device(fake.driver(), 0), 100)
    memory = runtime.memory(64)
    del heap, memory
    live = fake.live(put_off=True)
    assert (live["mapping"], live["device memory"]) == (1, 1)
    assert fake.num_calls("cuCtxSynchronize") == 0
    heap = cuda.SymmetricHeap(cuda.Device(fake.driver(), 0), 100)
    live = fake.live(put_off=True)
    assert (live["mapping"], live.get("device memory")) == (1, None)
    assert fake.num_calls("cuCtxSynchronize") > 0
    heap.close([])
    del heap, runtime
    assert fake.live() == {}


@pytest.mark.parametrize(
    ("major", "minor", "arch"), [(9, 0, "sm_90a"), (10, 0, "sm_100a"), (8, 6, "sm_86")]
)
def test_runtime_compiles_for_its_device(fake: FakeCuda, major: int, minor: int, arch: str) -> None:
    fake.set_attribute(1, 75, major)
    fake.set_attribute(1, 76, minor)
    compiler = FakeCompiler()
    runtime = make(fake, compiler=compiler)
    function = runtime.load("probe_signal", {})
    assert compiler.asked == [("probe_signal", arch, {})]
    assert (function.name, function.max_threads, function.blocks_per_sm) == (
        "probe_signal",
        1024,
        2,
    )
    params = kernels.LowLatencyMaskParams()
    params.rank_mask = 21
    runtime.launch(function, 3, params)
    assert fake.last_launch() == (3, 1024, 32, STREAM, 21, False)
    with pytest.raises(InvalidArgument, match=r"kernel: expected one of .*, got 'nothing'"):
        runtime.load("nothing", {})


@pytest.mark.parametrize(("version", "is_early"), [(12030, True), (12020, False)])
def test_kernel_that_awaits_the_one_ahead_is_launched_early(
    fake: FakeCuda, version: int, is_early: bool
) -> None:
    fake.set_driver_version(version)
    runtime = make(fake, compiler=FakeCompiler(awaits_ahead=True))
    runtime.launch(runtime.load("probe_signal", {}), 3, kernels.LowLatencyMaskParams())
    assert fake.last_launch() == (3, 1024, 32, STREAM, 0, is_early)


def test_launch_is_prepared_for_the_current_stream(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def current_stream(index: int) -> int:
        asked.append(index)
        return STREAM + len(asked)

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", current_stream, raising=False)
    runtime = make(fake)
    params = kernels.LowLatencyMaskParams()
    launch = runtime.prepare_launch(runtime.load("probe_signal", {}), 3, params)
    for count in (1, 2):
        launch()
        assert fake.last_launch() == (3, 1024, 32, STREAM + count, 0, False)
    assert asked == [1, 1]


def test_launch_makes_the_context_current_unless_it_is(fake: FakeCuda) -> None:
    runtime = make(fake, "cuda:1")
    function = runtime.load("probe_signal", {})
    params = kernels.LowLatencyMaskParams()
    fake.fail_call("cuCtxPushCurrent", 709)
    try:
        fake.make_current(1)
        runtime.launch(function, 3, params)
        assert fake.last_launch()[0] == 3
        for device in (0, None):
            fake.make_current(device)
            with pytest.raises(CudaError, match=r"cuCtxPushCurrent.* failed: 709"):
                runtime.launch(function, 4, params)
    finally:
        fake.make_current(None)


def test_runtime_shares_a_heap(fake: FakeCuda) -> None:
    def use(group: LocalGroup) -> None:
        memory = make(fake, f"cuda:{group.rank}").symmetric_memory(group, 100, TIMEOUT_S)
        assert memory.num_bytes == 1 << 16
        ctypes.c_uint8.from_address(memory.bases[1 - group.rank]).value = 7
        group.barrier()
        assert ctypes.c_uint8.from_address(memory.bases[group.rank]).value == 7
        lease = memory.lease(2, 0, 8)
        assert memory.num_leases(2) == 1
        del lease
        group.barrier()
        memory.close()
        memory.close()

    LocalCluster(2, device="cpu").run(use)
    assert fake.live() == {}


def test_runtime_moves_bytes_to_peers(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nccl = FakeNccl()
    monkeypatch.setattr(
        devices, "open_network", functools.partial(open_network, library=fake_nccl.library)
    )

    def use(group: LocalGroup) -> None:
        network: Network = make(fake, f"cuda:{group.rank}").network(group, TIMEOUT_S, 7, ("nccl",))
        exchange(group, network, (10, 1000))
        network.close()

    LocalCluster(2, device="cpu").run(use)
    asked = fake_nccl.asked()
    assert (asked.stream, asked.traffic_class) == (STREAM, 7)
    assert fake.live() == {}
    assert fake_nccl.num_live() == 0


def test_many_threads_make_owners_at_once(fake: FakeCuda) -> None:
    def make_and_drop(group: LocalGroup) -> None:
        driver = fake.driver()
        for _ in range(400):
            assert len([cuda.Device(driver, group.rank % 2) for _ in range(100)]) == 100

    LocalCluster(4, device="cpu").run(make_and_drop)
    assert fake.live() == {}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_runtime_refuses_other_devices(fake: FakeCuda, device: str) -> None:
    with pytest.raises(InvalidArgument, match=f"device: expected a CUDA device, got {device}"):
        make(fake, device)


def test_runtime_without_a_driver_or_a_compiler_says_so(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler() -> jit.KernelCompiler:
        raise jit.CompilerMissing("CuPy is not installed; pip install")

    monkeypatch.setattr(jit, "default_compiler", no_compiler)
    with pytest.raises(jit.CompilerMissing, match="CuPy is not installed; pip install"):
        CudaRuntime("cuda:0", driver=fake.driver())

    def no_driver() -> Any:
        raise CudaError("libcuda.so.1 cannot be opened")

    monkeypatch.setattr(devices, "default_driver", no_driver)
    with pytest.raises(CudaError, match=r"libcuda\.so\.1 cannot be opened"):
        CudaRuntime("cuda:0")


def test_runtime_shows_ranges_to_profilers(fake: FakeCuda) -> None:
    runtime = make(fake)
    for call in (lambda: runtime.push_range("deepcomm.outer"), runtime.pop_range):
        if torch.version.cuda is not None:
            call()
            continue
        with pytest.raises(RuntimeError, match="NVTX functions not installed"):
            call()


@pytest.mark.parametrize(
    ("depth", "environment", "shows"),
    [
        (-2, {}, False),
        (-2, {"NVTX_INJECTION64_PATH": "tool.so"}, True),  # some tools return that, too
        (0, {}, True),
    ],
)
def test_ranges_are_shown_where_there_may_be_a_profiler(
    fake: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    depth: int,
    environment: dict[str, str],
    shows: bool,
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(devices, "PUSH_RANGE", lambda name: calls.append(name) or depth)
    monkeypatch.setattr(devices, "POP_RANGE", lambda: calls.append(None))
    monkeypatch.delenv("NVTX_INJECTION64_PATH", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    devices.may_have_profiler.cache_clear()
    try:
        assert make(fake).shows_ranges is make(fake).shows_ranges is shows
    finally:
        devices.may_have_profiler.cache_clear()
    assert calls == ["deepcomm", None]


def test_default_driver_is_opened_once(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = fake.driver()
    monkeypatch.setattr(drivers.cuda, "Driver", lambda: driver)
    drivers.default_driver.cache_clear()
    try:
        assert drivers.default_driver() is drivers.default_driver() is driver
        monkeypatch.setattr(drivers, "stream_pool", drivers.stream_pool.__wrapped__)
        pool = drivers.stream_pool()
        first, second = pool.take(0, -5), pool.take(0, -5)
        assert first != second
        pool.give_back(0, -5, first)
        assert pool.take(1, -5) not in (first, second)
        assert pool.take(0, 0) not in (first, second)
        assert pool.take(0, -5) == first
    finally:
        drivers.default_driver.cache_clear()


@dataclass
class FakeEvent:
    done: bool = False

    def synchronize(self) -> None:
        self.done = True

    def query(self) -> bool:
        return self.done


def test_event_raises_what_the_work_has_found() -> None:
    def check() -> None:
        raise CommError("rank 3 is gone", 3)

    event = CudaEvent(FakeEvent(), torch.device("cuda", 0), check)  # type: ignore[arg-type]
    assert not event.query()
    with pytest.raises(CommError, match="rank 3 is gone"):
        event.synchronize()
    assert event.query()
    CudaEvent(FakeEvent(), torch.device("cuda", 0)).synchronize()  # type: ignore[arg-type]


class RecordingBackend:
    """Stands in for the backend: what it was made of."""

    def __init__(self, group: Any, config: Any, runtime: Any) -> None:
        self.made_of = (group, config, runtime)


@pytest.fixture
def _backend(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("deepcomm.backends.cuda.backend")
    module.CudaBackend = RecordingBackend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("_backend")
def test_open_backend_uses_the_runtime_of_the_group() -> None:
    def use(group: LocalGroup) -> tuple[Any, ...]:
        backend: Any = base.open_backend(group, "config", None)  # type: ignore[arg-type]
        assert backend.made_of == (group, "config", group.runtime)
        return backend.made_of[2]

    runtimes: Any = lambda rank, size: f"runtime {rank} of {size}"  # noqa: E731
    assert LocalCluster(2, runtime=runtimes).run(use) == ["runtime 0 of 2", "runtime 1 of 2"]


@pytest.mark.usefixtures("_backend")
def test_open_backend_makes_a_runtime_of_a_device(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "default_driver", fake.driver)
    monkeypatch.setattr(jit, "default_compiler", FakeCompiler)

    def use(group: LocalGroup) -> Any:
        backend: Any = base.open_backend(group, "config", "cuda:1")  # type: ignore[arg-type]
        return backend.made_of[2].device

    assert LocalCluster(2, device="cpu").run(use) == [torch.device("cuda", 1)] * 2


@pytest.mark.usefixtures("_backend")
def test_open_backend_fails_on_all_ranks(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "default_driver", fake.driver)
    monkeypatch.setattr(jit, "default_compiler", FakeCompiler)

    def use(group: LocalGroup) -> str:
        with pytest.raises((InvalidArgument, CommError)) as caught:
            base.open_backend(group, "config", f"cuda:{2 * group.rank}")  # type: ignore[arg-type]
        return str(caught.value)

    first, second = LocalCluster(2, device="cpu").run(use)
    assert second == "device: expected one of 2 CUDA devices, got 2"
    assert first == f"Buffer: rank 0: rank 1 failed: {second}"


def test_open_backend_refuses_other_devices() -> None:
    with pytest.raises(InvalidArgument, match="device: expected cpu or cuda, got meta"):
        LocalCluster(1, device="cpu").run(lambda group: base.open_backend(group, None, "meta"))  # type: ignore[arg-type]
