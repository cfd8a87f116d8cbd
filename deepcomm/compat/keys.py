# SPDX-License-Identifier: Apache-2.0
"""Tensors that stand for a routing where a client keeps nothing but a handle's tensors.

Clients pass handles through ``ctx.save_for_backward`` and get plain tuples of tensors back. One of
those tensors is a key: a number on the host whose storage owns the routing, so that the routing
lives exactly as long as any tensor shares that storage, or whoever else holds it.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deepcomm.errors import InvalidArgument

if TYPE_CHECKING:
    import deepcomm

__all__ = ["Routing", "make_key", "routing_of_key"]

KEY_BYTES = 8


@dataclass(slots=True, eq=False)
class Routing:
    """A routing and the buffer that made it.

    Attributes:
        buffer: The deepcomm buffer; a handle outlives the facade that it came from.
        handle: Its record of the routing.
        dtype: Of the rows given to the dispatch, FP8 where they were cast before.
        topk_idx: The ids given to a low-latency dispatch, to be recognised by its combine.
        topk_version: How often torch had counted a change of them.
        outputs: Tensor handed out by ``get_next_low_latency_combine_buffer``, or None.
    """

    buffer: deepcomm.Buffer
    handle: deepcomm.Handle
    dtype: torch.dtype
    topk_idx: torch.Tensor | None = None
    topk_version: int = -1
    outputs: torch.Tensor | None = None


class _Owner(bytearray):
    """Memory of one key, and what it stands for."""

    routing: Routing


_numbers = itertools.count(1)
_owners: weakref.WeakValueDictionary[int, _Owner] = weakref.WeakValueDictionary()


def make_key(routing: Routing) -> torch.Tensor:
    """Return an int64 [1] tensor on the host that owns ``routing``."""
    number = next(_numbers)
    owner = _Owner(number.to_bytes(KEY_BYTES, sys.byteorder))
    owner.routing = routing
    _owners[number] = owner
    return torch.frombuffer(owner, dtype=torch.int64)


def routing_of_key(key: object) -> Routing:
    """Return what a key, or a copy of one, stands for.

    Raises:
        InvalidArgument: It is no key, or nobody holds the routing any longer.
    """
    if isinstance(key, torch.Tensor) and key.dtype == torch.int64 and key.numel() == 1:
        owner = _owners.get(int(key))
        if owner is not None:
            return owner.routing
    raise InvalidArgument(
        "handle: expected one of dispatch, or its tensors while the handle or they are kept, "
        f"got {type(key).__name__}"
    )
