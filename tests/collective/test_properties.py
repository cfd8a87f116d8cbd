# SPDX-License-Identifier: Apache-2.0
"""Shapes and routings that hypothesis thinks of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from collective.case import WIRES, Case, Inputs, make_rows
from collective.scenario import exchange, low_latency_exchange
from collective.session import Oracle, Session
from hypothesis import HealthCheck, assume, given, settings

from deepcomm import RecvLayout
from deepcomm.testing import LocalCluster
from deepcomm.testing.oracle import ROUTING_KINDS

CLUSTERS = [(1, 1), (2, 2), (2, 1), (3, 3), (4, 4), (4, 2), (5, 5), (6, 3), (6, 2)]
THOROUGH = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_ranks, per_node = draw(st.sampled_from(CLUSTERS))
    experts = draw(st.integers(1, 9))
    layout = draw(st.sampled_from(RecvLayout))
    wire = draw(st.sampled_from(WIRES))
    padded = layout is RecvLayout.EXPERT_PADDED
    unit = 8 if wire in ("bf16", "fp16", "fp32") else 16
    return Case(
        num_ranks=num_ranks,
        ranks_per_node=per_node,
        num_tokens=draw(st.integers(1, 20)),
        even=draw(st.booleans()),
        hidden=unit * draw(st.integers(1, 40)),
        num_topk=draw(st.integers(1, min(32, num_ranks * experts))),
        experts_per_rank=experts,
        layout=layout,
        wire=wire,
        routing=draw(st.sampled_from(ROUTING_KINDS)),
        id_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        alignment=draw(st.integers(1, 20)) if layout is RecvLayout.EXPERT else 1,
        capacity=None if padded else draw(st.none() | st.integers(0, 60)),
        strided=draw(st.booleans()),
        num_threads=draw(st.sampled_from([None, 2])),
    )


@THOROUGH
@given(cases())
def test_any_case_equals_reference(case: Case) -> None:
    oracle = Oracle()
    LocalCluster(case.num_ranks).run(lambda group: exchange(group, case, oracle))


@THOROUGH
@given(cases())
def test_any_low_latency_case_equals_reference(case: Case) -> None:
    assume(case.layout is not RecvLayout.EXPERT)
    oracle = Oracle()
    LocalCluster(case.num_ranks).run(lambda group: low_latency_exchange(group, case, oracle))


@dataclass(frozen=True)
class Step:
    """One operation of a random program, the same on all ranks."""

    kind: str
    round_idx: int
    which: int
    flag: bool


STEPS = st.lists(
    st.builds(
        Step,
        kind=st.sampled_from(
            ["dispatch", "cached", "combine", "in_place", "keep", "drop", "send", "hook", "back"]
        ),
        round_idx=st.integers(0, 6),
        which=st.integers(0, 5),
        flag=st.booleans(),
    ),
    min_size=5,
    max_size=40,
)


class Program:
    """Runs steps on one rank; what a step needs and lacks makes it do nothing."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.known: list[Any] = [session.dispatch(0)]
        self.landed: list[Any] = []
        self.flying: list[Any] = []

    def run(self, step: Step) -> None:
        session, known = self.session, self.known[step.which % len(self.known)]
        if step.kind == "dispatch":
            self.known.append(session.dispatch(step.round_idx, has_weights=step.flag))
        elif step.kind == "cached":
            self.known.append(session.dispatch(step.round_idx, cached=known, owned=step.flag))
        elif step.kind == "combine":
            session.combine(known, carried=step.flag, extras=not step.flag)
        elif step.kind == "in_place":
            session.combine(known, in_place=True, extras=step.flag)
        elif step.kind == "drop" and len(self.known) > 1:
            self.known.remove(known)
        elif step.kind == "send" and len(self.flying) < 4:
            self.flying.append(session.low_latency_dispatch(step.round_idx, return_hook=True))
        elif step.kind == "back" and self.landed and len(self.flying) < 4:
            one = self.landed[step.which % len(self.landed)]
            self.flying.append(session.low_latency_combine(one, return_hook=step.flag))
        elif step.kind == "hook" and self.flying:
            self._land()

    def _land(self) -> None:
        one = self.flying.pop(0)
        if one.actual.hook is not None:
            one.finish()
        if hasattr(one, "expected"):
            self.landed.append(one)

    def finish(self) -> None:
        while self.flying:
            self._land()
        for one in self.known:
            self.session.combine(one)


@THOROUGH
@given(STEPS, st.sampled_from([(3, 3), (4, 2)]), st.sampled_from(RecvLayout))
def test_any_order_of_operations_equals_reference(
    steps: list[Step], cluster: tuple[int, int], layout: RecvLayout
) -> None:
    low = layout is not RecvLayout.EXPERT
    case = Case(num_ranks=cluster[0], ranks_per_node=cluster[1], layout=layout, num_tokens=6)
    oracle = Oracle()

    def body(group: Any) -> None:
        with Session(group, case, oracle) as session:
            program = Program(session)
            for step in steps:
                if low or step.kind not in ("send", "back", "hook"):
                    program.run(step)
            program.finish()

    LocalCluster(case.num_ranks).run(body)


@st.composite
def routings(draw: st.DrawFn) -> tuple[Case, Inputs]:
    """Ids drawn one by one, so that small failures are found."""
    num_ranks, per_node = draw(st.sampled_from([(2, 2), (2, 1), (3, 3), (4, 2)]))
    experts, num_topk = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    layout = draw(st.sampled_from(RecvLayout))
    case = Case(
        num_ranks=num_ranks,
        ranks_per_node=per_node,
        num_tokens=4,
        even=True,
        hidden=8,
        num_topk=num_topk,
        experts_per_rank=experts,
        layout=layout,
    )
    row = st.lists(
        st.integers(0, case.num_experts - 1), min_size=num_topk, max_size=num_topk, unique=True
    )
    hidden = st.lists(st.booleans(), min_size=num_topk, max_size=num_topk)
    ids, xs, weights = [], [], []
    for rank in range(num_ranks):
        count = draw(st.integers(0, case.num_tokens))
        rows = [draw(row) for _ in range(count)]
        masks = [draw(hidden) for _ in range(count)]
        ids.append(torch.tensor(rows, dtype=torch.int64).reshape(count, num_topk))
        ids[-1][torch.tensor(masks, dtype=torch.bool).reshape(count, num_topk)] = -1
        xs.append(make_rows(case, rank, 0)[:count])
        weights.append(torch.rand(count, num_topk))
    return case, Inputs(xs, ids, weights)


@THOROUGH
@given(routings())
def test_any_routing_equals_reference(drawn: tuple[Case, Inputs]) -> None:
    case, inputs = drawn
    oracle = Oracle()
    oracle.get(("inputs", 0), lambda: inputs)

    def body(group: Any) -> None:
        with Session(group, case, oracle) as session:
            one = session.dispatch(0)
            session.combine(one, carried=True)
            session.combine(session.dispatch(0, cached=one))
            if case.layout is not RecvLayout.EXPERT:
                session.low_latency_combine(session.low_latency_dispatch(0))

    LocalCluster(case.num_ranks).run(body)
