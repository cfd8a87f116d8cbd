# SPDX-License-Identifier: Apache-2.0
"""Ranks that end or stop in the middle of an operation: what the ranks of those tests do."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from trap.rounds import (
    OPERATIONS,
    Inputs,
    Outcome,
    Place,
    arguments_of,
    attempt,
    check_round_trips,
    gather,
    open_buffer,
    outcome_of,
)

from deepcomm._C import cpu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deepcomm import Buffer

ROUNDS = 4


@dataclass(frozen=True)
class Fault:
    """Where the faulty rank stands when it ends or stops: about to call a native step."""

    operation: str
    owner: str
    step: str

    def __str__(self) -> str:
        return f"{self.operation}-before-{self.step}"

    @contextlib.contextmanager
    def strikes(self, action: Callable[[], None]) -> Iterator[None]:
        """Run ``action`` once, before this process's next such step."""
        owner = getattr(cpu, self.owner)
        original = getattr(owner, self.step)

        def step(*args: Any) -> Any:
            setattr(owner, self.step, original)
            action()
            return original(*args)

        setattr(owner, self.step, step)
        try:
            yield
        finally:
            setattr(owner, self.step, original)


FAULTS = (
    Fault("dispatch", "DispatchOp", "announce"),
    Fault("dispatch", "DispatchOp", "push"),
    Fault("dispatch", "DispatchOp", "receive"),
    Fault("combine", "CombineOp", "stage"),
    Fault("combine", "CombineOp", "finish"),
    Fault("low_latency_dispatch", "LowLatencyDispatchOp", "send"),
    Fault("low_latency_dispatch", "LowLatencyDispatchOp", "receive"),
    Fault("low_latency_combine", "LowLatencyCombineOp", "open"),
    Fault("low_latency_combine", "LowLatencyCombineOp", "send"),
    Fault("low_latency_combine", "LowLatencyCombineOp", "finish"),
)

BEFORE_OPENING = tuple(
    Fault(operation, "SlotRing", "check_free")
    for operation in ("low_latency_dispatch", "low_latency_combine")
)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stall() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def run_out_of_memory() -> None:
    raise MemoryError("no memory for the rows")


@dataclass(frozen=True)
class Plan:
    """What happens in the middle of an operation of some ranks."""

    place: Place
    fault: Fault
    victims: tuple[int, ...]
    timeout_s: float
    action: Callable[[], None] = kill


@dataclass(frozen=True)
class Report:
    """What a rank saw: how its operation ended, and how each later one did."""

    outcome: Outcome
    later: list[Outcome]
    close_s: float
    warnings: list[str]
    pid: int


class Warnings(logging.Handler):
    """Keeps the messages of deepcomm's log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        logging.getLogger("deepcomm").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def repeat_until_error(buffer: Buffer, operation: str, arguments: dict[str, Any]) -> Outcome:
    """Repeat an operation; an error comes in the round of the fault or in the next."""
    for _ in range(ROUNDS):
        outcome = attempt(buffer, operation, arguments)
        if outcome.kind:
            break
    return outcome


def later_calls(buffer: Buffer, valid: dict[str, dict[str, Any]], hook: Any) -> list[Outcome]:
    """Try every operation and a hook on a buffer that has failed."""
    outcomes = [attempt(buffer, operation, valid[operation]) for operation in OPERATIONS]
    return [*outcomes, outcome_of(buffer.rank, hook)]


def run_fault(group: Any, plan: Plan) -> Report:
    """Let victims end or stop in mid-operation; survivors report how they learn of it."""
    warnings = Warnings()
    buffer = open_buffer(
        group, plan.place, timeout_s=plan.timeout_s, late_warning_s=plan.timeout_s / 4
    )
    inputs = Inputs(buffer)
    valid = {name: arguments_of(buffer, name, inputs) for name in OPERATIONS}
    pending = buffer.low_latency_dispatch(**inputs.dispatch_arguments(), return_hook=True)
    pids = gather(group, os.getpid())
    operation, strike = plan.fault.operation, contextlib.nullcontext()
    if operation.startswith("low_latency"):  # its hooks come in order
        assert pending.hook is not None
        pending.hook()
        gather(group, None)
    if buffer.rank in plan.victims:
        strike = plan.fault.strikes(plan.action)
    with strike:
        outcome = repeat_until_error(buffer, operation, valid[operation])
    if plan.action is stall:
        resume(group, plan, pids)
    later = later_calls(buffer, valid, pending.hook)
    closing = outcome_of(buffer.rank, buffer.close)
    return Report(outcome, later, closing.seconds, warnings.messages, os.getpid())


def resume(group: Any, plan: Plan, pids: list[int]) -> None:
    """Let the victim go on when all survivors have failed."""
    store = dist.PrefixStore(f"faults/{plan.fault}", group.get_group_store())
    rank = dist.get_rank(group)
    store.set(str(rank), "failed")
    (victim,) = plan.victims
    others = [str(other) for other in range(len(pids)) if other not in (rank, victim)]
    store.wait(others, timedelta(seconds=30))
    if rank == (victim + 1) % len(pids):
        os.kill(pids[victim], signal.SIGCONT)


def run_stalls(group: Any, plan: Plan) -> list[Report]:
    """Stall the victim in each operation in turn, on a new buffer each time; the group survives."""
    reports = []
    for fault in FAULTS:
        reports.append(run_fault(group, replace(plan, fault=fault)))
        gather(group, None)
    with open_buffer(group, plan.place) as buffer:
        check_round_trips(buffer, Inputs(buffer))
    return reports


def segments_of(pids: set[int]) -> list[str]:
    """Return the names that these processes have left in shared memory."""
    return [
        path.name
        for path in Path("/dev/shm").glob("deepcomm-*")
        if any(f"-{pid}-" in path.name for pid in pids)
    ]


def check_only_close_works(report: Report) -> None:
    """Every operation and a pending hook have raised by name; closing took no time."""
    names = [*OPERATIONS, "low_latency_dispatch"]
    for name, outcome in zip(names, report.later, strict=True):
        called_before = outcome.message.endswith("expected one call of its hook, got a second")
        if not called_before:
            assert outcome.kind == "CommError", outcome
            assert outcome.message.startswith(f"{name}: the buffer can only be closed after: ")
        assert outcome.seconds < 0.5, outcome
    assert report.close_s < 1.0
