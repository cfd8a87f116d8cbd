# SPDX-License-Identifier: Apache-2.0
"""Short scenarios of the high-throughput operations, for attacks on their kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from collective.case import TIMEOUT_S, Case
from collective.scenario import exchange
from collective.session import Oracle, Session
from emulated.cluster import Settings
from emulated.runtime import run_emulated

from deepcomm import RecvLayout
from deepcomm.errors import CommError, CommTimeout, InvalidArgument
from deepcomm.testing import LocalGroup

HIGH_THROUGHPUT_ONLY = {"num_low_latency_slots": 0}
TOKEN, EXPERT, PADDED = RecvLayout


def exchange_briefly(session: Session) -> None:
    """Every reuse of memory between operations: landing areas, combine region, routing tables."""
    first = session.dispatch(0)
    session.combine(first)
    session.combine(first, carried=True)
    again = session.dispatch(1, cached=first)
    session.combine(again, apply_weights=session.case.layout is not TOKEN)
    session.combine(session.dispatch(2))


def exchange_once(session: Session) -> None:
    session.combine(session.dispatch(0))


def refuse_and_go_on(session: Session) -> None:
    """Ids out of range on rank 1, between good operations."""
    session.combine(session.dispatch(0))
    inputs, rank = session.inputs(0), session.rank
    ids = inputs.ids[rank].clone()
    if rank == 1:
        ids[0, 0] = session.case.num_experts
    try:
        session.buffer.dispatch(inputs.xs[rank], ids, inputs.weights[rank])
    except (CommError, InvalidArgument) as error:
        if isinstance(error, InvalidArgument) == (rank == 1):
            session.rewind(0)
            session.combine(session.dispatch(0))
            return
    raise AssertionError(f"rank {rank}: the refusal was not told as it should be")


def exchange_for_ever(session: Session) -> None:
    """Repeat dispatch and combine, whatever they give."""
    inputs, rank, layout = session.inputs(0), session.rank, session.case.layout
    for _ in range(1000):
        received = session.buffer.dispatch(
            inputs.xs[rank], inputs.ids[rank], inputs.weights[rank], recv_layout=layout
        )
        session.buffer.combine(received.x, received.handle)


def exchange_emulated(settings: Settings, case: Case, oracle: Oracle) -> None:
    """Every kind of dispatch and combine once, on all ranks of a cluster."""
    run_emulated(
        lambda group: exchange(group, case, oracle, **HIGH_THROUGHPUT_ONLY),
        case.num_ranks,
        settings,
    )


def exchange_until_failure(group: LocalGroup, case: Case, oracle: Oracle) -> None:
    """On one rank; what fails in a combine is raised by the next operation."""
    with Session(group, case, oracle, **HIGH_THROUGHPUT_ONLY) as session:
        exchange_for_ever(session)


def run_out_of_time(session: Session) -> None:
    """Operations whose waits fail wherever they happen to be."""
    with pytest.raises(CommTimeout):
        exchange_for_ever(session)


@dataclass(frozen=True)
class Scenario:
    """What all ranks do, and with which shapes."""

    case: Case
    play: Callable[[Session], None] = exchange_briefly
    num_sms: int = 2
    timeout_s: float = TIMEOUT_S
    seeds_at_once: int = 1
    has_network: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Of the buffer."""
        rail = {"rail": "nccl"} if self.has_network else {}
        return {**HIGH_THROUGHPUT_ONLY, "timeout_s": self.timeout_s, **rail}


def small(layout: RecvLayout, wire: Any = "bf16", **fields: Any) -> Case:
    shape: dict[str, Any] = {"num_ranks": 3, "num_tokens": 20, "routing": "uniform"}
    return Case(layout=layout, wire=wire, **(shape | fields))


def full(layout: RecvLayout, wire: Any = "bf16", **fields: Any) -> Case:
    """Every token goes to every expert of two ranks."""
    num_topk = 2 * fields.get("experts_per_rank", 1)
    shape: dict[str, Any] = {"num_ranks": 2, "even": True, "experts_per_rank": 1}
    return small(layout, wire, num_topk=num_topk, **(shape | fields))


# In the order in which they are tried: cheap ones first.
SCENARIOS: dict[str, Scenario] = {
    # A warp pushes whole chunks of rows, then one of a single row.
    "long-token": Scenario(full(TOKEN, num_tokens=33), exchange_once, num_sms=1),
    "lost": Scenario(small(TOKEN, capacity=4, num_topk=3), exchange_once),
    # Scales that bulk copies can move.
    "expert-wide": Scenario(small(EXPERT, "fp8", hidden=512), exchange_once),
    # A warp sends whole chunks of tokens, and counts them in several steps.
    "long-expert": Scenario(full(EXPERT, num_tokens=136, experts_per_rank=4), exchange_once),
    "expert": Scenario(small(EXPERT, alignment=4)),
    "expert-fp8": Scenario(small(EXPERT, "fp8_ue8m0"), exchange_once),
    "token-fp8": Scenario(small(TOKEN, "fp8"), exchange_once),
    "padded-scaled": Scenario(small(PADDED, "scaled"), exchange_once),
    "refused": Scenario(small(TOKEN, num_tokens=4, even=True), refuse_and_go_on),
    "token": Scenario(small(TOKEN)),
    # Two stages, the second of which tells the first one's ranks of rows that were lost.
    "nodes": Scenario(
        small(TOKEN, num_ranks=4, ranks_per_node=2, num_tokens=10, num_topk=3, capacity=4),
        exchange_once,
    ),
    # Rails over a network, with everything that it carries.
    "carried": Scenario(
        small(TOKEN, num_ranks=2, ranks_per_node=1, num_tokens=10, num_topk=3), has_network=True
    ),
    "carried-lost": Scenario(
        small(EXPERT, num_ranks=2, ranks_per_node=1, num_tokens=6, num_topk=3, capacity=4),
        exchange_once,
        has_network=True,
    ),
    # Warps count more than one batch of tokens.
    "batches": Scenario(
        small(TOKEN, num_ranks=1, num_tokens=264, even=True, num_topk=1, hidden=16, capacity=4),
        exchange_once,
        num_sms=1,
    ),
    # Waits run out in the middle of things.
    "hasty": Scenario(
        full(EXPERT, num_tokens=136, experts_per_rank=4),
        run_out_of_time,
        num_sms=3,
        timeout_s=2e-4,
        seeds_at_once=8,
    ),
}


def on_rank(group: Any, scenario: Scenario, oracle: Oracle) -> None:
    with Session(group, scenario.case, oracle, **scenario.options) as session:
        scenario.play(session)
