# SPDX-License-Identifier: Apache-2.0
"""The interface of a backend, its requests, and the choice of one by device.

Requests are made in every call, so they are not frozen: that would make them three times as slow.
Those of low-latency calls are made without their constructor, which takes three times as long, of
arguments by place: the fields come in the order of these.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar

import torch

from deepcomm._C import slots
from deepcomm.errors import InvalidArgument
from deepcomm.group import agree, as_group
from deepcomm.types import ScaledTensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from deepcomm.backends.cuda.runtime import Runtime
    from deepcomm.config import BufferConfig
    from deepcomm.topology import Topology
    from deepcomm.types import (
        BufferStats,
        CombineOutput,
        DispatchOutput,
        Event,
        Handle,
        RecvLayout,
    )

OnTimeout = Literal["raise", "mask"]


@dataclass(slots=True, eq=False)
class DispatchRequest:
    """Arguments of one dispatch of either mode, as the user gave them."""

    x: torch.Tensor | ScaledTensor
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    quantize: str | None = None
    scale_format: str = "fp32"
    recv_layout: RecvLayout | None = None
    zero_padding: bool = False
    out: torch.Tensor | None = None
    return_hook: bool = False
    async_op: bool = False
    previous_event: Event | None = None
    on_timeout: OnTimeout = "raise"
    expert_token_stats: torch.Tensor | None = None
    wait_us_stats: torch.Tensor | None = None
    low_latency: bool = False
    handle: Handle | None = None
    expert_alignment: int | None = None
    capacity: int | None = None
    owned: bool = False

    @property
    def sends_fp8(self) -> bool:
        """Whether rows travel as FP8; also where some arguments are wrong."""
        return self.quantize is not None or isinstance(self.x, ScaledTensor)


@dataclass(slots=True, eq=False)
class CombineRequest:
    """Arguments of one combine of either mode, as the user gave them."""

    y: torch.Tensor
    handle: Handle
    topk_weights: torch.Tensor | None = None
    apply_weights: bool = False
    bias: torch.Tensor | None = None
    out: torch.Tensor | None = None
    return_hook: bool = False
    async_op: bool = False
    previous_event: Event | None = None
    on_timeout: OnTimeout = "raise"
    wait_us_stats: torch.Tensor | None = None
    low_latency: bool = False


Request = TypeVar("Request", DispatchRequest, CombineRequest)


def low_latency_fields(request: type[Request]) -> tuple[str, ...]:
    """Return the fields before ``low_latency``, which are the arguments of that mode."""
    names = tuple(field.name for field in fields(request))
    return names[: names.index("low_latency")]


def low_latency_maker(request: type[Request]) -> Callable[..., Request]:
    """Return what makes requests of the values of ``low_latency_fields``."""
    names = low_latency_fields(request)
    others = {field.name: field.default for field in fields(request)[len(names) :]}
    return slots.maker(request, list(names), {**others, "low_latency": True})


low_latency_dispatch_request: Final = low_latency_maker(DispatchRequest)
low_latency_combine_request: Final = low_latency_maker(CombineRequest)


class Repeats(Protocol):
    """Low-latency calls that are like earlier ones, and done without a second look.

    Arguments are those of ``low_latency_fields``, in their order.
    """

    def dispatch(self, arguments: tuple[Any, ...], /) -> DispatchOutput | None:
        """Return the output; or None, having done nothing, where the call is not like one."""

    def combine(self, arguments: tuple[Any, ...], /) -> CombineOutput | None:
        """Return the output; or None, having done nothing, where the call is not like one."""


class NoRepeats:
    """Where every call is looked at."""

    def dispatch(self, arguments: tuple[Any, ...], /) -> None:
        """Do nothing."""

    def combine(self, arguments: tuple[Any, ...], /) -> None:
        """Do nothing."""


NO_REPEATS: Final = NoRepeats()


class Backend(Protocol):
    """What ``Buffer`` asks of a device; argument errors abort the operation on every rank."""

    config: BufferConfig
    topology: Topology
    device: torch.device

    @property
    def repeats(self) -> Repeats:
        """What low-latency calls are offered to first."""

    @property
    def num_bytes(self) -> int:
        """Bytes of symmetric memory reserved on this rank."""

    def dispatch(self, request: DispatchRequest) -> DispatchOutput:
        """High-throughput dispatch."""

    def combine(self, request: CombineRequest) -> CombineOutput:
        """High-throughput combine."""

    def low_latency_dispatch(self, request: DispatchRequest) -> DispatchOutput:
        """Low-latency dispatch, both phases or the first."""

    def low_latency_combine(self, request: CombineRequest) -> CombineOutput:
        """Low-latency combine, both phases or the first."""

    def set_rank_mask(self, rank: int, masked: bool) -> None:
        """Mark a peer dead or alive."""

    def rank_mask(self) -> torch.Tensor:
        """Return bool [R]."""

    def stats(self) -> BufferStats:
        """Return the counters."""

    def explain(self) -> str:
        """Return what was chosen and why."""

    def close(self) -> None:
        """Release everything; idempotent."""


def open_backend(group: Any, config: BufferConfig, device: torch.device | str | None) -> Backend:
    """Construct the backend that serves ``device``; collective over ``group``.

    A group may bring the machine to run on itself (``runtime``).
    """
    runtime = getattr(group, "runtime", None)
    if runtime is not None:
        return _open_cuda(group, config, lambda: runtime)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cpu":
        from deepcomm.backends.cpu import CpuBackend

        return CpuBackend(group, config)
    if device.type == "cuda":
        from deepcomm.backends.cuda.device import CudaRuntime

        return _open_cuda(group, config, lambda: CudaRuntime(device))
    raise InvalidArgument(f"device: expected cpu or cuda, got {device}")


def _open_cuda(group: Any, config: BufferConfig, make: Callable[[], Runtime]) -> Backend:
    # The host code of the kernels' operations is loaded only where it is used.
    from deepcomm.backends.cuda.backend import (  # type: ignore[import-not-found,unused-ignore]
        CudaBackend,
    )

    control = as_group(group)
    runtimes: list[Runtime] = []
    agree(control, "Buffer", lambda: runtimes.append(make()))
    backend: Backend = CudaBackend(group, config, runtimes[0])
    return backend
