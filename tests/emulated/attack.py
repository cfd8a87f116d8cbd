# SPDX-License-Identifier: Apache-2.0
"""Runs the backend's operations on mutated kernels, each attack in a process of its own.

A broken kernel may write anywhere, tensors and interpreter included, so ``python -m
emulated.attack`` forks for each line of its input; a child that dies or hangs has noticed its
mutant. ``Attackers`` are the other ends of the pipes.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from collective.session import Oracle
from emulated.build import Variant
from emulated.cluster import Settings
from emulated.operations import SCENARIOS, on_rank
from emulated.runtime import run_emulated

TESTS = Path(__file__).resolve().parents[1]
LIMIT_S = 120.0
MAX_ANSWER = 500


@dataclass(frozen=True)
class Attack:
    """One mutant (0: none) against one scenario, under some schedules."""

    scenario: str
    mutant: int
    first_seed: int
    num_seeds: int


class Attacker:
    """A server of attacks on one variant of the kernels."""

    def __init__(self, variant: Variant) -> None:
        includes = [str(path) for path in variant.includes]
        self._server = subprocess.Popen(
            [sys.executable, "-m", "emulated.attack", variant.name, *includes],
            cwd=TESTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, attack: Attack) -> str:
        """Return what the first failing seed raised, "" if none failed."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(asdict(attack)) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server of attacks has ended: {self._server.wait()}")
        return str(json.loads(answer))

    def close(self) -> None:
        for stream in (self._server.stdin, self._server.stdout):
            assert stream is not None
            stream.close()
        self._server.kill()
        self._server.wait()


class Attackers:
    """Several servers; each attack goes to one that is idle."""

    def __init__(self, variant: Variant, count: int) -> None:
        self.count = count
        self._idle: queue.Queue[Attacker] = queue.Queue()
        for _ in range(count):
            self._idle.put(Attacker(variant))

    def run(self, attack: Attack) -> str:
        attacker = self._idle.get()
        answer = attacker.run(attack)
        self._idle.put(attacker)
        return answer

    def close(self) -> None:
        for _ in range(self.count):
            self._idle.get_nowait().close()


def first_failure(attack: Attack, variant: Variant, oracle: Oracle) -> str:
    scenario = SCENARIOS[attack.scenario]
    for seed in range(attack.first_seed, attack.first_seed + attack.num_seeds):
        settings = Settings(
            seed,
            variant=variant,
            mutant=attack.mutant,
            num_sms=scenario.num_sms,
            has_network=scenario.has_network,
        )
        try:
            run_emulated(
                partial(on_rank, scenario=scenario, oracle=oracle),
                scenario.case.num_ranks,
                settings,
            )
        except Exception as error:  # noqa: BLE001  # whatever a broken kernel leads to
            return f"seed {seed}: {type(error).__name__}: {error}"
    return ""


def in_child(attack: Attack, variant: Variant, oracle: Oracle) -> str:
    """Do as first_failure in a fork of this process."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        answer = first_failure(attack, variant, oracle)[:MAX_ANSWER]
        os.write(theirs, json.dumps(answer).encode())
        os._exit(0)
    os.close(theirs)
    ready, _, _ = select.select([ours], [], [], LIMIT_S)
    answer = os.read(ours, 8 * MAX_ANSWER) if ready else b'"hangs"'
    os.close(ours)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return str(json.loads(answer)) if answer else f"dies with status {status}"


def serve(variant: Variant) -> None:
    torch.set_num_threads(1)  # no thread may be lost by a fork
    logging.disable(logging.WARNING)  # waits that run out are what broken kernels are for
    oracles: dict[str, Oracle] = {}
    for line in sys.stdin:
        attack = Attack(**json.loads(line))
        if attack.scenario not in oracles:
            # Builds and loads the kernels, and computes what is right, once for all children.
            oracle = oracles[attack.scenario] = Oracle()
            first_failure(Attack(attack.scenario, 0, 0, 1), variant, oracle)
        answer = in_child(attack, variant, oracles[attack.scenario])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    name, *folders = sys.argv[1:]
    serve(Variant(includes=tuple(Path(folder) for folder in folders), name=name))
