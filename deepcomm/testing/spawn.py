# SPDX-License-Identifier: Apache-2.0
"""``run_processes``: the ranks of a group as processes, for tests.

Children come from multiprocessing's fork server, which has imported torch once: a rank starts in
milliseconds. What is sent to and from them is pickled by value, tensors included.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, forkserver
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from deepcomm.errors import CommError, Error, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

__all__ = ["run_processes"]

T = TypeVar("T")

GRACE_S = 10.0
"""Seconds that the others may still take when a rank has failed."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What a child needs to know."""

    rank: int
    num_ranks: int
    store: str
    timeout_s: float
    environment: dict[str, str]
    work: bytes


@dataclass(frozen=True, slots=True)
class Failure:
    """How a rank failed: its exception, or what replaces one, and where it was raised."""

    rank: int
    error: BaseException
    text: str


def run_processes(
    function: Callable[..., T],
    num_ranks: int,
    *args: Any,
    env: Sequence[Mapping[str, str]] | None = None,
    timeout_s: float = 60.0,
    may_die: Collection[int] = (),
) -> list[T | None]:
    """Call ``function(group, *args)`` in a process for each rank; return the results by rank.

    ``group`` is ``dist.group.WORLD``, of gloo on the loopback interface. Every process lives until
    all have finished: what a rank leaves early is its own doing.

    Args:
        function: Importable by name, like everything else that is sent.
        num_ranks: R, one process each.
        *args: Passed on, by value.
        env: For each rank, variables to set besides those of this process.
        timeout_s: Seconds after which ranks that have not finished are killed.
        may_die: Ranks whose process may end without a result; their entry is then None.

    Raises:
        BaseException: What the first failing rank raised, with a note naming the rank. A rank that
            failed only because another did (CommError, CommTimeout) is not preferred.
        Error: A process ended without a result; names the rank and the exit code.
        TimeoutError: Ranks did not finish in time; names them.
    """
    if num_ranks < 1 or (env is not None and len(env) != num_ranks):
        raise InvalidArgument(
            f"num_ranks: expected at least 1 and as many as env has entries, got {num_ranks}"
        )
    work = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory(prefix="deepcomm-") as folder:
        # NOTE: not a TCPStore, which looks up the name of whoever connects: seconds where the name
        # service is slow.
        launches = [
            Launch(rank, num_ranks, f"{folder}/store", timeout_s, _environment(env, rank), work)
            for rank in range(num_ranks)
        ]
        with _Children(launches, frozenset(may_die)) as children:
            children.collect(time.monotonic() + timeout_s)
    return children.results()


def _environment(env: Sequence[Mapping[str, str]] | None, rank: int) -> dict[str, str]:
    return {"GLOO_SOCKET_IFNAME": "lo", **os.environ, **(env[rank] if env else {})}


def _start_fork_server() -> None:
    """Start the server from which children are forked, unless it runs.

    It would find this package in the working folder first, of which its parent need not know: a
    checkout that was never built, say, beside an installed package.
    """
    modules = ["torch", "torch.distributed"]
    if sys.version_info >= (3, 11):  # knows PYTHONSAFEPATH
        modules.append("deepcomm.testing.spawn")
    forkserver.set_forkserver_preload(modules)
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONSAFEPATH"]
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before


class _Children:
    """The processes of one run."""

    def __init__(self, launches: list[Launch], may_die: frozenset[int]) -> None:
        context = multiprocessing.get_context("forkserver")
        _start_fork_server()
        self._may_die = may_die
        self._num_ranks = len(launches)
        self._pipes: dict[int, connection.Connection] = {}
        self._results: dict[int, Any] = {}
        self._failures: list[Failure] = []
        self._late: list[int] = []
        self._processes = []
        for launch in launches:
            self._pipes[launch.rank], pipe = context.Pipe()
            process = context.Process(target=_child, args=(launch, pipe), daemon=True)
            process.start()
            pipe.close()
            self._processes.append(process)

    def __enter__(self) -> _Children:
        return self

    def __exit__(self, *_: object) -> None:
        """Let those that are done go, kill the others."""
        for rank, pipe in self._pipes.items():
            if rank in self._results:
                with contextlib.suppress(OSError):
                    pipe.send_bytes(b"")
            else:
                self._processes[rank].kill()
        for process in self._processes:
            process.join(GRACE_S)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        for pipe in self._pipes.values():
            pipe.close()

    def collect(self, deadline: float) -> None:
        """Receive what each rank reports, until all have or the deadline passes."""
        waiting = {pipe: rank for rank, pipe in self._pipes.items()}
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                self._take(waiting.pop(pipe), pipe)  # type: ignore[arg-type,call-overload]
            if self._failures:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        self._late = sorted(waiting.values())

    def _take(self, rank: int, pipe: connection.Connection) -> None:
        try:
            is_result, value, text = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            self._processes[rank].join(GRACE_S)
            if rank in self._may_die:
                self._results[rank] = None
                return
            code = self._processes[rank].exitcode
            error = Error(f"rank {rank} of {self._num_ranks}: the process ended with code {code}")
            self._failures.append(Failure(rank, error, ""))
            return
        if is_result:
            self._results[rank] = value
        else:
            self._failures.append(Failure(rank, value, text))

    def results(self) -> list[Any]:
        """Return the results by rank, or raise what went wrong first."""
        if self._failures:
            first = min(self._failures, key=lambda failure: isinstance(failure.error, CommError))
            if hasattr(first.error, "add_note"):
                first.error.add_note(f"raised on rank {first.rank} of {self._num_ranks}")
                first.error.add_note(first.text)
            raise first.error
        if self._late:
            raise TimeoutError(f"ranks {self._late} of {self._num_ranks} did not finish in time")
        return [self._results[rank] for rank in range(self._num_ranks)]


def _child(launch: Launch, pipe: connection.Connection) -> None:
    """Run one rank and report; leave when the parent says so, or is gone."""
    os.environ.clear()  # the fork server's, of the moment it was started
    os.environ.update(launch.environment)
    faulthandler.enable()
    faulthandler.dump_traceback_later(launch.timeout_s - 0.5 if launch.timeout_s > 1 else 1)
    torch.set_num_threads(1)  # ranks share the cores
    try:
        report = (True, _work(launch), "")
    except BaseException as error:  # noqa: BLE001  # re-raised by the parent
        report = (False, _picklable(error), traceback.format_exc())
    faulthandler.cancel_dump_traceback_later()
    pipe.send_bytes(pickle.dumps(report))
    with contextlib.suppress(EOFError, OSError):
        pipe.recv_bytes()
    sys.stdout.flush()
    sys.stderr.flush()
    # NOTE: not sys.exit(): destructors of a gloo group wait for peers that may be gone.
    os._exit(0)


def _work(launch: Launch) -> Any:
    function, args = pickle.loads(launch.work)
    timeout = timedelta(seconds=launch.timeout_s)
    store = FileStore(launch.store, launch.num_ranks)
    store.set_timeout(timeout)
    dist.init_process_group(
        "gloo", store=store, rank=launch.rank, world_size=launch.num_ranks, timeout=timeout
    )
    return function(dist.group.WORLD, *args)


def _picklable(error: BaseException) -> BaseException:
    """Return the error, or one that says the same where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  # whatever its class's constructor does
        return Error(f"{type(error).__name__}: {error}")
    return error
