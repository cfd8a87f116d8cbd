# SPDX-License-Identifier: Apache-2.0
"""``LocalCluster``: the ranks of a group as threads of this process."""

from __future__ import annotations

import gc
import threading
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch._C._distributed_c10d import HashStore, Store

from deepcomm.errors import CommError, CommTimeout, InvalidArgument
from deepcomm.testing.local_devices import current_device, place_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    import torch

    from deepcomm.backends.cuda.runtime import Runtime

T = TypeVar("T")

__all__ = ["LocalCluster", "LocalGroup"]


class _Meeting:
    """What the ranks of a cluster share: a board to gather on, and one store."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.board: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)
        self.timeout_s = timeout_s
        # NOTE: not a TCPStore, which looks up the name of whoever connects: seconds where the
        # name service is slow.
        self.store = HashStore()

    def wait(self, rank: int) -> None:
        try:
            self.barrier.wait(self.timeout_s)
        except threading.BrokenBarrierError:
            raise CommTimeout(
                f"LocalCluster: rank {rank}: another rank failed or did not come within "
                f"{self.timeout_s:g} s"
            ) from None


@dataclass(frozen=True, slots=True)
class LocalGroup:
    """The group as one rank of a ``LocalCluster`` sees it; pass it to ``Buffer``.

    Attributes:
        rank: This rank's index.
        size: R, ranks of the cluster.
        runtime: What a buffer of this rank runs on, where the cluster chooses it.
    """

    rank: int
    size: int
    _meeting: _Meeting
    runtime: Runtime | None = None

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank."""
        self._meeting.board[self.rank] = value
        self._meeting.wait(self.rank)
        values = list(self._meeting.board)
        self._meeting.wait(self.rank)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._meeting.wait(self.rank)

    def store(self, timeout: timedelta) -> Store:
        """Return the store that all ranks share."""
        self._meeting.store.set_timeout(timeout)
        return self._meeting.store


class LocalCluster:
    """R ranks as threads of one process: for notebooks, debuggers and tests.

    On GPUs each thread has its device and a stream of its own as torch's current ones. Ranks share
    the driver's locks: before a copy between the device and pageable memory (``tensor.cpu()``)
    synchronize the stream, or the copy keeps a lock while it waits for ranks that need it.

    Example:
        >>> LocalCluster(4).run(lambda group: group.rank)
        [0, 1, 2, 3]
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        timeout_s: float = 60.0,
        device: torch.device | str | None = None,
        runtime: Callable[[int, int], Runtime] | None = None,
    ) -> None:
        """Prepare a cluster.

        Args:
            num_ranks: R, one thread each.
            timeout_s: Seconds a rank may wait for the others in the control plane.
            device: "cpu", one GPU for all ranks, or "cuda": rank i on GPU i, starting again where
                there are more ranks than GPUs. None is "cuda" where there are GPUs. Ranks can only
                share a GPU if the driver has been told so before CUDA is first used, which this
                constructor does.
            runtime: Called in each rank's thread with rank and size; makes what the rank's buffers
                run on instead of a device.

        Raises:
            InvalidArgument: ``num_ranks`` is less than 1, or there is no such device.
        """
        if num_ranks < 1:
            raise InvalidArgument(f"num_ranks: expected at least 1, got {num_ranks}")
        self.num_ranks = num_ranks
        self._timeout_s = timeout_s
        self._runtime = runtime
        self._devices = place_ranks("cpu" if runtime is not None else device, num_ranks)

    def run(self, function: Callable[[LocalGroup], T]) -> list[T]:
        """Call ``function(group)`` on every rank and return the results, by rank.

        Raises:
            BaseException: What the first failing rank raised, with a note naming the rank. A rank
                that failed only because another did (CommError, CommTimeout) is not preferred.
        """
        meeting = _Meeting(self.num_ranks, self._timeout_s)
        results: list[Any] = [None] * self.num_ranks
        failures: list[tuple[int, BaseException]] = []

        def work(rank: int) -> None:
            try:
                with current_device(self._devices[rank]):
                    results[rank] = function(self._group(rank, meeting))
            except BaseException as error:  # noqa: BLE001  # re-raised below, in the caller
                failures.append((rank, error))
                meeting.barrier.abort()
                # The rank is dead: so are its buffers, and its peers shall notice.
                traceback.clear_frames(error.__traceback__)
                gc.collect()

        threads = [
            threading.Thread(target=work, args=(rank,), name=f"rank{rank}", daemon=True)
            for rank in range(self.num_ranks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            rank, error = min(failures, key=lambda entry: isinstance(entry[1], CommError))
            if hasattr(error, "add_note"):
                error.add_note(f"raised on rank {rank} of {self.num_ranks}")
            raise error
        return results

    def _group(self, rank: int, meeting: _Meeting) -> LocalGroup:
        runtime = self._runtime(rank, self.num_ranks) if self._runtime else None
        return LocalGroup(rank, self.num_ranks, meeting, runtime)
