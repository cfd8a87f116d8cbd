# SPDX-License-Identifier: Apache-2.0
"""What ranks do in the failure tests: small buffers, valid calls of every operation, outcomes.

In modules of their own, imported as ``trap.NAME``: processes find functions by the module's name.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deepcomm import Buffer, Error, RecvLayout, reference
from deepcomm.group import as_group
from deepcomm.reference import ReferenceConfig
from deepcomm.testing import oracle

if TYPE_CHECKING:
    from collections.abc import Callable

    from deepcomm.types import CombineOutput, DispatchOutput

HIDDEN = 64
NUM_TOPK = 4
MAX_TOKENS = 24
EXPERTS_PER_RANK = 4
OPERATIONS = ("dispatch", "combine", "low_latency_dispatch", "low_latency_combine")


@dataclass(frozen=True)
class Place:
    """Shape of a test's group: ``ranks_per_node`` None where the machine decides."""

    num_ranks: int
    ranks_per_node: int | None = None

    def __str__(self) -> str:
        if self.ranks_per_node is None:
            return f"{self.num_ranks}x1node"
        return f"{self.num_ranks // self.ranks_per_node}x{self.ranks_per_node}"


SINGLE_NODE, TWO_NODES = Place(4), Place(4, 2)


@dataclass(frozen=True)
class Outcome:
    """How one call ended on one rank; everything in it can be sent between processes."""

    rank: int
    kind: str  # name of the exception's class, or "" for success
    message: str = ""
    peer: int | None = None
    seconds: float = 0.0


def num_tokens_of(rank: int) -> int:
    return MAX_TOKENS - 5 * (rank % 3)


def open_buffer(group: Any, place: Place, **options: Any) -> Buffer:
    arguments: dict[str, Any] = {
        "num_experts": EXPERTS_PER_RANK * place.num_ranks,
        "num_topk": NUM_TOPK,
        "hidden": HIDDEN,
        "max_tokens_per_rank": MAX_TOKENS,
        "device": "cpu",
        "ranks_per_node": place.ranks_per_node,
        "timeout_s": 20.0,
    }
    return Buffer(group, **{**arguments, **options})


class Inputs:
    """Inputs of every rank, known to every rank, and the results they must give."""

    def __init__(self, buffer: Buffer) -> None:
        self.rank, num_ranks = buffer.rank, buffer.num_ranks
        config = ReferenceConfig(
            buffer.config.num_experts,
            num_ranks,
            buffer.ranks_per_node,
            buffer.config.max_tokens_per_rank,
        )
        self.config = config
        tokens = [
            oracle.routed_tokens("uniform", config, rank, num_tokens_of(rank), NUM_TOPK)
            for rank in range(num_ranks)
        ]
        self.xs = [
            oracle.random_payload(rank, num_tokens_of(rank), HIDDEN) for rank in range(num_ranks)
        ]
        self.ids = [entry.topk_idx for entry in tokens]
        self.weights = [entry.topk_weights for entry in tokens]

    def dispatch_arguments(self) -> dict[str, Any]:
        rank = self.rank
        return {
            "x": self.xs[rank].clone(),
            "topk_idx": self.ids[rank].clone(),
            "topk_weights": self.weights[rank].clone(),
        }


def call(buffer: Buffer, operation: str, arguments: dict[str, Any]) -> Any:
    """Call one operation, both phases."""
    output = getattr(buffer, operation)(**arguments)
    if output.hook is not None:
        output.hook()
    return output


def arguments_of(buffer: Buffer, operation: str, inputs: Inputs) -> dict[str, Any]:
    """Return valid arguments; those of a combine come from a dispatch made here (collective)."""
    if operation.endswith("dispatch"):
        return inputs.dispatch_arguments()
    first = operation.replace("combine", "dispatch")
    output = call(buffer, first, inputs.dispatch_arguments())
    return {"y": output.x.clone().nan_to_num(0.0), "handle": output.handle}


def attempt(buffer: Buffer, operation: str, arguments: dict[str, Any]) -> Outcome:
    """Call one operation and report how it ended."""
    return outcome_of(buffer.rank, lambda: call(buffer, operation, arguments))


def outcome_of(rank: int, function: Callable[[], Any]) -> Outcome:
    start = time.monotonic()
    try:
        function()
    except (Error, MemoryError) as error:
        peer = getattr(error, "peer", None)
        kind = type(error).__name__
        return Outcome(rank, kind, str(error), peer, time.monotonic() - start)
    return Outcome(rank, "", seconds=time.monotonic() - start)


def check_round_trips(buffer: Buffer, inputs: Inputs) -> None:
    """Run dispatch and combine in both modes and compare every result with the reference."""
    rank, config = inputs.rank, inputs.config
    for low_latency in (False, True):
        prefix = "low_latency_" if low_latency else ""
        layout = RecvLayout.EXPERT_PADDED
        expected = getattr(reference, f"{prefix}dispatch")(
            inputs.xs, inputs.ids, inputs.weights, config=config, recv_layout=layout
        )
        output: DispatchOutput = call(
            buffer, f"{prefix}dispatch", {**inputs.dispatch_arguments(), "recv_layout": layout}
        )
        oracle.assert_dispatch_equal(output, expected[rank], rank=rank)
        ys = [entry.x for entry in expected]
        sums = getattr(reference, f"{prefix}combine")(
            ys, [entry.handle for entry in expected], apply_weights=True
        )
        result: CombineOutput = call(
            buffer,
            f"{prefix}combine",
            {"y": ys[rank], "handle": output.handle, "apply_weights": True},
        )
        oracle.assert_combine_equal(result, sums[rank], rank=rank)


def gather(group: Any, value: Any) -> list[Any]:
    """Return every rank's value, of any kind of group."""
    return as_group(group).all_gather(value)
