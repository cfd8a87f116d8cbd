# SPDX-License-Identifier: Apache-2.0
"""The kernels that a buffer may launch, all of them loaded when it is made.

None is compiled or loaded later: that would take long in the middle of a step, is not allowed while
a graph is captured, and would wait for kernels of ranks that share the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from deepcomm.backends.cuda.low_latency_slots import (
    ANNOUNCE,
    BOTH,
    BOTH_KEEPING,
    CARRIED,
    OVER_NODES,
    PASS_ON,
    RECEIVE,
    SEND,
    find_excess,
    has_nodes,
    is_carried,
)
from deepcomm.backends.cuda.low_latency_status import COMBINE, DISPATCH
from deepcomm.backends.cuda.low_latency_tensors import BF16, KINDS, wire_of
from deepcomm.checks.dispatch import FP8_ALIGN

if TYPE_CHECKING:
    from deepcomm.backends.cuda.domain import Position
    from deepcomm.backends.cuda.runtime import Function, Runtime
    from deepcomm.config import BufferConfig
    from deepcomm.topology import Topology

__all__ = ["Functions", "LowLatencyFunctions"]

NUM_THREADS: Final = 256
"""Of a block of the low-latency kernels."""
WIRES: Final = {"bf16": 0, "fp8": 1, "cast": 2}
"""Template argument by ``RowFormat.wire``."""

Key: TypeAlias = tuple[Any, ...]
Wanted: TypeAlias = dict[Key, tuple[str, dict[str, int]]]
Loaded: TypeAlias = dict[Key, "Function"]


@dataclass(frozen=True, slots=True)
class Functions:
    """Those of the high-throughput operations.

    Attributes:
        count: dispatch_count.
        send: dispatch_send by (wire, by expert); FP8 ones only where rows allow FP8.
        scales: dispatch_scales.
        combine: By whether the layout is an expert one; none on a rail.
        combine_open: Of a rail.
        combine_nodes: Likewise.
    """

    count: Function
    send: dict[tuple[str, bool], Function]
    scales: Function
    combine: dict[bool, Function]
    combine_open: Function | None
    combine_nodes: Function | None

    @staticmethod
    def load(
        runtime: Runtime, config: BufferConfig, topology: Topology, position: Position
    ) -> Functions:
        """Compile and load all that a domain may need."""
        return Functions.of(load(runtime, Functions.wanted(config, topology, position), topology))

    @staticmethod
    def wanted(config: BufferConfig, topology: Topology, position: Position) -> Wanted:
        """Return name and compile-time choices of each."""
        num_ranks = topology.num_ranks
        shape = {"num_ranks": num_ranks, "hidden": config.hidden}
        experts = {
            "num_ranks": num_ranks,
            "num_experts": config.num_experts,
            "num_origins": position.num_origins,
        }
        wires = WIRES if has_fp8(config) else {"bf16": WIRES["bf16"]}
        wanted: Wanted = {
            ("count",): ("dispatch_count", experts),
            ("scales",): ("dispatch_scales", {}),
        }
        if position.is_rail:
            wanted["open",] = ("combine_open", {"num_ranks": num_ranks})
            wanted["nodes",] = ("combine_nodes", shape)
        for by_expert in (False,) if position.is_rail else (False, True):
            if not position.is_rail:
                origins = {"by_expert": by_expert, "num_origins": position.num_origins}
                wanted["combine", by_expert] = ("combine", {**shape, **origins})
            for name, wire in wires.items():
                spec = {**shape, "wire": wire, "by_expert": by_expert}
                wanted["send", name, by_expert] = ("dispatch_send", spec)
        return wanted

    @staticmethod
    def of(loaded: Loaded) -> Functions:
        """Return them by the keys of ``wanted``."""
        return Functions(
            count=loaded["count",],
            send={key[1:]: function for key, function in loaded.items() if key[0] == "send"},
            scales=loaded["scales",],
            combine={key[1]: function for key, function in loaded.items() if key[0] == "combine"},
            combine_open=loaded.get(("open",)),
            combine_nodes=loaded.get(("nodes",)),
        )


@dataclass(frozen=True, slots=True)
class LowLatencyFunctions:
    """Those of the low-latency operations; none where the buffer's sizes are beyond them.

    Attributes:
        mask: Of every buffer.
        refuse: Takes the turn of an operation whose arguments are wrong.
        mark: Where a network carries the rails: tells how far it has come.
        dispatch: By the kind of rows as given, then by phase; over nodes no launch has both.
        combine: By phase.
    """

    mask: Function
    refuse: Function | None
    mark: Function | None
    dispatch: dict[int, dict[int, Function]]
    combine: dict[int, Function]

    @staticmethod
    def load(runtime: Runtime, config: BufferConfig, topology: Topology) -> LowLatencyFunctions:
        """Compile and load all that a buffer may need."""
        loaded = load(runtime, LowLatencyFunctions.wanted(config, topology), topology)
        return LowLatencyFunctions.of(loaded, config)

    @staticmethod
    def wanted(config: BufferConfig, topology: Topology) -> Wanted:
        """Return name and compile-time choices of each."""
        wanted: Wanted = {("mask",): ("low_latency_mask", {})}
        if config.num_low_latency_slots == 0 or find_excess(config, topology) is not None:
            return wanted
        over_nodes = OVER_NODES if has_nodes(config, topology) else 0
        carried = CARRIED if is_carried(config, topology) else 0
        if carried:
            wanted["refuse",] = ("low_latency_refuse_carried", {})
            wanted["mark",] = ("low_latency_mark", {})
        else:
            wanted["refuse",] = ("low_latency_refuse", {"has_nodes": bool(over_nodes)})
        num_threads = {"num_threads": NUM_THREADS}
        for phases in combine_phases(config, topology):
            combine = {"phases": phases | over_nodes | carried, **num_threads}
            wanted[COMBINE, phases] = (COMBINE, {"hidden": config.hidden, **combine})
        for phases in (SEND, RECEIVE) if over_nodes else (SEND, RECEIVE, BOTH):
            shape = {"phases": phases | over_nodes, **num_threads}
            for kind in kinds_of(config):
                # What is received has been cast already.
                rows = wire_of(kind) if phases == RECEIVE else kind
                spec = {"hidden": config.hidden, "rows": rows, **shape}
                wanted[DISPATCH, rows, phases] = (DISPATCH, spec)
        return wanted

    @staticmethod
    def of(loaded: Loaded, config: BufferConfig) -> LowLatencyFunctions:
        """Return them by the keys of ``wanted``."""
        if ("refuse",) not in loaded:
            return LowLatencyFunctions(loaded["mask",], None, None, {}, {})
        return LowLatencyFunctions(
            mask=loaded["mask",],
            refuse=loaded["refuse",],
            mark=loaded.get(("mark",)),
            dispatch={kind: dispatches_of(loaded, kind) for kind in kinds_of(config)},
            combine={key[1]: function for key, function in loaded.items() if key[0] == COMBINE},
        )


def combine_phases(config: BufferConfig, topology: Topology) -> tuple[int, ...]:
    """Return the parts of a low-latency combine that are launched by themselves."""
    if is_carried(config, topology):
        return ANNOUNCE, SEND, PASS_ON, RECEIVE
    alone = (SEND, RECEIVE, BOTH, BOTH_KEEPING)
    return (SEND, RECEIVE) if has_nodes(config, topology) else alone


def dispatches_of(loaded: Loaded, kind: int) -> dict[int, Function]:
    """Return the low-latency dispatches of a kind of rows, by phase."""
    by_phase = {
        SEND: loaded[DISPATCH, kind, SEND],
        RECEIVE: loaded[DISPATCH, wire_of(kind), RECEIVE],
    }
    if (both := loaded.get((DISPATCH, kind, BOTH))) is not None:
        by_phase[BOTH] = both
    return by_phase


def has_fp8(config: BufferConfig) -> bool:
    """Return whether rows may be FP8."""
    return config.hidden % FP8_ALIGN == 0


def kinds_of(config: BufferConfig) -> tuple[int, ...]:
    """Return the kinds of rows that low-latency dispatches may be given."""
    return KINDS if has_fp8(config) else (BF16,)


def load(runtime: Runtime, wanted: Wanted, topology: Topology) -> Loaded:
    """Compile (or find in the cache) and load.

    NVRTC compiles one kernel at a time in a process. Ranks begin at different ones, so that
    processes that share a cache also share the work.
    """
    keys = list(wanted)
    first = len(keys) * topology.rank // topology.num_ranks
    return {key: runtime.load(*wanted[key]) for key in keys[first:] + keys[:first]}
