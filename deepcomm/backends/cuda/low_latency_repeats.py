# SPDX-License-Identifier: Apache-2.0
"""Low-latency calls that are like earlier ones, and done by native code alone."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from deepcomm._C import kernels, slots
from deepcomm.backends.base import CombineRequest, DispatchRequest, low_latency_fields
from deepcomm.backends.cuda.low_latency_words import PackedOutput, Record, pack_handle
from deepcomm.types import CombineOutput

if TYPE_CHECKING:
    from deepcomm.backends.base import Repeats
    from deepcomm.backends.cuda.low_latency_plan import Context
    from deepcomm.backends.cuda.low_latency_slots import Place

__all__ = ["open_repeats"]

assert low_latency_fields(DispatchRequest) == kernels.DISPATCH_FIELDS
assert low_latency_fields(CombineRequest) == kernels.COMBINE_FIELDS


def open_repeats(context: Context, counts: kernels.OperationCounts, place: Place) -> Repeats:
    """Return what repeats the operations of a buffer on one node.

    It must not hold what holds it: the collector does not look into native objects.
    """
    no_event = {"event": None, "hook": None}
    status, runtime = context.slots.status, place.runtime
    repeats: Repeats = kernels.LowLatencyRepeats(
        kept=kernels.LowLatencyKept(
            dispatches=context.dispatches,
            combines=context.combines,
            turns=context.slots.turns,
            counts=counts,
            status=status.address,
            failure=place.failure.record_address,
            owners=(status, place.failure),
        ),
        makers=kernels.LowLatencyMakers(
            buffer_id=context.buffer_id,
            record=slots.maker(
                Record,
                ["words", "map"],
                {"buffer_id": context.buffer_id, "is_complete": True},
            ),
            handle=pack_handle,
            output=slots.maker(
                PackedOutput,
                ["handle", "x", "scales", "topk_idx"],
                {"overflow": context.no_overflow, **no_event},
            ),
            sums=slots.maker(CombineOutput, ["x"], {"topk_weights": None, **no_event}),
        ),
        callbacks=kernels.LowLatencyCallbacks(
            raise_earlier=functools.partial(status.raise_earlier, runtime.is_capturing),
            push_range=runtime.push_range if runtime.shows_ranges else None,
            pop_range=runtime.pop_range if runtime.shows_ranges else None,
        ),
    )
    return repeats
