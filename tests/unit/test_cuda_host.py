# SPDX-License-Identifier: Apache-2.0
"""The owners of the CUDA backend's host layer, over a driver without a GPU."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
from fake_cuda.library import FakeCuda

from deepcomm._C import cuda, kernels
from deepcomm.errors import CudaError, InvalidArgument

OUT_OF_MEMORY = 2
COMPLETE = 2  # RecordState::kComplete


@pytest.fixture
def fake() -> FakeCuda:
    return FakeCuda()


def content(address: int, num_bytes: int) -> bytes:
    return bytes((ctypes.c_uint8 * num_bytes).from_address(address))


def test_driver_is_absent_only_where_it_is_used() -> None:
    with pytest.raises(CudaError, match=r"libnone\.so cannot be opened: .*NVIDIA driver"):
        cuda.Driver("libnone.so")


def test_driver_without_the_finder_is_too_old() -> None:
    with pytest.raises(CudaError, match=r"libc\.so\.6: expected a driver of CUDA 12\.0 or newer"):
        cuda.Driver("libc.so.6")


def test_driver_without_a_function_is_too_old(fake: FakeCuda) -> None:
    fake.hide("cuMemCreate")
    with pytest.raises(CudaError, match=r"CUDA 12\.0 or newer, got one without cuMemCreate"):
        fake.driver()


def test_driver_that_does_not_start_says_so(fake: FakeCuda) -> None:
    fake.fail_call("cuInit", 100)
    message = r"^cuInit\(0\) failed: 100 CUDA_ERROR_FAKE \(as the test wants it\)$"
    with pytest.raises(CudaError, match=message):
        fake.driver()


def test_driver_describes_devices(fake: FakeCuda) -> None:
    driver = fake.driver()
    assert (driver.version, driver.num_devices) == (13000, 2)
    assert driver.device_name(1) == "Fake GPU"
    assert driver.device_uuid(1) == "d1" * 16
    assert driver.attribute(0, cuda.POSIX_FD_SUPPORTED) == 1
    assert driver.can_access_peer(0, 1)
    assert not driver.has_context(0)
    device = cuda.Device(driver, 1)
    assert driver.has_context(1)
    assert (device.index, device.label) == (1, "cuda:1 (Fake GPU)")
    assert (device.capability, device.num_sms, device.uuid) == (90, 4, "d1" * 16)


@pytest.mark.parametrize("index", [-1, 2])
def test_device_out_of_range_is_refused(fake: FakeCuda, index: int) -> None:
    with pytest.raises(InvalidArgument, match=f"one of 2 CUDA devices, got {index}"):
        cuda.Device(fake.driver(), index)


def test_device_without_virtual_memory_is_refused(fake: FakeCuda) -> None:
    fake.set_attribute(0, cuda.VIRTUAL_MEMORY_SUPPORTED, 0)
    with pytest.raises(CudaError, match=r"cuda:0 \(Fake GPU\): expected .*virtual memory"):
        cuda.Device(fake.driver(), 0)


@pytest.mark.parametrize("refused_by", [None, "cuMemCreate", "cuMemExportToShareableHandle"])
def test_device_has_fabric_handles_where_a_trial_succeeds(
    fake: FakeCuda, refused_by: str | None
) -> None:
    driver = fake.driver()
    assert not cuda.Device(driver, 0).has_fabric
    assert fake.num_calls("cuMemCreate") == 0, "no trial without the attribute"
    fake.set_attribute(0, cuda.FABRIC_SUPPORTED, 1)
    if refused_by is not None:
        fake.fail_call(refused_by, 800)
    assert cuda.Device(driver, 0).has_fabric == (refused_by is None)
    assert fake.live() == {}


def test_device_memory_is_zeroed_and_filled(fake: FakeCuda) -> None:
    memory = cuda.DeviceMemory(cuda.Device(fake.driver(), 0), 1000)
    assert memory.num_bytes == 1000
    assert content(memory.address, 1000) == bytes(1000)
    memory.fill(b"abc")
    assert content(memory.address, 4) == b"abc\0"
    with pytest.raises(InvalidArgument, match="content: expected at most 1000 bytes, got 1001"):
        memory.fill(bytes(1001))
    del memory
    assert fake.live() == {}


def test_host_memory_is_zeroed(fake: FakeCuda) -> None:
    memory = cuda.HostMemory(cuda.Device(fake.driver(), 0), 100)
    assert content(memory.address, 100) == bytes(100)
    assert memory.device_address == memory.address
    del memory
    assert fake.live() == {}


@pytest.mark.parametrize("kind", [cuda.DeviceMemory, cuda.HostMemory, cuda.SymmetricHeap])
def test_memory_of_no_size_is_refused(fake: FakeCuda, kind: Callable[..., object]) -> None:
    device = cuda.Device(fake.driver(), 0)
    with pytest.raises(InvalidArgument, match="num_bytes: expected more than 0, got 0"):
        kind(device, 0)


def test_heap_that_does_not_fit_says_how_much_there_is(fake: FakeCuda) -> None:
    device = cuda.Device(fake.driver(), 0)
    fake.fail_call("cuMemCreate", OUT_OF_MEMORY)
    message = (
        r"^cuMemCreate failed: 2 CUDA_ERROR_OUT_OF_MEMORY \(out of memory\); "
        r"cuda:0 \(Fake GPU\): 5 MiB needed, 3 of 8 MiB free$"
    )
    with pytest.raises(CudaError, match=message):
        cuda.SymmetricHeap(device, 5 << 20)


def test_heap_maps_the_same_memory_twice(fake: FakeCuda) -> None:
    driver = fake.driver()
    mine, peers = (cuda.SymmetricHeap(cuda.Device(driver, index), 100) for index in range(2))
    assert mine.num_bytes == 1 << 16, "rounded up to the granularity"
    base = mine.map(peers.memory)
    assert base not in (mine.base, peers.base)
    ctypes.c_uint8.from_address(base + 77).value = 5
    assert content(peers.base + 76, 3) == b"\0\5\0"
    peers.close([])
    assert content(base + 77, 1) == b"\5", "a mapping keeps the memory"
    mine.close([])
    assert fake.live() == {"context": 2, "stream": 2}


def test_heap_joins_a_mapping(fake: FakeCuda) -> None:
    driver = fake.driver()
    mine, peers = (cuda.SymmetricHeap(cuda.Device(driver, index), 100) for index in range(2))
    assert mine.join(peers.mapping) == peers.base, "one address of one memory in a process"
    assert fake.num_calls("cuMemMap") == 2
    assert fake.num_calls("cuMemSetAccess") == 3
    base = peers.base
    peers.close([])
    assert content(base, 1) == b"\0", "the mapping is still used"
    mine.close([])
    assert fake.live() == {"context": 2, "stream": 2}
    assert peers.mapping is None


def test_heap_maps_an_exported_descriptor(fake: FakeCuda) -> None:
    device = cuda.Device(fake.driver(), 0)
    heap = cuda.SymmetricHeap(device, 100)
    descriptor = heap.memory.export_fd()
    imported = cuda.PhysicalMemory.import_fd(device, descriptor, heap.num_bytes)
    os.close(descriptor)
    ctypes.c_uint8.from_address(heap.map(imported)).value = 9
    assert content(heap.base, 1) == b"\x09"
    assert imported.num_bytes == heap.num_bytes
    with pytest.raises(InvalidArgument, match="fabric: expected 64 bytes, got 3"):
        cuda.PhysicalMemory.import_fabric(device, b"abc", heap.num_bytes)


def test_heap_closes_once(fake: FakeCuda) -> None:
    heap = cuda.SymmetricHeap(cuda.Device(fake.driver(), 0), 100)
    memory = heap.memory
    for _ in range(2):
        heap.close([1, 2])
        assert heap.base == 0
    assert fake.num_calls("cuStreamSynchronize") == 3, "two streams, and one to zero the memory"
    with pytest.raises(InvalidArgument, match="map: expected an open heap"):
        heap.map(memory)
    with pytest.raises(InvalidArgument, match="lease: expected an open heap"):
        heap.lease(0, 0, 1)
    del memory, heap
    assert fake.live() == {}


def test_lease_keeps_the_mappings(fake: FakeCuda) -> None:
    heap = cuda.SymmetricHeap(cuda.Device(fake.driver(), 0), 100)
    first, second = heap.lease(1, 0, 8), heap.lease(1, 8, 8)
    assert [heap.num_leases(generation) for generation in range(3)] == [0, 2, 0]
    del first
    assert heap.num_leases(1) == 1
    heap.close([1])
    assert fake.live()["mapping"] == 1
    del second
    assert heap.num_leases(1) == 0
    assert "mapping" not in fake.live()
    assert fake.num_calls("cuStreamSynchronize") == 2, "work of the stream was waited for"


def test_lease_describes_bytes_of_the_device(fake: FakeCuda) -> None:
    heap = cuda.SymmetricHeap(cuda.Device(fake.driver(), 1), 100)
    capsule = heap.lease(0, 16, 24)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = pointer(capsule, b"dltensor")
    data, device_type, device_id, num_dims = (
        kind.from_address(tensor + offset).value
        for kind, offset in (
            (ctypes.c_uint64, 0),
            (ctypes.c_int32, 8),
            (ctypes.c_int32, 12),
            (ctypes.c_int32, 16),
        )
    )
    assert (data, device_type, device_id, num_dims) == (heap.base + 16, 2, 1, 1)


@pytest.mark.parametrize(("offset", "num_bytes"), [(-1, 1), (0, -1), (1 << 16, 1), (1, 1 << 16)])
def test_lease_out_of_range_is_refused(fake: FakeCuda, offset: int, num_bytes: int) -> None:
    heap = cuda.SymmetricHeap(cuda.Device(fake.driver(), 0), 100)
    with pytest.raises(InvalidArgument, match=r"lease: expected bytes in \[0, 65536\)"):
        heap.lease(0, offset, num_bytes)


def use_everything(fake: FakeCuda) -> None:
    """Make one of each, and let go of all."""
    driver = fake.driver()
    device = cuda.Device(driver, 0)
    memories = [cuda.DeviceMemory(device, 10), cuda.HostMemory(device, 10)]
    memories[0].fill(b"abc")  # type: ignore[union-attr]
    heap, peers = cuda.SymmetricHeap(device, 10), cuda.SymmetricHeap(device, 10)
    heap.map(peers.memory)
    heap.join(peers.mapping)
    descriptor = peers.memory.export_fd()
    try:
        heap.map(cuda.PhysicalMemory.import_fd(device, descriptor, peers.num_bytes))
    finally:
        os.close(descriptor)
    function = cuda.Function(device, b"cubin", "symbol", 0, 0, True)
    function.spread_over(4)
    kernels.LowLatencyMaskParams().launch(function, 1, 0)


def test_nothing_is_left_whatever_call_fails(fake: FakeCuda) -> None:
    descriptors = open_descriptors()
    num_calls = 0
    fake.fail_after(num_calls)
    while error := failure_of(use_everything, fake):
        assert "failed: 999" in str(error)
        assert fake.live() == {}, f"after {error}"
        num_calls += 1
        fake.fail_after(num_calls)
    assert not fake.has_failed(), "a failure went unnoticed"
    assert num_calls > 35, "each call has failed once"
    assert fake.live() == {}
    assert open_descriptors() == descriptors


def failure_of(function: Callable[[FakeCuda], None], fake: FakeCuda) -> CudaError | None:
    try:
        function(fake)
    except CudaError as error:
        return error.with_traceback(None)
    return None


def open_descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names only


def test_destructors_report_failures_and_go_on(
    fake: FakeCuda, capfd: pytest.CaptureFixture[str]
) -> None:
    device = cuda.Device(fake.driver(), 0)
    memory, heap = cuda.DeviceMemory(device, 10), cuda.SymmetricHeap(device, 10)
    fake.fail_call("cuCtxPushCurrent", 709)
    fake.fail_call("cuStreamSynchronize", 719)
    heap.close([1])
    del memory
    cuda.free_put_off()
    error = capfd.readouterr().err
    assert "deepcomm: cuCtxPushCurrent(device.context_) failed: 709" in error
    assert "deepcomm: cuStreamSynchronize(stream) failed: 719" in error
    assert "mapping" not in fake.live()


class Words:
    """A word and an error record."""

    def __init__(self) -> None:
        self.word = ctypes.c_uint64(0)
        self.record = (ctypes.c_uint32 * 16)()

    def wait(self, expected: int, timeout_s: float) -> bool:
        addresses = ctypes.addressof(self.word), ctypes.addressof(self.record)
        return cuda.wait_word(addresses[0], expected, addresses[1], timeout_s)


def test_wait_word_returns_at_once_or_gives_up() -> None:
    words = Words()
    words.word.value = 1 << 40
    assert words.wait(1 << 40, 0.0)
    start = time.monotonic()
    assert not words.wait(0, 0.1)
    assert 0.1 <= time.monotonic() - start < 5


@pytest.mark.parametrize("delay_s", [0.0, 0.02])
def test_wait_word_lets_other_threads_write(delay_s: float) -> None:
    words = Words()

    def write() -> None:
        time.sleep(delay_s)
        words.word.value = 3

    writer = threading.Thread(target=write)
    writer.start()
    assert words.wait(3, 30.0)
    writer.join()


def test_wait_word_ends_with_a_complete_record() -> None:
    words = Words()
    words.record[0] = COMPLETE - 1
    assert not words.wait(1, 0.05)
    writer = threading.Timer(0.05, words.record.__setitem__, (0, COMPLETE))
    writer.start()
    start = time.monotonic()
    assert not words.wait(1, 30.0)
    assert time.monotonic() - start < 10
    words.word.value = 1
    assert words.wait(1, 30.0), "the word was there all the same"


def test_wait_word_can_be_interrupted() -> None:
    # Shells start what runs in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            Words().wait(1, 30.0)
    finally:
        signal.signal(signal.SIGINT, before)


def test_extension_is_usable_without_a_driver() -> None:
    program = (
        "import deepcomm, deepcomm.backends.cuda.device, deepcomm._C as c, os\n"
        "assert 'libcuda' not in open('/proc/self/maps').read()\n"
        "print(len(dir(c.cuda)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
