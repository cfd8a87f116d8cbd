# SPDX-License-Identifier: Apache-2.0
"""How outputs of low-latency operations are allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepcomm._C import kernels
from deepcomm.backends.cuda.low_latency_tensors import empty, seen_as


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("strides", [None, (12, 1, 3)])
def test_allocation_gives_what_was_asked_for(
    dtype: torch.dtype, strides: tuple[int, ...] | None
) -> None:
    allocate = empty((2, 3, 4), dtype, torch.device("cpu"), strides)
    first, second = allocate(), allocate()
    expected = torch.empty_strided((2, 3, 4), strides or (12, 4, 1), dtype=dtype)
    for tensor in (first, second):
        assert (tensor.shape, tensor.stride()) == (expected.shape, expected.stride())
        assert (tensor.dtype, tensor.device) == (expected.dtype, expected.device)
        assert tensor.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("name", ["_empty_strided_cpu", "_dynamo"])
def test_allocation_does_without_the_function_of_compiled_code(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = torch._C if name == "_dynamo" else torch._C._dynamo.guards
    monkeypatch.delattr(owner, name)
    tensor = empty((2, 3), torch.int32, torch.device("cpu"))()
    assert (tensor.shape, tensor.stride(), tensor.dtype) == ((2, 3), (3, 1), torch.int32)


@pytest.mark.parametrize("lacks", [None, "_reinterpret_tensor"])
def test_allocation_may_be_seen_in_another_shape(
    lacks: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacks is not None:
        monkeypatch.delattr(torch._C._dynamo.guards, lacks)
    strides = (12, 1, 4)
    whole = empty((2, 4, 3), torch.float32, torch.device("cpu"), strides)
    held: list[torch.Tensor] = []

    def allocate() -> torch.Tensor:
        held.append(whole().fill_(7))
        return held[-1]

    make = seen_as(allocate, (2, 1, 3), strides)
    first, second = make(), make()
    assert (first.shape, first.stride()) == ((2, 1, 3), strides)
    assert [tensor.data_ptr() for tensor in (first, second)] == [each.data_ptr() for each in held]
    held.clear()
    second.zero_()
    assert first.tolist() == [[[7.0] * 3]] * 2
    assert first.untyped_storage().nbytes() == 4 * 24  # readers of whole columns find them


@pytest.mark.parametrize(("current", "expected"), [(1, "here"), (0, "anywhere")])
def test_allocation_is_on_the_tensors_device(
    current: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Prototype:
        def new_empty_strided(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
            assert (shape, strides) == ((2, 3), (3, 1))
            return "anywhere"

    def on_current_device(*arguments: Any) -> Any:
        assert arguments == ((2, 3), (3, 1), torch.int32)
        return "here"

    monkeypatch.setattr(torch, "empty", lambda *_, **__: Prototype())
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current, raising=False)
    guards = torch._C._dynamo.guards
    monkeypatch.setattr(guards, "_empty_strided_cuda", on_current_device, raising=False)
    assert empty((2, 3), torch.int32, torch.device("cuda", 1))() == expected


def test_allocations_of_one_device_ask_once_for_the_current_one() -> None:
    asked: list[int] = []

    def current_device() -> int:
        asked.append(1)
        return 1

    def allocator(name: str, index: int) -> Any:
        def here(*arguments: Any) -> Any:
            return (name, "here", *arguments)

        return kernels.allocator(here, (7,), current_device, index, lambda: (name, "anywhere"))

    first, second = allocator("first", 1), allocator("second", 1)
    together = kernels.allocator_of_all([None, first, lambda: "any", second])
    assert together() == (None, ("first", "here", 7), "any", ("second", "here", 7))
    assert len(asked) == 1
    elsewhere = allocator("elsewhere", 0)
    assert kernels.allocator_of_all([elsewhere])() == (("elsewhere", "anywhere"),)
    assert kernels.allocator_of_all([None])() == (None,)
    with pytest.raises(ValueError, match="functions: expected those of one device"):
        kernels.allocator_of_all([first, elsewhere])


def test_allocations_raise_what_is_raised() -> None:
    def fail(*_: Any) -> Any:
        raise MemoryError("none left")

    current, far = (lambda: 1), (lambda: 0)
    functions = [
        kernels.allocator(fail, (), current, 1, far),
        kernels.allocator(far, (), current, 0, fail),
        kernels.allocator(far, (), fail, 1, far),
        fail,
    ]
    for function in functions:
        with pytest.raises(MemoryError, match="none left"):
            kernels.allocator_of_all([None, lambda: "made", function])()
