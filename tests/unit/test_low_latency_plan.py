# SPDX-License-Identifier: Apache-2.0
"""Low-latency calls on GPUs: what they are given reaches the backend, and is told apart by it."""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys
import weakref
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deepcomm import Buffer
from deepcomm._C import kernels, slots
from deepcomm.backends.base import low_latency_fields
from deepcomm.backends.cuda.low_latency_tensors import address_of
from deepcomm.types import Handle, RecvLayout

if TYPE_CHECKING:
    from collections.abc import Callable

ALIGN = 16
BYTES = torch.zeros(256, dtype=torch.uint8)
FLOATS = torch.zeros(64)

TENSORS: dict[str, torch.Tensor | None] = {
    "none": None,
    "float32": FLOATS[:16].view(4, 4),
    "other memory": FLOATS[16:32].view(4, 4),
    "parameter": torch.nn.Parameter(torch.zeros(4, 4)),
    "int32": torch.zeros(4, 4, dtype=torch.int32),
    "int64": torch.zeros(4, 4, dtype=torch.int64),
    "bfloat16": torch.zeros(4, 4, dtype=torch.bfloat16),
    "float16": torch.zeros(4, 4, dtype=torch.float16),
    "bool": torch.zeros(4, 4, dtype=torch.bool),
    "uint8": BYTES[:16].view(4, 4),
    "float8_e4m3fn": BYTES[:16].view(torch.float8_e4m3fn).view(4, 4),
    "float8_e5m2": BYTES[:16].view(torch.float8_e5m2).view(4, 4),
    "three dimensions": FLOATS[:16].view(1, 4, 4),
    "flat": FLOATS[:16],
    "scalar": FLOATS[0],
    "wide": FLOATS[:16].view(2, 8),
    "strided": FLOATS.as_strided((4, 4), (8, 1)),
    "transposed": FLOATS[:16].view(4, 4).T,
    "one row": FLOATS.as_strided((1, 4), (4, 1)),
    "one row far from none": FLOATS.as_strided((1, 4), (32, 1)),
    "empty": torch.empty(0, 4),
    "4 bytes off": FLOATS[1:17].view(4, 4),
    "8 bytes off": FLOATS[2:18].view(4, 4),
}


WAYS = ["by one C function", "by asking"]
"""How native code finds out what a tensor is, by whether torch has such a function."""


def in_way(way: str, test: Callable[..., None], *arguments: Any) -> None:
    """Run a test where torch has what a way needs; by asking, in a process of its own."""
    if way == "by one C function":
        if not kernels.can_describe_tensors():
            pytest.skip("this torch has no C functions for DLPack")
        test(*arguments)
        return
    program = (
        "import runpy, torch\n"
        "if hasattr(torch.Tensor, '__dlpack_c_exchange_api__'):\n"
        "    del torch.Tensor.__dlpack_c_exchange_api__\n"
        "from deepcomm._C import kernels\n"
        "assert not kernels.can_describe_tensors()\n"
        f"runpy.run_path({__file__!r})[{test.__name__!r}](*{arguments!r})\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def what_asking_tells(tensor: torch.Tensor | None) -> tuple[Any, ...] | None:
    if tensor is None:
        return None
    place = tensor.data_ptr() % ALIGN
    return (tensor.device, tensor.dtype, tensor.shape, tensor.stride(), place)


def is_found(kept: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    """Return whether a plan kept for a call's inputs, others and options is one for another's."""
    plans, plan = kernels.LowLatencyPlans(most=1), object()
    assert plans.find(*kept) is None
    plans.keep(plan, kernels.LowLatencyDispatchParams(), *kept)
    found = plans.find(*wanted)
    assert found in (plan, None)
    return found is plan


@pytest.mark.parametrize("way", WAYS)
def test_plans_tell_apart_what_asking_tells_apart(way: str) -> None:
    in_way(way, tell_tensors_apart)


def tell_tensors_apart() -> None:
    for (name, one), (other_name, other) in itertools.product(TENSORS.items(), repeat=2):
        alike = what_asking_tells(one) == what_asking_tells(other)
        assert is_found(((one,), (), ()), ((other,), (), ())) == alike, (name, other_name)
        assert is_found(((), (one,), ()), ((), (other,), ())) == alike, (name, other_name)
        swapped = ((one, None, other), (), ()), ((other, None, one), (), ())
        assert is_found(*swapped) == alike, (name, other_name)


@pytest.mark.parametrize("way", WAYS)
def test_plans_see_nothing_of_the_elements_and_the_place(way: str) -> None:
    in_way(way, find_elsewhere)


def find_elsewhere() -> None:
    kept = ((TENSORS["float32"],), (), ())
    found = [name for name in TENSORS if is_found(kept, ((TENSORS[name],), (), ()))]
    assert found == ["float32", "other memory", "parameter"]


@pytest.mark.parametrize(
    ("option", "other", "alike"),
    [
        ("fp8_e4m3", "".join(["fp8", "_e4m3"]), True),
        ("fp8_e4m3", "fp8_e4m", False),
        ("fp8_e4m3", None, False),
        (RecvLayout.TOKEN, RecvLayout.TOKEN, True),
        (RecvLayout.TOKEN, RecvLayout.EXPERT_PADDED, False),
        (True, False, False),
        ([1], [1], False),
        ("\ud800", "x", False),
    ],
)
def test_plans_tell_options_apart(option: Any, other: Any, alike: bool) -> None:
    assert is_found(((), (), ("x", option)), ((), (), ("x", other))) == alike
    assert is_found(((), (), (option, "x")), ((), (), ("x", option))) == (option == "x")


def test_plans_keep_their_options() -> None:
    class Option:
        pass

    plans, option = kernels.LowLatencyPlans(most=1), Option()
    kept = weakref.ref(option)
    plans.keep("plan", kernels.LowLatencyDispatchParams(), (), (), (option,))
    del option
    plans.find((), (), ())
    assert kept() is not None
    plans.keep("other plan", kernels.LowLatencyDispatchParams(), (), (), ())  # forgets the first
    assert kept() is None
    assert plans.find((), (), ()) == "other plan"


def test_plans_are_kept_for_the_calls_that_they_are_of() -> None:
    plans, params = kernels.LowLatencyPlans(most=8), kernels.LowLatencyDispatchParams()
    calls: list[Any] = [((), (), (name,)) for name in ("a", "b")]
    for call in calls:
        assert plans.find(*call) is None
    for call in calls:
        plans.keep(call, params, *call)
    assert [plans.find(*call) for call in calls] == calls
    with pytest.raises(IndexError):
        plans.find((None,) * 5, (), ())


def undescribable() -> dict[str, Any]:
    with FakeTensorMode():
        fake = torch.zeros(4, 4)
    return {
        "number": 3,
        "text": "x",
        "list": [1.0],
        "sparse": torch.eye(3).to_sparse(),
        "no memory": torch.zeros(4, 4, device="meta"),
        "fake": fake,
    }


@pytest.mark.parametrize("way", WAYS)
def test_there_is_no_plan_for_what_the_checks_must_refuse(way: str) -> None:
    in_way(way, refuse_to_plan)


def refuse_to_plan() -> None:
    plans = kernels.LowLatencyPlans(most=8)
    for name, given in undescribable().items():
        if name in ("no memory", "fake") and not kernels.can_describe_tensors():
            continue  # torch names an address of those
        for call in ((given,), (), ()), ((), (given,), ()):
            assert plans.find(*call) is None, name
            plans.keep("plan", kernels.LowLatencyDispatchParams(), *call)
            assert plans.find(*call) is None, name


@pytest.mark.parametrize("way", WAYS)
def test_found_plan_has_the_addresses_of_the_inputs(way: str) -> None:
    in_way(way, find_addresses)


def find_addresses() -> None:
    x, topk_idx, weights, other_x, other_ids = torch.zeros(5, 64).unbind()
    plans, params = kernels.LowLatencyPlans(most=8), kernels.LowLatencyDispatchParams()
    plans.keep("plan", params, (x, None, topk_idx, weights), (x,), ())
    assert plans.find((other_x, None, other_ids, weights), (x,), ()) == "plan"
    assert (params.x, params.scales) == (other_x.data_ptr(), 0)
    assert (params.topk_idx, params.topk_weights) == (other_ids.data_ptr(), weights.data_ptr())
    plans, combine = kernels.LowLatencyPlans(most=8), kernels.LowLatencyCombineParams()
    plans.keep("plan", combine, (x[:0], weights), (), ())
    assert plans.find((other_x[:0], weights), (), ()) == "plan"
    assert combine.y == address_of(other_x[:0])


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "none"])
def test_params_hold_addresses_of_tensors(name: str) -> None:
    tensor = TENSORS[name]
    params = kernels.LowLatencyCombineParams()
    offsets = kernels.WordOffsets(counts=1, topk_idx=5, topk_weights=9, out_topk_weights=13)
    params.set_inputs(tensor)
    params.set_outputs(None, tensor, offsets)
    assert params.y == params.base.record == address_of(tensor)
    assert params.out == 0
    assert params.topk_idx == params.base.record + 4 * 5


def test_params_of_a_dispatch_hold_addresses_of_tensors() -> None:
    x, scales, topk_idx, topk_weights, out, words = torch.zeros(6, 64).unbind()
    params = kernels.LowLatencyDispatchParams()
    offsets = kernels.WordOffsets(counts=4, topk_idx=8, topk_weights=12, out_topk_weights=16)
    names = "counts", "handle_topk_idx", "handle_topk_weights", "out_topk_weights"
    for weights in (topk_weights, None):
        params.set_inputs(x, scales, topk_idx, weights)
        params.set_outputs(out, None, topk_idx, words, offsets)
        assert (params.x, params.scales) == (x.data_ptr(), scales.data_ptr())
        assert (params.topk_idx, params.topk_weights) == (topk_idx.data_ptr(), address_of(weights))
        assert (params.out_x, params.out_scales) == (out.data_ptr(), 0)
        assert params.out_topk_idx == topk_idx.data_ptr()
        begin = params.base.record
        assert begin == params.base.turn == words.data_ptr()
        has = weights is not None
        expected = [begin + 16, begin + 32, has * (begin + 48), has * (begin + 64)]
        assert [getattr(params, name) for name in names] == expected


def test_native_methods_refuse_other_arguments() -> None:
    params: Any = kernels.LowLatencyCombineParams()
    plans: Any = kernels.LowLatencyPlans(most=1)
    with pytest.raises(TypeError, match="another number of arguments"):
        params.set_outputs(None, None)
    with pytest.raises(TypeError, match="an object of another class"):
        params.set_outputs(None, None, params)
    with pytest.raises(TypeError, match="an argument of another type"):
        plans.find([], (), ())
    with pytest.raises(TypeError, match="LowLatencyPlans"):
        type(plans).find(params, (), (), ())
    with pytest.raises(TypeError, match="initialised"):
        type(plans).find(type(plans).__new__(type(plans)), (), (), ())


def test_maker_refuses_what_its_class_does_not_make() -> None:
    class Strange:
        __slots__ = ("value",)

        def __new__(cls, *_: object) -> Any:
            return 3.5

    with pytest.raises(TypeError, match="objects of its own"):
        slots.maker(Strange, ("value",))(1)


def test_params_are_filled_without_the_c_functions() -> None:
    program = (
        "import torch\n"
        "if hasattr(torch.Tensor, '__dlpack_c_exchange_api__'):\n"
        "    del torch.Tensor.__dlpack_c_exchange_api__\n"
        "from deepcomm._C import kernels\n"
        "assert not kernels.can_describe_tensors()\n"
        "params, y = kernels.LowLatencyCombineParams(), torch.zeros(4)\n"
        "offsets = kernels.WordOffsets(counts=0, topk_idx=0, topk_weights=0, out_topk_weights=0)\n"
        "params.set_inputs(y)\n"
        "params.set_outputs(None, torch.empty(0), offsets)\n"
        "assert (params.y, params.out, params.base.record) == (y.data_ptr(), 0, 1)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("operation", ["low_latency_dispatch", "low_latency_combine"])
def test_arguments_reach_the_fields_of_their_names(operation: str) -> None:
    offered: list[tuple[Any, ...]] = []

    class Backend:
        repeats = SimpleNamespace(dispatch=offered.append, combine=offered.append)

        def __getattr__(self, name: str) -> Any:
            assert name == operation
            return lambda request: request

    buffer = object.__new__(Buffer)
    buffer._backend = Backend()
    parameters = inspect.signature(getattr(buffer, operation)).parameters
    given = {name: object() for name in parameters}
    request = getattr(buffer, operation)(**given)
    values = {field.name: getattr(request, field.name) for field in fields(request)}
    assert values.pop("low_latency") is True
    assert {name: values.pop(name) for name in given} == given
    (arguments,) = offered
    names = low_latency_fields(type(request))
    assert dict(zip(names, arguments, strict=True)) == given
    assert set(values.values()) <= {None, False}


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    first: Any
    second: Any = None


def test_maker_fills_a_frozen_dataclass() -> None:
    pair = slots.maker(Pair, ["second", "first"])(1, "x")
    assert type(pair) is Pair
    assert (pair.first, pair.second) == ("x", 1)
    with pytest.raises(FrozenInstanceError):
        pair.first = 2
    assert replace(pair, second=3).second == 3


def test_maker_leaves_other_slots_empty_and_keeps_nothing() -> None:
    make = slots.maker(Pair, ["first"])
    value = torch.zeros(1)
    kept = weakref.ref(value)
    pair = make(value)
    assert pair.first is value
    assert not hasattr(pair, "second")
    del value
    assert kept() is not None
    del pair
    assert kept() is None
    before = sys.getrefcount(Pair)
    for _ in range(100):
        make(1)
    assert sys.getrefcount(Pair) == before


def test_maker_fills_others_alike() -> None:
    value = object()
    make = slots.maker(Pair, ["second"], {"first": value})
    assert [(pair.first, pair.second) for pair in (make(1), make(2))] == [(value, 1), (value, 2)]
    before = sys.getrefcount(value)
    made = [make(1) for _ in range(100)]
    assert sys.getrefcount(value) == before + 100
    del made
    assert sys.getrefcount(value) == before


def test_maker_refuses_what_is_no_slot() -> None:
    for other in (Handle.__dict__["records"], property(str)):
        stranger = type("Stranger", (), {"__slots__": (), "records": other})
        with pytest.raises(TypeError, match="records: expected the name of a slot"):
            slots.maker(stranger, ["records"])
    with pytest.raises(TypeError, match="__module__: expected the name of a slot"):
        slots.maker(Pair, ["__module__"])
    with pytest.raises(AttributeError, match="third"):
        slots.maker(Pair, ["third"])
    with pytest.raises(TypeError, match="expected a value for each slot"):
        slots.maker(Pair, ["first"])(1, 2)
