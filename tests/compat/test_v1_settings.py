# SPDX-License-Identifier: Apache-2.0
"""V1 without an exchange: constructors, attributes, configurations, events, signatures."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from deepcomm import InvalidArgument
from deepcomm.compat import Buffer, Config, EventHandle, EventOverlap
from deepcomm.event import CompletedEvent
from deepcomm.testing import LocalCluster

if TYPE_CHECKING:
    from collections.abc import Callable

    from compat.places import Place


class OtherCommunicator:
    """An mpi4py communicator of one rank, as far as it is used."""

    def Get_rank(self) -> int:  # mpi4py's name
        return 0

    def Get_size(self) -> int:
        return 1

    def allgather(self, value: Any) -> list[Any]:
        return [value]


def alone(function: Callable[[Any], Any]) -> Any:
    return LocalCluster(1, device="cpu").run(function)[0]


def test_constructor_positional_and_attributes() -> None:
    def run(group: Any) -> None:
        buffer = Buffer(group, 1 << 20, 0, explicitly_destroy=True)
        assert buffer.group is group
        assert not buffer.group != group  # noqa: SIM202 - what clients write
        assert (buffer.group_size, buffer.rank) == (1, 0)
        assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (1 << 20, 0)
        assert buffer.low_latency_mode is False
        assert buffer.num_sms == Buffer.num_sms == 20

    alone(run)


def test_constructor_all_keywords_of_clients() -> None:
    def run(group: Any) -> None:
        buffer = Buffer(
            group=group,
            num_nvl_bytes=0,
            num_rdma_bytes=1 << 30,
            low_latency_mode=True,
            num_qps_per_rank=12.0,
            allow_nvlink_for_low_latency_mode=True,
            allow_mnnvl=False,
            use_fabric=True,
            explicitly_destroy=False,
            enable_shrink=True,
        )
        assert buffer.low_latency_mode
        assert buffer.enable_shrink
        with pytest.raises(TypeError, match="num_bubbles"):
            Buffer(group=group, num_bubbles=1)

    alone(run)


def test_constructor_with_a_communicator_instead_of_a_group() -> None:
    buffer = Buffer(None, 0, 0, num_nvl_peers=1, comm=OtherCommunicator())
    assert buffer.group is None
    assert buffer.group_size == 1
    ids = torch.zeros(3, 1, dtype=torch.int64)
    counts = buffer.get_dispatch_layout(ids, 2)[2]
    received = buffer.dispatch(torch.ones(3, 16), topk_idx=ids, num_tokens_per_expert=counts)
    assert torch.equal(received[0], torch.ones(3, 16))
    with pytest.raises(InvalidArgument, match="group: expected"):
        Buffer(None, 0, 0)


def test_constructor_can_be_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = [], Buffer.__init__

    def patched(self: Buffer, *args: Any, **kwargs: Any) -> None:
        seen.append(kwargs.pop("tag", None))
        original(self, *args, **kwargs)

    monkeypatch.setattr(Buffer, "__init__", patched)
    assert alone(lambda group: Buffer(group, tag="mine").group_size) == 1
    assert seen == ["mine"]


def test_num_sms_is_set_on_the_class_from_anywhere() -> None:
    before = torch.cuda.is_initialized()
    Buffer.set_num_sms(24)
    assert Buffer.num_sms == 24
    alone(lambda group: Buffer(group).set_num_sms(12))
    assert Buffer.num_sms == 12
    assert Buffer.get_dispatch_config(8).num_sms == 12
    for wrong in (7, 0):
        with pytest.raises(InvalidArgument, match="num_sms: expected a positive even number"):
            Buffer.set_num_sms(wrong)
    assert torch.cuda.is_initialized() == before


def test_num_sms_reaches_the_buffer(place: Place) -> None:
    Buffer.set_num_sms(2)

    def run(group: Any) -> int | None:
        buffer = Buffer(group)
        ids = torch.zeros(1, 1, dtype=torch.int64, device=place.device)
        counts = buffer.get_dispatch_layout(ids, 1)[2]
        x = torch.ones(1, 256, dtype=torch.bfloat16, device=place.device)
        *_, handle, _ = buffer.dispatch(x, topk_idx=ids, num_tokens_per_expert=counts)
        return handle.routing.buffer.config.num_sms

    assert place.run(run, 1) == [2]


def test_capture_and_events() -> None:
    event = Buffer.capture()
    assert isinstance(event, EventOverlap)
    assert isinstance(event.event, EventHandle)
    event.current_stream_wait()
    event.event.synchronize()
    assert event.event.query()
    with event as entered:
        assert entered is event
    event.current_stream_wait(release_handle=True)
    assert event.event is None
    with pytest.raises(InvalidArgument, match="event: expected one of an asynchronous operation"):
        event.current_stream_wait()
    with event:
        pass  # nothing to wait for


def test_event_is_assignable_and_keeps_tensors() -> None:
    tensor = torch.ones(1)
    event = EventOverlap(None, (tensor,))
    assert event.event is None
    event.event = EventHandle()
    event.current_stream_wait()
    assert event.extra_tensors == (tensor,)


def test_event_waits_on_leaving_a_context() -> None:
    class Counting(CompletedEvent):
        waits = 0

        def current_stream_wait(self) -> None:
            Counting.waits += 1

    with EventOverlap(EventHandle.of(Counting())):
        assert Counting.waits == 0
    assert Counting.waits == 1


@pytest.mark.parametrize("num_ranks", [1, 2, 8, 48, 96, 7, 512])
def test_configurations_for_any_number_of_ranks(num_ranks: int) -> None:
    for config in (Buffer.get_dispatch_config(num_ranks), Buffer.get_combine_config(num_ranks)):
        sizes = [config.get_nvl_buffer_size_hint(hidden * 2, num_ranks) for hidden in (512, 7168)]
        assert 0 < sizes[0] < sizes[1]
        rdma = config.get_rdma_buffer_size_hint(7168 * 2, num_ranks)
        assert (rdma > 0) == (num_ranks > 8)
    with pytest.raises(InvalidArgument, match="num_ranks"):
        Buffer.get_dispatch_config(0)


def test_config_positional_and_by_name() -> None:
    assert Config(20, 6, 256) == Config(num_sms=20, num_max_nvl_chunked_send_tokens=6)
    assert Config(24, 8, 256, 8, 128).num_max_rdma_chunked_recv_tokens == 128
    user_file = {
        "num_sms": 96,
        "num_max_nvl_chunked_send_tokens": 16,
        "num_max_nvl_chunked_recv_tokens": 512,
        "num_max_rdma_chunked_send_tokens": 16,
        "num_max_rdma_chunked_recv_tokens": 512,
    }
    assert vars(Config(**user_file)) == user_file
    with pytest.raises(InvalidArgument, match="num_sms: expected a positive int, got 0"):
        Config(0)


def test_low_latency_size_hint_positional_and_by_name() -> None:
    small = Buffer.get_low_latency_rdma_size_hint(128, 1024, 2, 8)
    assert small == Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=128, hidden=1024, num_ranks=2, num_experts=8
    )
    assert Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256) > small > 0


def test_small_calls() -> None:
    def run(group: Any) -> None:
        buffer = Buffer(group, enable_shrink=True)
        assert Buffer.is_sm90_compiled()
        assert buffer.get_comm_stream() is not None
        buffer.clean_low_latency_buffer(128, 7168, 8)
        buffer.get_local_buffer_tensor(dtype=torch.int8, use_rdma_buffer=True).zero_()
        with pytest.raises(NotImplementedError, match="get_local_buffer_tensor of a part"):
            buffer.get_local_buffer_tensor(torch.int8, size=torch.Size([4]))
        buffer.destroy()
        buffer.destroy()

    alone(run)


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("dispatch", {"x", "handle", "num_tokens_per_expert", "num_worst_tokens", "config"}),
        ("combine", {"x", "handle", "topk_weights", "bias", "config", "async_finish"}),
        ("low_latency_dispatch", {"x", "topk_idx", "use_fp8", "round_scale", "return_recv_hook"}),
        ("low_latency_combine", {"x", "topk_weights", "zero_copy", "out", "use_logfmt"}),
    ],
)
def test_signatures_are_real(method: str, names: set[str]) -> None:
    buffer = alone(Buffer)
    parameters = inspect.signature(getattr(buffer, method)).parameters
    assert names <= set(parameters)
    kinds = {parameter.kind for parameter in parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_stream_event_is_used_where_cuda_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class FakeEvent:
        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("synchronize")

        def query(self) -> bool:
            return False

    stream = SimpleNamespace(wait_event=calls.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    event = EventHandle()
    event.current_stream_wait()
    event.synchronize()
    assert not event.query()
    assert calls[0] == "record"
    assert isinstance(calls[1], FakeEvent)
    assert calls[2] == "synchronize"
