# SPDX-License-Identifier: Apache-2.0
"""Argument errors of one rank, found on the host or on the device: all ranks hear and go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from collective.session import Oracle, Session
from gpu.backend_ranks import OPTIONS, error_of, meet

from deepcomm import CommError, CommTimeout, InvalidArgument, RecvLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective.case import Case

BAD_RANK = 1


@dataclass(frozen=True)
class Mistake:
    """What the bad rank changes in the arguments of a dispatch, and what it is told."""

    name: str
    change: Callable[[dict[str, Any], int], None]
    text: str
    on_device: bool


def _out_of_range(arguments: dict[str, Any], num_experts: int) -> None:
    arguments["topk_idx"][-1, 0] = num_experts


def _negative(arguments: dict[str, Any], _: int) -> None:
    arguments["topk_idx"][0, -1] = -2


def _twice(arguments: dict[str, Any], _: int) -> None:
    arguments["topk_idx"][2] = 0


def _narrow(arguments: dict[str, Any], _: int) -> None:
    arguments["x"] = arguments["x"][:, :-8]


def _float_ids(arguments: dict[str, Any], _: int) -> None:
    arguments["topk_idx"] = arguments["topk_idx"].float()


def _cpu_rows(arguments: dict[str, Any], _: int) -> None:
    arguments["x"] = arguments["x"].cpu()


MISTAKES = (
    Mistake("out of range", _out_of_range, "topk_idx: expected ids in", True),
    Mistake("below -1", _negative, "topk_idx: expected ids in", True),
    Mistake("twice", _twice, "expected distinct experts", True),
    Mistake("narrow rows", _narrow, "x: expected", False),
    Mistake("float ids", _float_ids, "topk_idx: expected", False),
    Mistake("rows on the CPU", _cpu_rows, "x: expected", False),
)


def make_mistakes(group: Any, case: Case, oracle: Oracle | None = None) -> int:
    """Let one rank make every mistake in every layout; the buffer works after each of them."""
    count = 0
    with Session(group, case, oracle, **OPTIONS) as session:
        good = session.dispatch(0)
        for layout in RecvLayout:
            for mistake in MISTAKES:
                for capacity in (None, case.num_tokens * case.num_ranks * case.num_topk):
                    if capacity is not None and layout is RecvLayout.EXPERT_PADDED:
                        continue
                    options = {"recv_layout": layout, "num_recv_tokens": capacity}
                    error = error_of(lambda m=mistake, o=options: dispatch(session, m, o))
                    check(session, error, f"{mistake.name}, {options}", mistake.text)
                    count += 1
            session.combine(session.dispatch(1))
        error = error_of(lambda: combine(session, good))
        check(session, error, "combine of narrow rows", "y: expected")
        session.combine(good)
        session.combine(session.dispatch(2), carried=True)
    return count


def dispatch(session: Session, mistake: Mistake, options: dict[str, Any]) -> None:
    """Dispatch and wait for what the device found."""
    case, inputs, rank = session.case, session.inputs(0), session.rank
    arguments = {
        "x": inputs.xs[rank].to(case.device, copy=True),
        "topk_idx": inputs.ids[rank].to(case.device, copy=True),
    }
    if rank == BAD_RANK:
        mistake.change(arguments, case.num_experts)
    output = session.buffer.dispatch(**arguments, **options, async_op=True)
    output.event.synchronize()


def combine(session: Session, good: Any) -> None:
    """Combine with rows of the wrong width on the bad rank."""
    y = torch.zeros_like(good.actual.x)
    if session.rank == BAD_RANK:
        y = y[..., :-8]
    session.buffer.combine(y, good.actual.handle, async_op=True).event.synchronize()


def check(session: Session, error: BaseException | None, what: str, text: str) -> None:
    """Check that the bad rank is told its mistake, and its peers who made it."""
    where = f"{what}: rank {session.rank}: {error!r}"
    if session.rank == BAD_RANK:
        assert isinstance(error, InvalidArgument), where
        assert text in str(error), where
    else:
        assert isinstance(error, CommError), where
        assert not isinstance(error, CommTimeout), where
        assert error.peer == BAD_RANK, where
        assert f"rank {BAD_RANK} refused" in str(error), where
    meet(session.group)


def find_at_next_call(group: Any, case: Case) -> tuple[str, str]:
    """Make a mistake that the host does not wait for; this call or the next one tells."""
    with Session(group, case, **OPTIONS) as session:
        inputs, rank = session.inputs(0), session.rank
        x, ids = (part[rank].to(case.device) for part in (inputs.xs, inputs.ids))
        bad = ids.clone()
        if rank == BAD_RANK:
            bad[0, 0] = case.num_experts
        early = error_of(lambda: session.buffer.dispatch(x, bad, num_recv_tokens=case.num_tokens))
        meet(group)
        error = early or error_of(lambda: session.buffer.dispatch(x, ids))
        if early is not None:  # the host was slow; who has nothing left to raise is told of others
            error_of(lambda: session.buffer.dispatch(x, ids))
        meet(group)
        session.combine(session.dispatch(1))
        return type(error).__name__, str(error)
