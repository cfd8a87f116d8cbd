# SPDX-License-Identifier: Apache-2.0
"""The one allocation of a low-latency dispatch that holds all but rows, scales and received ids.

Its handle keeps it. An allocation or a view takes the host as long as all checks, so that of what
is in it tensors are made when somebody looks at them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch

from deepcomm._C import kernels, slots
from deepcomm.errors import InvalidArgument
from deepcomm.types import CombineOutput, DispatchOutput, Handle, RecvLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from deepcomm.checks import CheckedDispatch

__all__ = [
    "Record",
    "Sizes",
    "Words",
    "contiguous_strides",
    "pack_handle",
    "pack_output",
    "pack_record",
    "pack_sums",
]

ALIGN_WORDS: Final = 4
MAX_MAPS: Final = 1024


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a buffer's outputs: L blocks of M rows of H elements.

    Attributes:
        num_nodes: Among which ranks pass on; 1 where every way is direct.
        row_parts: Of a combine: blocks share rows among them.
    """

    num_ranks: int
    max_tokens: int
    num_local_experts: int
    hidden: int
    device: torch.device
    num_nodes: int
    row_parts: int

    @property
    def block_rows(self) -> int:
        """M."""
        return self.num_ranks * self.max_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """Map of these 32-bit words; offsets in words.

    Attributes:
        record: What kernels leave for combines; at 0.
        offsets: Of rows by local expert, and after them their sum; of the handle's ids and weights;
            of the output's weights.
        recv_layout: Of the rows.
        lead: Shape of the received rows, without H.
    """

    record: kernels.LowLatencyRecordLayout
    offsets: kernels.WordOffsets
    recv_layout: RecvLayout
    num_tokens: int
    num_topk: int
    has_weights: bool
    lead: tuple[int, ...]
    num_local_experts: int
    num_words: int

    @staticmethod
    def of(checked: CheckedDispatch, sizes: Sizes) -> Words:
        """Return the map for a dispatch: the same object for dispatches alike."""
        shape = (checked.num_tokens, checked.num_topk)
        return _make_words(sizes, checked.recv_layout, shape, checked.topk_weights is not None)


@functools.lru_cache(maxsize=MAX_MAPS)
def _make_words(
    sizes: Sizes, recv_layout: RecvLayout, shape: tuple[int, int], has_weights: bool
) -> Words:
    num_tokens, num_topk = shape
    record = kernels.LowLatencyRecordLayout.make(
        sizes.num_ranks, sizes.max_tokens, num_topk, sizes.num_nodes
    )
    is_token = recv_layout is RecvLayout.TOKEN
    num_blocks = 1 if is_token else sizes.num_local_experts
    num_weights = num_blocks * sizes.block_rows * (num_topk if is_token else 1)
    counts = round_up(record.num_words)
    topk_idx = counts + round_up(sizes.num_local_experts + 1)
    topk_weights = topk_idx + round_up(num_tokens * num_topk)
    out_topk_weights = topk_weights + round_up(num_tokens * num_topk)
    return Words(
        record=record,
        offsets=kernels.WordOffsets(
            counts=counts,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            out_topk_weights=out_topk_weights,
        ),
        recv_layout=recv_layout,
        num_tokens=num_tokens,
        num_topk=num_topk,
        has_weights=has_weights,
        lead=(sizes.block_rows,) if is_token else (num_blocks, sizes.block_rows),
        num_local_experts=sizes.num_local_experts,
        num_words=out_topk_weights + num_weights if has_weights else topk_weights,
    )


def round_up(num_words: int) -> int:
    """Return a multiple of 16 bytes."""
    return -(-num_words // ALIGN_WORDS) * ALIGN_WORDS


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@dataclass(slots=True, eq=False)
class Record:
    """What a ``Handle`` keeps.

    Attributes:
        buffer_id: Of the buffer at a size, alike on its ranks: its slots mean nothing to another.
        words: int32, as in ``map``.
        is_complete: Whether the receive phase has been launched.
    """

    buffer_id: bytes
    words: torch.Tensor
    map: Words
    is_complete: bool = False

    @staticmethod
    def of(handle: Handle, buffer_id: bytes) -> Record:
        """Return a handle's record.

        Raises:
            InvalidArgument: The handle comes from another buffer, or its hook was not called.
        """
        record = handle.records
        if not isinstance(record, Record) or record.buffer_id != buffer_id:
            raise InvalidArgument(
                "handle: expected one of this buffer, got one of another, or from before it grew"
            )
        if not record.is_complete:
            raise InvalidArgument("handle: expected the hook of its dispatch to have been called")
        return record

    def fill(self, base: kernels.LowLatencyParams) -> None:
        """Tell a kernel where it is."""
        base.record = self.words.data_ptr()
        base.record_map = self.map.record

    def ints(self, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        """Return a view."""
        return self.words.as_strided(shape, contiguous_strides(shape), offset)

    def weights(self, shape: tuple[int, ...], offset: int) -> torch.Tensor | None:
        """Return a view, if weights were given."""
        if not self.map.has_weights:
            return None
        floats = self.words.view(torch.float32)
        return floats.as_strided(shape, contiguous_strides(shape), offset)

    def counts(self) -> torch.Tensor:
        """Return the rows by local expert."""
        return self.ints((self.map.num_local_experts,), self.map.offsets.counts)

    def num_recv(self) -> torch.Tensor:
        """Return their sum."""
        return self.ints((), self.map.offsets.counts + self.map.num_local_experts)

    def topk_idx(self) -> torch.Tensor:
        """Return the handle's ids."""
        words = self.map
        return self.ints((words.num_tokens, words.num_topk), words.offsets.topk_idx)

    def topk_weights(self) -> torch.Tensor | None:
        """Return the handle's weights."""
        words = self.map
        return self.weights((words.num_tokens, words.num_topk), words.offsets.topk_weights)

    def out_topk_weights(self) -> torch.Tensor | None:
        """Return the weights of the rows received."""
        words = self.map
        is_token = words.recv_layout is RecvLayout.TOKEN
        shape = (*words.lead, words.num_topk) if is_token else words.lead
        return self.weights(shape, words.offsets.out_topk_weights)


class Lazy:
    """A frozen dataclass some fields of which are made when they are looked at."""

    __slots__ = ()
    _makers: ClassVar[Mapping[str, Callable[[Any], Any]]]

    def __getattr__(self, name: str) -> Any:
        """Make a field; called only while there is none."""
        if name not in self._makers:
            raise AttributeError(name)
        value = self._makers[name](self)
        object.__setattr__(self, name, value)
        return value


class PackedHandle(Lazy, Handle):
    """The handle of a record."""

    __slots__ = ()
    _makers: ClassVar = {
        "recv_layout": lambda handle: handle.records.map.recv_layout,
        "expert_alignment": lambda _: 1,
        "capacity": lambda _: None,
        "num_tokens": lambda handle: handle.records.map.num_tokens,
        "num_rows": lambda handle: math.prod(handle.records.map.lead),
        "topk_idx": lambda handle: handle.records.topk_idx(),
        "topk_weights": lambda handle: handle.records.topk_weights(),
        "low_latency": lambda _: True,
    }


class PackedOutput(Lazy, DispatchOutput):
    """An output of which the record has what is not given."""

    __slots__ = ()
    _makers: ClassVar = {
        "topk_weights": lambda output: output.handle.records.out_topk_weights(),
        "num_tokens_per_expert": lambda output: output.handle.records.counts(),
        "expert_offsets": lambda _: None,
        "num_recv_tokens": lambda output: output.handle.records.num_recv(),
    }


# A dataclass's constructor takes several times as long.
pack_record: Final[Callable[[bytes, torch.Tensor, Words], Record]] = slots.maker(
    Record, ["buffer_id", "words", "map"], {"is_complete": False}
)
pack_handle: Final[Callable[[Record], PackedHandle]] = slots.maker(PackedHandle, ["records"])
pack_output: Final[Callable[..., PackedOutput]] = slots.maker(
    PackedOutput, ["handle", "x", "scales", "topk_idx", "overflow", "event", "hook"]
)
pack_sums: Final[Callable[..., CombineOutput]] = slots.maker(
    CombineOutput, ["x", "topk_weights", "event", "hook"]
)
