# SPDX-License-Identifier: Apache-2.0
"""Ranks that reach each other by loads and stores, and the kernels they exchange rows with.

All ranks of a buffer are one domain; with several nodes, those of a node are one and those of a
rail another.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch

from deepcomm._C import kernels
from deepcomm.backends.cuda.exchange import CountReport, Exchange, Workspace
from deepcomm.backends.cuda.functions import Functions
from deepcomm.errors import CommTimeout, InvalidArgument
from deepcomm.group import Group, agree
from deepcomm.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Callable

    from deepcomm.backends.cuda.failure import Failure
    from deepcomm.backends.cuda.runtime import Memory, Runtime
    from deepcomm.config import BufferConfig

__all__ = ["Domain", "Machine", "Position", "agree_on"]

T = TypeVar("T")

LOG = logging.getLogger("deepcomm")
HOST_MARGIN_S = 5.0
"""How much longer than the device the host waits, so that the device says what is missing."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the domains of one rank share.

    Attributes:
        num_sms: Of an operation.
        failure: What kernels leave behind when something goes wrong.
        has_trouble: Word on the device, not 0 while the host may have an error to raise.
    """

    runtime: Runtime
    num_sms: int
    failure: Failure
    has_trouble: Memory


@dataclass(frozen=True, slots=True)
class Position:
    """Where a domain lies among all ranks.

    Attributes:
        first_rank: Its first rank.
        rank_step: From one of its ranks to the next.
        num_origins: Nodes whose tokens its ranks send on (csrc/layout/plan.hpp).
        is_rail: Whether its ranks are those of a rail.
    """

    first_rank: int = 0
    rank_step: int = 1
    num_origins: int = 1
    is_rail: bool = False

    @property
    def combine_origins(self) -> int:
        """As the combine kernel counts them."""
        return 0 if self.is_rail else self.num_origins


class Domain:
    """One rank's part of a domain: symmetric memory, kernels, and one order of operations."""

    def __init__(
        self, group: Group, config: BufferConfig, machine: Machine, position: Position
    ) -> None:
        """Load kernels and reserve memory; collective."""
        runtime = machine.runtime
        self.runtime = runtime
        self.device = runtime.device
        self.num_sms = machine.num_sms
        self.failure = machine.failure
        self._has_trouble = machine.has_trouble
        self.position = position
        self.topology = Topology(group.rank, group.size, group.size)
        self.config = config
        self.num_local_experts = config.num_experts // group.size
        self._group = group
        self.functions: Functions = agree_on(
            group, lambda: Functions.load(runtime, config, self.topology, position)
        )
        self.workspace = Workspace(runtime, config, group.size, position.num_origins)
        self.scratch_counts = torch.zeros(
            2 * self.num_local_experts + 3, dtype=torch.int32, device=self.device
        )
        self.exchange = self._open_exchange()
        self.report_tag = 0

    def _open_exchange(self) -> Exchange:
        return Exchange(
            self.runtime, self._group, self.config, self.topology, self.position.num_origins
        )

    def grow(self, max_tokens: int) -> None:
        """Reserve memory for more tokens a rank instead; collective. Views keep the old one."""
        self.config = replace(self.config, max_tokens_per_rank=max_tokens)
        previous, self.exchange = self.exchange, self._open_exchange()
        previous.close()

    def close(self) -> None:
        """Free the memory once no view is left."""
        self.exchange.close()

    def meet(self, after: Domain | None = None, *, reports: bool = True) -> kernels.MeetParams:
        """Return what an operation hands to its kernels; its header is the caller's to fill.

        Args:
            after: The domain whose stage of the same operation comes before.
            reports: Whether the host hears from here of an operation that does not take place.
        """
        meet = self.exchange.meet_params(
            self.workspace, self.failure, self.topology, self.config.timeout_s
        )
        meet.name_ranks(self.position.first_rank, self.position.rank_step)
        if after is not None:
            meet.verdict_before = after.workspace.verdict.address
        meet.reports = int(reports)
        meet.has_trouble = self._has_trouble.address
        return meet

    def wait_report(self) -> CountReport:
        """Wait for the counts of the operation at hand.

        Raises:
            InvalidArgument: A graph is being captured.
            CommTimeout: A peer did not come within ``timeout_s``.
        """
        if self.runtime.is_capturing():
            raise InvalidArgument(
                "num_recv_tokens: expected a capacity while a CUDA graph is captured, got None: "
                "the host would have to wait for the counts"
            )
        report, record = self.workspace.report, self.failure.record_address
        address = self.workspace.report_memory.address
        late_s = min(self.config.late_warning_s, self.config.timeout_s / 2)
        start = time.monotonic()
        if self.runtime.wait_word(address, self.report_tag, record, late_s):
            return report
        if not self.failure.failed:
            LOG.warning(
                "dispatch: rank %d: no counts from all ranks after %g s", self.failure.rank, late_s
            )
            left_s = self.config.timeout_s + HOST_MARGIN_S - (time.monotonic() - start)
            if self.runtime.wait_word(address, self.report_tag, record, left_s):
                return report
        if self.failure.failed:
            self.failure.check_usable("dispatch")
        self.failure.raise_fatal(
            CommTimeout(
                f"dispatch: rank {self.failure.rank}: the device did not answer within "
                f"{self.config.timeout_s:g} s"
            )
        )
        raise AssertionError  # unreachable: raise_fatal raises


def agree_on(group: Group, produce: Callable[[], T]) -> T:
    """Run ``produce`` on every rank and return the own result; an error ends it on all."""
    results: list[T] = []
    agree(group, "Buffer", lambda: results.append(produce()))
    return results[0]
