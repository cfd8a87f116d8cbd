# SPDX-License-Identifier: Apache-2.0
"""What a CPU buffer chose, in readable lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepcomm.backends.rail import GlooRail
    from deepcomm.config import BufferConfig
    from deepcomm.topology import Topology

__all__ = ["Choices", "explain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What was asked for, found and chosen."""

    config: BufferConfig
    topology: Topology
    rail: GlooRail | None
    isa: str
    num_threads: int
    num_cores: int
    num_bytes: int
    max_idle_result_bytes: int


def explain(choices: Choices) -> str:
    """Return the choices and their reasons, one a line."""
    config, topology = choices.config, choices.topology
    threads = "as asked" if config.num_threads else "cores / ranks of the node"
    growable = " (growable)" if config.growable else ""
    lines = [
        "backend    cpu: POSIX shared memory inside a node",
        f"topology   rank {topology.rank} of {topology.num_ranks}, "
        f"{topology.num_nodes} node(s) of {topology.ranks_per_node} "
        "(ranks that see each other's shared memory, or ranks_per_node)",
        f"rail       {rail_line(choices)}",
        f"isa        {choices.isa} (best of this machine, or DEEPCOMM_CPU_ISA)",
        f"threads    {choices.num_threads} of {choices.num_cores} cores ({threads})",
        f"ring       {config.num_generations} generations, {config.num_generations - 1} of "
        "which can be leased to views",
        f"slots      {config.num_low_latency_slots} low-latency operations in flight",
        f"memory     {choices.num_bytes / 2**20:.1f} MiB reserved for "
        f"{config.max_tokens_per_rank} tokens a rank{growable}",
        f"results    large ones that are no views take turns in memory of which at most "
        f"{choices.max_idle_result_bytes / 2**20:.1f} MiB are kept idle",
        f"timeout    {config.timeout_s:g} s; late peers are logged after "
        f"{config.late_warning_s:g} s",
    ]
    return "\n".join(lines)


def rail_line(choices: Choices) -> str:
    """Return the transport between nodes."""
    if choices.rail is None:
        return "none: one node"
    return f"gloo over {choices.rail.address} to ranks {choices.topology.rail_ranks}"
