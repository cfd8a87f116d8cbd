# SPDX-License-Identifier: Apache-2.0
"""What the ranks do in the tests of ``run_processes``.

In a module of its own, imported as ``collective.spawn_workers``: processes find functions by the
module's name, and a test module has one that only pytest can import.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import torch.distributed as dist

from deepcomm import CommError

if TYPE_CHECKING:
    import torch


def add_up(group: dist.ProcessGroup, start: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = start + dist.get_rank(group)
    dist.all_reduce(total, group=group)
    return os.getpid(), total


def read_variable(_group: dist.ProcessGroup, name: str) -> str | None:
    return os.environ.get(name)


def fail_on_rank_1(group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) == 1:
        time.sleep(0.2)  # rank 0 fails first, but only because rank 1 does
        raise KeyError("the cause")
    raise CommError("a consequence", 1)


def raise_comm_error(_group: dist.ProcessGroup) -> None:
    raise CommError("lost", 7)


class OddError(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def raise_odd_error(_group: dist.ProcessGroup) -> None:
    raise OddError(1, 2)


def leave(group: dist.ProcessGroup) -> int:
    if dist.get_rank(group) == 1:
        time.sleep(1)  # the peer must have come out of making the group
        os._exit(3)
    return 5


def hang(group: dist.ProcessGroup) -> int:
    if dist.get_rank(group) == 0:
        time.sleep(600)
    return os.getpid()
