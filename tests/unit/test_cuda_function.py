# SPDX-License-Identifier: Apache-2.0
"""Kernels, loaded and launched over a driver without a GPU."""

from __future__ import annotations

import pytest
from fake_cuda.library import FakeCuda

from deepcomm._C import cuda, kernels
from deepcomm.errors import CudaError, InvalidArgument

SM_SHARED_BYTES, RESERVED_SHARED_BYTES = 81, 111  # attributes of a device
STATIC_SHARED_BYTES = 512  # of the driver's kernels


@pytest.fixture
def fake() -> FakeCuda:
    return FakeCuda()


def load(fake: FakeCuda, max_threads: int = 256) -> cuda.Function:
    device = cuda.Device(fake.driver(), 0)
    return cuda.Function(device, b"cubin", "kernel_symbol", 48, max_threads, False)


def params_of_16_bytes(first_word: int = 0) -> kernels.LowLatencyMaskParams:
    params = kernels.LowLatencyMaskParams()
    params.rank_mask = first_word
    return params


@pytest.mark.parametrize(("max_threads", "expected"), [(256, 256), (0, 1024)])
def test_function_is_loaded_and_launched(fake: FakeCuda, max_threads: int, expected: int) -> None:
    function = load(fake, max_threads)
    assert fake.num_calls("cuFuncLoad") == 1
    assert (function.max_threads, function.blocks_per_sm) == (expected, 2048 // expected)
    params_of_16_bytes(11).launch(function, 7, 0x77)
    assert fake.last_launch() == (7, expected, 48, 0x77, 11, False)
    del function
    assert fake.live() == {}


@pytest.mark.parametrize(
    ("grid", "per_sm"), [(1, 1), (4, 1), (5, 2), (8, 2), (28, 7), (29, 8), (64, 8)]
)
def test_early_launch_takes_memory_for_its_share_of_an_sm(
    fake: FakeCuda, grid: int, per_sm: int
) -> None:
    num_sms, sm_bytes, reserved = 4, 233_472, 1024
    fake.set_attribute(0, SM_SHARED_BYTES, sm_bytes)
    fake.set_attribute(0, RESERVED_SHARED_BYTES, reserved)
    device = cuda.Device(fake.driver(), 0)
    function = cuda.Function(device, b"cubin", "symbol", 48, 256, True)
    function.spread_over(num_sms)
    params_of_16_bytes().launch(function, grid, 0)
    dynamic = fake.last_launch()[2]
    assert function.blocks_per_sm == 8
    if per_sm == 8:  # as many as fit in any case
        assert dynamic == 48
        return
    bytes_of_block = STATIC_SHARED_BYTES + dynamic + reserved
    assert sm_bytes // bytes_of_block == per_sm == -(-grid // num_sms)


@pytest.mark.parametrize(("num_sms", "awaits_ahead"), [(3, True), (4, False), (None, True)])
def test_launches_beside_others_take_no_more_memory_than_they_use(
    fake: FakeCuda, num_sms: int | None, awaits_ahead: bool
) -> None:
    """Blocks of all ranks of a device have to be resident together."""
    fake.set_attribute(0, SM_SHARED_BYTES, 233_472)
    device = cuda.Device(fake.driver(), 0)
    function = cuda.Function(device, b"cubin", "symbol", 48, 256, awaits_ahead)
    if num_sms is not None:
        function.spread_over(num_sms)
    params_of_16_bytes().launch(function, 3, 0)
    assert fake.last_launch()[2] == 48


def test_function_of_a_driver_that_cannot_tell_its_params(fake: FakeCuda) -> None:
    fake.hide("cuFuncLoad")
    fake.hide("cuFuncGetParamInfo")
    kernels.LowLatencyDispatchParams().launch(load(fake), 5, 0)
    assert fake.last_launch()[0] == 5


def test_launch_refuses_what_the_kernel_does_not_take(fake: FakeCuda) -> None:
    function = load(fake)
    with pytest.raises(InvalidArgument, match="expected the 16 bytes that kernel_symbol takes"):
        kernels.LowLatencyDispatchParams().launch(function, 1, 0)
    with pytest.raises(InvalidArgument, match="grid: expected at least 1 block, got 0"):
        params_of_16_bytes().launch(function, 0, 0)
    fake.fail_call("cuLaunchKernelEx", 719)
    message = r"cuLaunchKernelEx failed: 719 .*; kernel_symbol, 3 blocks of 256 threads on cuda:0"
    with pytest.raises(CudaError, match=message):
        params_of_16_bytes().launch(function, 3, 0)


def test_prepared_launch_takes_what_is_there_when_it_is_called(fake: FakeCuda) -> None:
    params, streams = params_of_16_bytes(11), iter([0x77, 0x78])
    launch = params.prepare_launch(load(fake), 7, lambda: next(streams))
    launch()
    assert fake.last_launch() == (7, 256, 48, 0x77, 11, False)
    params.rank_mask = 12
    del params
    launch()
    assert fake.last_launch() == (7, 256, 48, 0x78, 12, False)
    with pytest.raises(StopIteration):
        launch()
    assert fake.num_calls("cuLaunchKernelEx") == 2
    del launch
    assert fake.live() == {}


def test_prepared_launch_raises_what_the_driver_says(fake: FakeCuda) -> None:
    launch = params_of_16_bytes().prepare_launch(load(fake), 3, lambda: 0)
    fake.fail_call("cuLaunchKernelEx", 719)
    with pytest.raises(CudaError, match="cuLaunchKernelEx failed: 719"):
        launch()
