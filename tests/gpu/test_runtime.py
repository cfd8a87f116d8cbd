# SPDX-License-Identifier: Apache-2.0
"""``CudaRuntime`` on GPUs: memory, kernels, streams, and the heap within and between processes."""

from __future__ import annotations

import ctypes
import threading
import time

import pytest
import torch
from gpu.runtime import (
    RECORD_BYTES,
    StructParams,
    exchange_in_process,
    launch_signals,
    signal_params,
    view,
)

from deepcomm.backends.cuda.device import CudaRuntime
from deepcomm.errors import CommError, CudaError, InvalidArgument
from deepcomm.testing import LocalCluster, LocalGroup, run_processes

pytestmark = pytest.mark.gpu(1)

MIB = 1 << 20
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def runtime() -> CudaRuntime:
    return CudaRuntime("cuda:0")


def test_runtime_knows_its_device(runtime: CudaRuntime) -> None:
    properties = torch.cuda.get_device_properties(0)
    assert runtime.device == torch.device("cuda", 0)
    assert runtime.num_sms == properties.multi_processor_count


def test_runtime_default_is_torchs_current_device() -> None:
    last = torch.cuda.device_count() - 1
    with torch.cuda.device(last):
        assert CudaRuntime().device.index == last


def test_memory_is_zeroed_and_holds_what_is_uploaded(runtime: CudaRuntime) -> None:
    for _ in range(3):  # the driver gives the same memory again, then dirty
        memory = runtime.memory(3 * MIB + 5)
        bytes_ = view(memory.address, memory.num_bytes, 0)
        assert not bytes_.any()
        bytes_.fill_(0xEE)
        torch.cuda.synchronize()
        del bytes_, memory
    content = bytes(range(256)) * 5
    uploaded = runtime.upload(content)
    assert bytes(view(uploaded.address, len(content), 0).cpu().numpy()) == content


def test_host_memory_is_seen_by_both(runtime: CudaRuntime) -> None:
    memory = runtime.host_memory(4096)
    host = (ctypes.c_uint8 * 4096).from_address(memory.address)
    assert not any(host)
    view(memory.device_address, 4096, 0).fill_(7)
    torch.cuda.synchronize()
    assert set(host) == {7}


def test_memory_that_does_not_fit_is_refused_with_sizes(runtime: CudaRuntime) -> None:
    def use(group: LocalGroup) -> None:
        with pytest.raises(CudaError, match=r"cuMemCreate failed: 2 CUDA_ERROR_OUT_OF_MEMORY.*MiB"):
            runtime.symmetric_memory(group, 1 << 42, TIMEOUT_S)

    LocalCluster(1, device="cuda:0").run(use)
    assert runtime.memory(16).num_bytes == 16  # the context still works


def exchange_words(group: LocalGroup, runtime: CudaRuntime) -> tuple[int, ...]:
    """Write a word into each peer's block; return what the peers have written into the own one."""
    heap = runtime.symmetric_memory(group, 3 * MIB, TIMEOUT_S)
    index = runtime.device.index
    own = view(heap.bases[group.rank], heap.num_bytes, index)
    assert heap.num_bytes >= 3 * MIB
    assert not own.any()
    group.barrier()
    for peer, base in enumerate(heap.bases):
        view(base + group.rank, 1, index).fill_(100 + 10 * group.rank + peer)
    torch.cuda.current_stream().synchronize()
    group.barrier()
    words = tuple(own[: group.size].tolist())
    del own
    heap.close()
    heap.close()
    return words


@pytest.mark.parametrize("device", ["cuda:0", pytest.param("cuda", marks=pytest.mark.gpu(2))])
def test_heap_is_mapped_by_all_ranks_of_a_process(device: str) -> None:
    ranks = LocalCluster(3, device=device).run(
        lambda group: exchange_words(group, CudaRuntime(torch.device("cuda")))
    )
    assert ranks == [tuple(100 + 10 * src + dst for src in range(3)) for dst in range(3)]


def test_heap_of_one_rank_needs_no_peer(runtime: CudaRuntime) -> None:
    assert LocalCluster(1).run(lambda group: exchange_words(group, runtime)) == [(100,)]


def test_heap_memory_comes_back(runtime: CudaRuntime) -> None:
    def use(group: LocalGroup) -> int:
        torch.cuda.synchronize()
        before, _ = torch.cuda.mem_get_info()
        for _ in range(5):
            heap = runtime.symmetric_memory(group, 512 * MIB, TIMEOUT_S)
            capsule = heap.lease(0, 0, 16)
            heap.close()
            del capsule, heap
        return before - torch.cuda.mem_get_info()[0]

    assert LocalCluster(1).run(use)[0] < 64 * MIB


def test_heap_fails_on_all_ranks_where_it_fails_on_one() -> None:
    def use(group: LocalGroup) -> type[BaseException]:
        runtime = CudaRuntime("cuda:0")
        with pytest.raises((CudaError, CommError)) as caught:
            runtime.symmetric_memory(group, 1 << 42 if group.rank == 1 else MIB, TIMEOUT_S)
        return caught.type

    assert LocalCluster(3, device="cuda:0").run(use) == [CommError, CudaError, CommError]


def test_lease_keeps_the_memory_and_counts(runtime: CudaRuntime) -> None:
    def use(group: LocalGroup) -> None:
        heap = runtime.symmetric_memory(group, MIB, TIMEOUT_S)
        view(heap.bases[0] + 256, 16, 0).fill_(9)
        leased = torch.from_dlpack(heap.lease(2, 256, 16))
        unused = heap.lease(2, 0, 16)
        assert leased.device == runtime.device
        assert leased.dtype == torch.uint8
        assert (heap.num_leases(2), heap.num_leases(1)) == (2, 0)
        del unused
        assert heap.num_leases(2) == 1
        with pytest.raises(InvalidArgument, match="lease: expected bytes in"):
            heap.lease(0, heap.num_bytes - 8, 16)
        part = leased[3:5]
        del leased
        heap.close()
        assert part.tolist() == [9, 9]
        assert heap.num_leases(2) == 1
        del part
        assert heap.num_leases(2) == 0
        with pytest.raises(InvalidArgument, match="closed"):
            heap.lease(0, 0, 16)

    LocalCluster(1).run(use)


@pytest.mark.parametrize("device", ["cuda:0", pytest.param("cuda", marks=pytest.mark.gpu(2))])
def test_launch_lets_ranks_signal_each_other(device: str) -> None:
    def use(group: LocalGroup) -> int:
        return launch_signals(group, CudaRuntime(torch.device("cuda")), num_rounds=50)

    assert LocalCluster(2, device=device).run(use) == [0, 0]


@pytest.mark.parametrize("num_devices", [1, pytest.param(2, marks=pytest.mark.gpu(2))])
def test_heap_is_mapped_by_processes(num_devices: int) -> None:
    assert run_processes(exchange_in_process, 2, num_devices, timeout_s=150) == [0, 1]


def test_launch_checks_the_size_of_the_params(runtime: CudaRuntime) -> None:
    function = runtime.load("probe_signal", {})
    assert function.name == "probe_signal"
    assert function.max_threads == 256
    assert function.blocks_per_sm >= 1
    with pytest.raises(InvalidArgument, match=r"params: expected the \d+ bytes that"):
        runtime.launch(function, 1, StructParams(ctypes.c_int32(0)))
    with pytest.raises(InvalidArgument, match="grid: expected at least 1 block, got 0"):
        runtime.launch(function, 0, StructParams(ctypes.c_int32(0)))


def test_load_of_an_unknown_kernel_is_refused(runtime: CudaRuntime) -> None:
    with pytest.raises(InvalidArgument, match="kernel: expected one of"):
        runtime.load("nothing", {})


def test_record_of_a_lonely_rank_ends_the_wait(runtime: CudaRuntime) -> None:
    def use(group: LocalGroup) -> None:
        heap = runtime.symmetric_memory(group, MIB, TIMEOUT_S)
        record = runtime.host_memory(RECORD_BYTES)
        word = runtime.host_memory(8)
        sums = runtime.memory(64)
        function = runtime.load("probe_signal", {})
        # It hears from rank 1, whom nobody plays.
        bases = [heap.bases[0], heap.bases[0] + MIB // 2]
        params = signal_params(
            bases,
            rank=0,
            num_rounds=1,
            record=record.device_address,
            timeout_s=0.2,
            sums=sums.address,
        )
        runtime.launch(function, 1, params)
        start = time.monotonic()
        assert not runtime.wait_word(word.address, 1, record.address, 30.0)
        assert time.monotonic() - start < 10
        torch.cuda.current_stream().synchronize()
        heap.close()

    LocalCluster(1).run(use)


def test_wait_word_sees_a_value_and_gives_up(runtime: CudaRuntime) -> None:
    record, word = runtime.host_memory(RECORD_BYTES), runtime.host_memory(8)
    assert runtime.wait_word(word.address, 0, record.address, 0.0)
    assert not runtime.wait_word(word.address, 1, record.address, 0.05)
    torch.cuda._sleep(200_000_000)  # about 0.1 s
    view(word.device_address, 1, 0).fill_(1)
    assert runtime.wait_word(word.address, 1, record.address, 10.0)


def test_wait_word_lets_other_threads_run(runtime: CudaRuntime) -> None:
    record, word = runtime.host_memory(RECORD_BYTES), runtime.host_memory(8)
    host = ctypes.c_uint64.from_address(word.address)

    def write() -> None:
        time.sleep(0.05)
        host.value = 3

    writer = threading.Thread(target=write)
    writer.start()
    assert runtime.wait_word(word.address, 3, record.address, 10.0)
    writer.join()


def test_event_finds_errors_in_synchronize(runtime: CudaRuntime) -> None:
    def check() -> None:
        raise CommError("found on the device", 1)

    torch.cuda._sleep(200_000_000)
    event = runtime.record_event(check)
    assert not event.query()
    with pytest.raises(CommError, match="found on the device"):
        event.synchronize()
    assert event.query()
    runtime.record_event().synchronize()


def test_on_stream_orders_with_the_current_stream(runtime: CudaRuntime) -> None:
    values = torch.zeros(1 << 20, device=runtime.device)
    before = torch.cuda.current_stream(runtime.device)
    torch.cuda._sleep(100_000_000)
    values.fill_(1)
    with runtime.on_stream(None):
        inside = torch.cuda.current_stream(runtime.device)
        assert inside != before
        assert inside.priority < 0
        values.add_(1)
        runtime.keep_alive(values)
        event = runtime.record_event()
    assert torch.cuda.current_stream(runtime.device) == before
    runtime.wait_event(event)
    assert bool((values == 2).all())
    with runtime.on_stream(event):
        assert torch.cuda.current_stream(runtime.device) == inside
    assert bool((values == 2).all())


def test_is_capturing_says_whether_a_graph_records(runtime: CudaRuntime) -> None:
    assert not runtime.is_capturing()
    values = torch.zeros(4, device=runtime.device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert runtime.is_capturing()
        with runtime.on_stream(None):
            assert runtime.is_capturing()
            values.add_(1)
            event = runtime.record_event()
        runtime.wait_event(event)
    assert not runtime.is_capturing()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert values.tolist() == [3.0] * 4


def test_local_cluster_gives_each_rank_a_stream() -> None:
    def use(group: LocalGroup) -> tuple[int, int]:
        group.barrier()
        stream = torch.cuda.current_stream()
        return stream.cuda_stream, torch.cuda.current_device()

    streams = LocalCluster(4, device="cuda:0").run(use)
    assert len({stream for stream, _ in streams}) == 4
    assert 0 not in {stream for stream, _ in streams}
    count = torch.cuda.device_count()
    assert [device for _, device in LocalCluster(4).run(use)] == [rank % count for rank in range(4)]
