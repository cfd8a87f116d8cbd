# SPDX-License-Identifier: Apache-2.0
"""Handles in the shapes that clients expect: tuples for V1, ``EPHandle`` for V2."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from deepcomm.compat.keys import Routing, make_key, routing_of_key

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Self

    from deepcomm.types import DispatchOutput, Event

__all__ = ["DispatchHandle", "EPHandle", "LowLatencyHandle", "routing_of"]

T = TypeVar("T")


class _HandleTuple(tuple[Any, ...]):
    """A tuple whose first entry is the key of its routing."""

    routing: Routing

    def __new__(cls, routing: Routing, rest: Iterable[Any]) -> Self:
        """Put the key before the rest."""
        handle = super().__new__(cls, (make_key(routing), *rest))
        handle.routing = routing
        return handle


class DispatchHandle(_HandleTuple):
    """Six tensors, which may be saved for backward and come back as a plain tuple."""

    @classmethod
    def of(
        cls, routing: Routing, output: DispatchOutput, is_token_in_rank: torch.Tensor | None
    ) -> DispatchHandle:
        """Return the handle of a dispatch.

        Args:
            routing: What it stands for.
            output: What the dispatch delivered.
            is_token_in_rank: bool [T, R] as the caller gave it, or None.
        """
        topk_idx = output.handle.topk_idx
        nothing = topk_idx.new_empty(0)
        weights = output.handle.topk_weights
        rest = (
            topk_idx,
            nothing if weights is None else weights,
            output.num_tokens_per_expert,
            nothing if is_token_in_rank is None else is_token_in_rank,
            output.num_recv_tokens,
        )
        return cls(routing, rest)


class LowLatencyHandle(_HandleTuple):
    """Key, counts per expert, tokens per rank, hidden and experts of a low-latency dispatch."""


class computed_once(cached_property[T]):
    """``functools.cached_property`` without its lock.

    Before Python 3.12 all instances share it, and what one rank waits for may be another rank that
    is a thread of this process and waits for the lock.
    """

    def __get__(self, instance: Any, owner: type[Any] | None = None) -> Any:
        """Compute the value and keep it in the instance, where it is found from then on."""
        if instance is None:
            return self
        value = instance.__dict__[self.attrname] = self.func(instance)
        return value


class EPHandle:
    """Record of one V2 dispatch; every field may be read and assigned.

    What is counted is computed when it is first read: an asynchronous dispatch is not waited for
    before the client does.

    Attributes:
        do_expand: Whether rows are grouped by expert.
        num_experts: E.
        expert_alignment: Multiple at which the groups start, and to which the list is rounded.
        num_max_tokens_per_rank: Largest T that rows are laid out for, or None.
        num_sms: As asked for.
        topk_idx: The ids of the dispatch.
        token_metadata_at_forward: None.
        channel_linked_list: None.
    """

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int | None
    num_sms: int
    topk_idx: torch.Tensor
    token_metadata_at_forward: torch.Tensor | None
    channel_linked_list: torch.Tensor | None
    _routing: Routing
    _counts: torch.Tensor
    _num_recv: torch.Tensor
    _event: Event | None

    def __init__(
        self,
        do_expand: bool,
        num_experts: int,
        expert_alignment: int,
        num_max_tokens_per_rank: int | None,
        num_sms: int,
        topk_idx: torch.Tensor,
        num_recv_tokens: int,
        num_expanded_tokens: int,
        num_recv_tokens_per_expert_list: list[int],
        psum_num_recv_tokens_per_scaleup_rank: torch.Tensor,
        psum_num_recv_tokens_per_expert: torch.Tensor,
        num_unaligned_recv_tokens_per_expert: torch.Tensor | None,
        recv_src_metadata: torch.Tensor,
        dst_buffer_slot_idx: torch.Tensor,
        token_metadata_at_forward: torch.Tensor | None,
        channel_linked_list: torch.Tensor | None,
    ) -> None:
        """Assemble a handle from the fields of another."""
        # Into the dictionary, where the computed properties would keep what they compute.
        self.__dict__.update({k: v for k, v in locals().items() if k != "self"})

    @classmethod
    def of(cls, routing: Routing, output: DispatchOutput, fields: dict[str, Any]) -> EPHandle:
        """Return the handle of a dispatch, what is counted still to be computed."""
        handle = cls.__new__(cls)
        handle.__dict__.update(
            fields,
            token_metadata_at_forward=None,
            channel_linked_list=None,
            _routing=routing,
            _counts=output.num_tokens_per_expert,
            _num_recv=output.num_recv_tokens,
            _event=output.event,
        )
        return handle

    @computed_once
    def recv_src_metadata(self) -> torch.Tensor:
        """The key of the routing; opaque."""
        return make_key(self._routing)

    @computed_once
    def dst_buffer_slot_idx(self) -> torch.Tensor:
        """Empty."""
        return self.topk_idx.new_empty(0)

    @computed_once
    def num_unaligned_recv_tokens_per_expert(self) -> torch.Tensor:
        """int32 [L], rows per local expert without padding."""
        return self._counts

    @computed_once
    def psum_num_recv_tokens_per_expert(self) -> torch.Tensor:
        """int32 [L], the end of each group's rows, padding excluded."""
        counts = self._aligned_counts
        return counts.cumsum(0, dtype=torch.int32) - counts + self._counts

    @property
    def _aligned_counts(self) -> torch.Tensor:
        # Computed on the current stream, which the client need not have told to wait yet.
        if self._event is not None:
            self._event.current_stream_wait()
        return aligned(self._counts, self.expert_alignment)

    @computed_once
    def num_recv_tokens_per_expert_list(self) -> list[int]:
        """Rows per local expert, each rounded up to the alignment; empty without ``do_cpu_sync``.

        Waits for the dispatch.
        """
        if self._routing.handle.capacity is not None:
            return []
        return self._on_host(self._aligned_counts).tolist()

    @computed_once
    def num_recv_tokens(self) -> int:
        """Tokens received, each once; waits for the dispatch."""
        return int(self._on_host(self.psum_num_recv_tokens_per_scaleup_rank[-1]))

    @computed_once
    def num_expanded_tokens(self) -> int:
        """Rows of the expanded layout, padding included; waits for the dispatch if not expanded."""
        if self.do_expand:
            return self._routing.handle.num_rows
        return int(self._on_host(self._aligned_counts.sum()))

    @computed_once
    def psum_num_recv_tokens_per_scaleup_rank(self) -> torch.Tensor:
        """int32 [1]: tokens received from all ranks; the last entry is what clients read.

        Raises:
            NotImplementedError: The dispatch was expanded.
        """
        if self.do_expand:
            raise NotImplementedError(
                "psum_num_recv_tokens_per_scaleup_rank of an expanded dispatch: tokens are not "
                "counted there, only rows; read num_expanded_tokens, or dispatch unexpanded"
            )
        return self._num_recv.reshape(1)

    def _on_host(self, value: torch.Tensor) -> torch.Tensor:
        """Return a value after the dispatch, which may still run."""
        if self._event is not None:
            self._event.synchronize()
        return value


def aligned(counts: torch.Tensor, alignment: int) -> torch.Tensor:
    """Return int32 counts rounded up to a multiple."""
    if alignment == 1:
        return counts
    return (counts + (alignment - 1)) // alignment * alignment


def routing_of(handle: object) -> Routing:
    """Return what a handle, or the tensors of one, stands for.

    Raises:
        InvalidArgument: It is neither.
    """
    if isinstance(handle, _HandleTuple):
        return handle.routing
    if isinstance(handle, EPHandle):
        routing = handle.__dict__.get("_routing")
        return routing if routing is not None else routing_of_key(handle.recv_src_metadata)
    first = handle[0] if isinstance(handle, (tuple, list)) and handle else handle
    return routing_of_key(first)
