# SPDX-License-Identifier: Apache-2.0
"""Runs the backend's operations on mutated kernels, each attack in a process of its own.

A broken kernel may write anywhere, tensors and interpreter included. A process that dies or hangs
has noticed its mutant.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from collective.case import Case
from collective.session import Oracle, Session
from emulated.build import Variant
from emulated.cluster import Settings
from emulated.runtime import run_emulated

from deepcomm import RecvLayout
from deepcomm.errors import CommError, InvalidArgument

LIMIT_S = 200.0
HIGH_THROUGHPUT_ONLY = {"num_low_latency_slots": 0}


def exchange_briefly(session: Session) -> None:
    """Every reuse of memory between operations: landing areas, combine region, routing tables."""
    first = session.dispatch(0)
    session.combine(first)
    session.combine(first, carried=True)
    again = session.dispatch(1, cached=first)
    session.combine(again, apply_weights=session.case.layout is not RecvLayout.TOKEN)
    session.combine(session.dispatch(2))


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


@dataclass(frozen=True)
class Scenario:
    """What all ranks do, and with which shapes."""

    case: Case
    play: Callable[[Session], None] = exchange_briefly
    num_sms: int = 2


def small(layout: RecvLayout, wire: Any = "bf16", **fields: Any) -> Case:
    shape: dict[str, Any] = {"num_ranks": 3, "num_tokens": 20, "routing": "uniform"}
    return Case(layout=layout, wire=wire, **(shape | fields))


SCENARIOS: dict[str, Scenario] = {
    "token": Scenario(small(RecvLayout.TOKEN)),
    "expert": Scenario(small(RecvLayout.EXPERT, alignment=4)),
    "padded": Scenario(small(RecvLayout.EXPERT_PADDED)),
    "token-fp8": Scenario(small(RecvLayout.TOKEN, "fp8")),
    "expert-fp8": Scenario(small(RecvLayout.EXPERT, "fp8_ue8m0")),
    "padded-scaled": Scenario(small(RecvLayout.EXPERT_PADDED, "scaled")),
    "many-tokens": Scenario(small(RecvLayout.TOKEN, num_tokens=80, num_ranks=2, even=True)),
    "many-pairs": Scenario(small(RecvLayout.EXPERT, num_tokens=80, num_ranks=2, even=True)),
    "refused": Scenario(small(RecvLayout.TOKEN, num_tokens=4, even=True), refuse_and_go_on),
}


def on_rank(group: Any, scenario: Scenario, oracle: Oracle) -> None:
    with Session(group, scenario.case, oracle, **HIGH_THROUGHPUT_ONLY) as session:
        scenario.play(session)


def first_failure(name: str, mutant: int, seeds: range, variant: Variant) -> str:
    """Return what the first failing seed raises, "" if none does."""
    torch.set_num_threads(1)
    scenario, oracle = SCENARIOS[name], Oracle()
    for seed in seeds:
        settings = Settings(seed, variant=variant, mutant=mutant, num_sms=scenario.num_sms)
        try:
            run_emulated(
                partial(on_rank, scenario=scenario, oracle=oracle),
                scenario.case.num_ranks,
                settings,
            )
        except Exception as error:  # noqa: BLE001  # whatever a broken kernel leads to
            return f"seed {seed}: {type(error).__name__}: {error}"
    return ""


def attack(name: str, mutant: int, seeds: range, variant: Variant) -> str:
    """Do as first_failure in another process; its death is a failure too."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["emulated.attack"])
    ours, theirs = context.Pipe()
    process = context.Process(target=report, args=(theirs, name, mutant, seeds, variant))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(LIMIT_S) else f"hangs for more than {LIMIT_S:g} s"
    except EOFError:
        process.join()
        return f"dies with code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def report(pipe: Connection, name: str, mutant: int, seeds: range, variant: Variant) -> None:
    pipe.send(first_failure(name, mutant, seeds, variant))
