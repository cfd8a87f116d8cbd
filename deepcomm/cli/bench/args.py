# SPDX-License-Identifier: Apache-2.0
"""Arguments of ``deepcomm bench``, and the checks that need no rank."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deepcomm.cli.console import note
from deepcomm.cli.environment import num_cores
from deepcomm.errors import InvalidArgument
from deepcomm.testing.routing import ROUTING_SPECS, RoutingShape, load_trace, make_routing
from deepcomm.types import RecvLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["BenchConfig", "add_parser", "under_torchrun"]

FP8_HIDDEN_MULTIPLE = 16
DEFAULT_RANKS = 4
DEFAULT_EXPERTS = 256
DEFAULT_TOPK = 8
USAGE_ERROR = 2


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """One run of ``deepcomm bench``, complete and checked; ``--help`` explains each."""

    backend: str
    ranks: int
    ranks_per_node: int | None
    rail: str
    tokens: tuple[int, ...]
    hidden: int
    experts: int
    topk: int
    mode: str
    fp8: bool
    recv_layout: RecvLayout
    routing: str
    baseline: str
    iters: int
    warmup: int
    max_seconds: float
    seed: int
    threads: int
    json: Path | None
    plot: Path | None
    command: str

    @property
    def low_latency(self) -> bool:
        """Whether the low-latency operations are measured."""
        return self.mode == "low_latency"

    @property
    def shape(self) -> RoutingShape:
        """Sizes the routing is made for."""
        return RoutingShape(self.ranks, self.experts, self.topk)


def add_parser(commands: Any) -> None:
    """Add ``bench`` to the sub-commands."""
    parser = commands.add_parser(
        "bench",
        help="check dispatch and combine, then measure them against a baseline",
        description="Checks that every operation is right on all ranks, then measures them and the "
        "baseline in turns. Starts its ranks itself, or runs as one rank under torchrun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_workload(parser)
    _add_method(parser)
    parser.set_defaults(run=_run)


def _add_workload(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--backend", choices=["cpu", "cuda"], default="cpu", help="where tensors live")
    add("--ranks", type=_positive, help="ranks to start (4, or torchrun's)")
    add("--ranks-per-node", type=_positive, help="play nodes of this many ranks on this host")
    add("--rail", default="auto", help="how ranks of other nodes are reached: see Buffer")
    add("--mode", choices=["high_throughput", "low_latency"], default="high_throughput", help=" ")
    add("--tokens", type=_positives, metavar="T[,T...]", help="per rank (1024; 1,8,32,128)")
    add("--hidden", type=_positive, default=7168, help="elements of a row")
    add("--experts", type=_positive, help=f"experts in all ({DEFAULT_EXPERTS}, or the trace's)")
    add("--topk", type=_positive, help=f"experts a token ({DEFAULT_TOPK}, or the trace's)")
    add("--routing", default="uniform", help=ROUTING_SPECS)
    add("--recv-layout", choices=[layout.value for layout in RecvLayout], help="rows' order")
    add(
        "--quantize",
        choices=["auto", "none", "fp8_e4m3"],
        nargs="?",
        const="fp8_e4m3",
        default="auto",
        help="measure FP8 dispatch beside BF16; auto: where --hidden allows",
    )


def _add_method(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--baseline",
        choices=["gloo", "gloo-kept", "nccl", "none"],
        help="gloo on cpu (gloo-kept: its tensors are kept between calls), nccl on cuda",
    )
    add("--iters", type=_positive, help="timed calls of each operation, at most (20; 100)")
    add("--warmup", type=_positive, default=3, help="calls of each operation before those")
    add("--max-seconds", type=float, default=30.0, help="then stop measuring a number of tokens")
    add("--seed", type=int, default=0, help="of routing and payload")
    add("--threads", type=_positive, help="threads a rank (cores / ranks), for all contenders")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--plot", type=Path, metavar="FILE", help="draw the figures (PNG)")


def under_torchrun() -> bool:
    """Return whether a launcher already started this process as one rank of many."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def _positives(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(part) for part in text.split(",")}))


def _run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    from deepcomm.cli.bench.launch import launch

    try:
        config = make_config(options, argv)
    except InvalidArgument as error:
        note(f"deepcomm bench: {error}")
        return USAGE_ERROR
    return launch(config)


def make_config(options: argparse.Namespace, argv: Sequence[str]) -> BenchConfig:
    """Resolve the defaults and check what can be checked without a rank.

    Raises:
        InvalidArgument: An argument is wrong, or needs what this machine does not have.
    """
    low_latency = options.mode == "low_latency"
    experts, topk = _experts_and_topk(options)
    ranks = int(os.environ["WORLD_SIZE"]) if under_torchrun() else options.ranks or DEFAULT_RANKS
    if options.ranks not in (None, ranks):
        raise InvalidArgument(f"--ranks: expected torchrun's {ranks}, got {options.ranks}")
    layout = options.recv_layout or ("expert_padded" if low_latency else "token")
    config = BenchConfig(
        backend=options.backend,
        ranks=ranks,
        ranks_per_node=options.ranks_per_node,
        rail=options.rail,
        tokens=options.tokens or ((1, 8, 32, 128) if low_latency else (1024,)),
        hidden=options.hidden,
        experts=experts,
        topk=topk,
        mode=options.mode,
        fp8=_with_fp8(options),
        recv_layout=RecvLayout(layout),
        routing=options.routing,
        baseline=options.baseline or ("gloo" if options.backend == "cpu" else "nccl"),
        iters=options.iters or (100 if low_latency else 20),
        warmup=options.warmup,
        max_seconds=options.max_seconds,
        seed=options.seed,
        threads=options.threads or max(1, num_cores() // ranks),
        json=options.json,
        plot=options.plot,
        command=shlex.join(["deepcomm", *argv]),
    )
    _check(config)
    return config


def _experts_and_topk(options: argparse.Namespace) -> tuple[int, int]:
    experts, topk = DEFAULT_EXPERTS, DEFAULT_TOPK
    kind, _, path = options.routing.partition(":")
    if kind == "trace" and path:
        trace = load_trace(path)
        experts, topk = trace.num_experts, trace.num_topk
    return options.experts or experts, options.topk or topk


def _with_fp8(options: argparse.Namespace) -> bool:
    fits = options.hidden % FP8_HIDDEN_MULTIPLE == 0
    if options.quantize == "fp8_e4m3" and not fits:
        raise InvalidArgument(
            f"--hidden: expected a multiple of {FP8_HIDDEN_MULTIPLE} for FP8, got {options.hidden}"
        )
    return bool(options.quantize != "none" and fits)


def _check(config: BenchConfig) -> None:
    if config.low_latency and config.recv_layout is RecvLayout.EXPERT:
        raise InvalidArgument("--recv-layout: expected token or expert_padded in low_latency mode")
    if config.experts % config.ranks:
        raise InvalidArgument(
            f"--experts: expected a multiple of {config.ranks} ranks, got {config.experts}"
        )
    if config.backend == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument("--backend cuda: torch finds no CUDA device (see deepcomm doctor)")
    if config.baseline == "nccl" and config.backend != "cuda":
        raise InvalidArgument("--baseline nccl: needs --backend cuda: NCCL moves GPU memory only")
    if config.baseline.startswith("gloo") and config.backend != "cpu":
        raise InvalidArgument("--baseline gloo: expected nccl or none with --backend cuda")
    if config.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise InvalidArgument("--plot: needs matplotlib: pip install deepcomm[bench]")
    for name in ("json", "plot"):
        path = getattr(config, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise InvalidArgument(f"--{name}: expected an existing folder, got {path.parent}")
    make_routing(config.routing, config.shape)
