# SPDX-License-Identifier: Apache-2.0
"""Ranks that reach each other by loads and stores, and the kernels they exchange rows with.

All ranks of a buffer are one domain; with several nodes, those of a node are one and those of a
rail another.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from deepcomm._C import kernels
from deepcomm.backends.cuda.carrier import REACHED, Carrier, NetworkCarrier
from deepcomm.backends.cuda.exchange import CountReport, Exchange, MirroredExchange, Workspace
from deepcomm.backends.cuda.functions import Functions
from deepcomm.errors import CommTimeout, InvalidArgument
from deepcomm.group import Group, agree_on
from deepcomm.topology import Topology

if TYPE_CHECKING:
    from deepcomm.backends.cuda.failure import Failure
    from deepcomm.backends.cuda.network import Network
    from deepcomm.backends.cuda.runtime import Function, KernelParams, Runtime
    from deepcomm.config import BufferConfig

__all__ = ["Domain", "Machine", "Position"]

LOG = logging.getLogger("deepcomm")
HOST_MARGIN_S = 5.0
"""How much longer than the device the host waits, so that the device says what is missing."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the domains of one rank share.

    Attributes:
        num_sms: Of an operation.
        failure: What kernels leave behind when something goes wrong.
    """

    runtime: Runtime
    num_sms: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Position:
    """Where a domain lies among all ranks.

    Attributes:
        first_rank: Its first rank.
        rank_step: From one of its ranks to the next.
        num_origins: Nodes whose tokens its ranks send on (csrc/layout/plan.hpp).
        is_rail: Whether its ranks are those of a rail.
        networks: Kinds of what is between them where they are out of each other's reach, the best
            one first.
    """

    first_rank: int = 0
    rank_step: int = 1
    num_origins: int = 1
    is_rail: bool = False
    networks: tuple[str, ...] = ()

    @property
    def is_carried(self) -> bool:
        """Whether a network is between its ranks."""
        return bool(self.networks)


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
        self.position = position
        self.topology = Topology(group.rank, group.size, group.size)
        self.config = config
        self.num_local_experts = config.num_experts // group.size
        self._group = group
        self.functions: Functions
        self.functions, self.workspace, self.scratch_counts = agree_on(
            group, "Buffer", self._prepare
        )
        self.exchange = self._open_exchange(config)
        self.report_tag = 0
        self.num_launches = 0
        self._network: Network | None = None
        self.carrier: Carrier = self._open_carrier()

    def _prepare(self) -> tuple[Functions, Workspace, torch.Tensor]:
        """Load kernels and reserve what outlives any growth."""
        config, position = self.config, self.position
        num_ranks, num_counts = self.topology.num_ranks, 2 * self.num_local_experts + 3
        return (
            Functions.load(self.runtime, config, self.topology, position),
            Workspace(self.runtime, config, num_ranks, position.num_origins),
            torch.zeros(num_counts, dtype=torch.int32, device=self.device),
        )

    def _open_exchange(self, config: BufferConfig) -> Exchange:
        kind = MirroredExchange if self.position.is_carried else Exchange
        return kind(self.runtime, self._group, config, self.topology, self.position.num_origins)

    def _open_carrier(self) -> Carrier:
        if not self.position.is_carried:
            return REACHED
        kinds, config = self.position.networks, self.config
        network = self.runtime.network(self._group, config.timeout_s, config.traffic_class, kinds)
        self._network = network
        try:
            self.mirrored.join(network)
            return agree_on(self._group, "Buffer", lambda: NetworkCarrier(self, network))
        except BaseException:
            network.abort()
            network.close()
            raise

    @property
    def network_name(self) -> str | None:
        """What is between its ranks; None where that is nothing."""
        return None if self._network is None else self._network.name

    @property
    def mirrored(self) -> MirroredExchange:
        """The memory of a carried domain."""
        assert isinstance(self.exchange, MirroredExchange)
        return self.exchange

    def reserve(self, max_tokens: int) -> Exchange:
        """Return memory for more tokens a rank, to move to; collective."""
        exchange = self._open_exchange(replace(self.config, max_tokens_per_rank=max_tokens))
        if isinstance(exchange, MirroredExchange) and self._network is not None:
            try:
                exchange.join(self._network)
            except BaseException:
                exchange.close()
                raise
        return exchange

    def move_to(self, exchange: Exchange) -> None:
        """Use other memory from now on; views keep the old one."""
        self.config = replace(self.config, max_tokens_per_rank=exchange.max_tokens)
        previous, self.exchange = self.exchange, exchange
        previous.close()

    def close(self) -> None:
        """Free the memory once no view is left; idempotent."""
        self.carrier.close()
        self.exchange.close()

    def launch(
        self,
        function: Function,
        grid: int,
        params: KernelParams,
        *,
        meets: bool = False,
        has_counts: bool = False,
    ) -> None:
        """Launch a kernel of an operation: one that meets, and tells counts, or one after it."""
        if meets:
            self.carrier.follow()
        self.runtime.launch(function, grid, params)
        self.num_launches += 1
        if meets:
            self.carrier.meet(has_counts=has_counts)

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
        return meet

    def wait_report(self, num_waits: int) -> CountReport:
        """Wait for the counts of the operation at hand.

        Args:
            num_waits: How often the device may wait for ``timeout_s`` before.

        Raises:
            InvalidArgument: A graph is being captured.
            CommTimeout: A peer did not come within ``timeout_s``.
        """
        self.await_word(self.workspace.report_memory.address, self.report_tag, num_waits)
        return self.workspace.report

    def await_word(self, address: int, expected: int, num_waits: int) -> None:
        """Wait until the device has written a word of host memory; as ``wait_report``."""
        if self.runtime.is_capturing():
            raise InvalidArgument(
                "num_recv_tokens: expected a capacity while a CUDA graph is captured, got None: "
                "the host would have to wait for the counts"
            )
        record = self.failure.record_address
        limit_s = num_waits * self.config.timeout_s + HOST_MARGIN_S
        late_s = min(self.config.late_warning_s, self.config.timeout_s / 2)
        start = time.monotonic()
        if self.runtime.wait_word(address, expected, record, late_s):
            return
        if not self.failure.failed:
            LOG.warning(
                "dispatch: rank %d: no counts from all ranks after %g s", self.failure.rank, late_s
            )
            left_s = limit_s - (time.monotonic() - start)
            if self.runtime.wait_word(address, expected, record, left_s):
                return
        if self.failure.failed:
            self.failure.check_usable("dispatch")
        self.failure.raise_fatal(
            CommTimeout(
                f"dispatch: rank {self.failure.rank}: the device did not answer "
                f"within {limit_s:g} s"
            )
        )
        raise AssertionError  # unreachable: raise_fatal raises
