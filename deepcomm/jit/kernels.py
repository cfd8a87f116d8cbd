# SPDX-License-Identifier: Apache-2.0
"""The list of kernels: what ``deepcomm compile`` compiles, tests run and the host may launch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepcomm.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["KERNELS", "Kernel", "SpecParameter", "spec_grid"]


@dataclass(frozen=True, slots=True)
class SpecParameter:
    """One compile-time choice of a kernel: a template argument.

    Attributes:
        name: As in the kernel's template, in snake case.
        values: What ``deepcomm compile`` compiles unless told otherwise.
    """

    name: str
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One ``__global__`` function.

    Attributes:
        name: Its name in namespace ``deepcomm::kernels``; a template of the parameters in ``spec``.
        source: The file that defines it, relative to the folder of the sources.
        shared: The struct behind its dynamic shared memory, in the same namespace and a template of
            the same parameters; None without any.
        spec: Its template parameters, in order.
        options: Further options of the compiler.
        constants: Names of global constants that it shows to the host.
        uses_nccl: Whether it includes NCCL's headers.
    """

    name: str
    source: str
    shared: str | None = None
    spec: tuple[SpecParameter, ...] = ()
    options: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    uses_nccl: bool = False


NUM_RANKS = SpecParameter("num_ranks", (2, 8))
HIDDEN = SpecParameter("hidden", (7168,))
NUM_ORIGINS = SpecParameter("num_origins", (1, 2))
"""Nodes whose tokens a rank sends on: all inside a node of several, else one."""
BY_EXPERT = SpecParameter("by_expert", (False, True))
PHASES = SpecParameter("phases", (1, 2, 3, 5, 6))
"""Of a low-latency launch: send, receive, both; over several nodes send, receive."""
COMBINE_PHASES = SpecParameter("phases", (*PHASES.values, 67, 13, 14, 28, 44))
"""The same, both where sums are kept; over carried rails send, receive, announce, pass on."""
NUM_THREADS = SpecParameter("num_threads", (256,))

KERNELS: tuple[Kernel, ...] = (
    Kernel("probe_signal", "kernels/probe/signal.cuh"),
    Kernel("probe_claim", "kernels/probe/claim.cuh"),
    Kernel("probe_bulk_copy", "kernels/probe/bulk_copy.cuh", shared="BulkCopyShared"),
    Kernel("probe_bulk_put", "kernels/probe/bulk_put.cuh", shared="BulkPutShared"),
    Kernel("probe_ring", "kernels/probe/ring.cuh"),
    Kernel("probe_packet", "kernels/probe/packet.cuh"),
    Kernel("probe_barrier_fold", "kernels/probe/barrier_fold.cuh"),
    Kernel(
        "dispatch_count",
        "kernels/dispatch/count.cuh",
        shared="CountShared",
        spec=(NUM_RANKS, SpecParameter("num_experts", (256,)), NUM_ORIGINS),
    ),
    Kernel(
        "dispatch_send",
        "kernels/dispatch/kernel.cuh",
        shared="SendShared",
        spec=(NUM_RANKS, HIDDEN, SpecParameter("wire", (0, 1, 2)), BY_EXPERT),
    ),
    Kernel("dispatch_scales", "kernels/dispatch/scales.cuh"),
    Kernel(
        "combine",
        "kernels/combine/kernel.cuh",
        shared="CombineShared",
        spec=(NUM_RANKS, HIDDEN, BY_EXPERT, NUM_ORIGINS),
    ),
    Kernel(
        "combine_open",
        "kernels/combine/nodes.cuh",
        shared="CombineOpenShared",
        spec=(NUM_RANKS,),
    ),
    Kernel(
        "combine_nodes",
        "kernels/combine/nodes.cuh",
        shared="CombineNodesShared",
        spec=(NUM_RANKS, HIDDEN),
    ),
    Kernel("rail_gate", "kernels/rail/gate.cuh"),
    Kernel("rail_deliver", "kernels/rail/deliver.cuh"),
    Kernel(
        "gin_move",
        "kernels/gin/agent.cuh",
        constants=("gin_numbers", "gin_requirements", "gin_properties"),
        uses_nccl=True,
    ),
    Kernel(
        "low_latency_dispatch",
        "kernels/low_latency/dispatch.cuh",
        shared="LowLatencyDispatchShared",
        spec=(HIDDEN, SpecParameter("rows", (0, 1, 2, 3, 4)), PHASES, NUM_THREADS),
    ),
    Kernel(
        "low_latency_combine",
        "kernels/low_latency/combine.cuh",
        shared="LowLatencyCombineShared",
        spec=(HIDDEN, COMBINE_PHASES, NUM_THREADS),
    ),
    Kernel("low_latency_mask", "kernels/low_latency/mask.cuh"),
    Kernel("low_latency_mark", "kernels/low_latency/mark.cuh"),
    Kernel(
        "low_latency_refuse",
        "kernels/low_latency/refuse.cuh",
        shared="LowLatencyRefuseShared",
        spec=(SpecParameter("has_nodes", (False, True)),),
    ),
    Kernel(
        "low_latency_refuse_carried",
        "kernels/low_latency/refuse_carried.cuh",
        shared="LowLatencyRefuseCarriedShared",
    ),
)


def spec_grid(
    kernel: Kernel, chosen: Mapping[str, Sequence[int]] | None = None
) -> Iterator[dict[str, int]]:
    """Yield every combination of a kernel's compile-time choices.

    Args:
        kernel: Entry of the list.
        chosen: Values that replace those of the list, by parameter; others are ignored.

    Raises:
        InvalidArgument: A parameter has no values.
    """
    chosen = chosen or {}
    choices = [chosen.get(parameter.name, parameter.values) for parameter in kernel.spec]
    for parameter, values in zip(kernel.spec, choices, strict=True):
        if not values:
            raise InvalidArgument(f"{parameter.name}: expected values for {kernel.name}, got none")
    names = [parameter.name for parameter in kernel.spec]
    for values in itertools.product(*choices):
        yield dict(zip(names, values, strict=True))
