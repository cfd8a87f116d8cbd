# SPDX-License-Identifier: Apache-2.0
"""How fast does one CPU thread copy, cast and sum rows, with each instruction set of this machine?

Bytes are counted as read + written: copy 2 * B, cast B + H + scales, reduce of n rows (n + 1) * B,
with H elements and B = 2 * H bytes a BF16 row. Cold: the rows of one pass exceed every cache; warm:
they fit the second level. Each figure is the best of the rounds, variants taking turns; "x memcpy"
is how many times as long as the C library copies the same source bytes, cold.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from deepcomm._C import simd

if TYPE_CHECKING:
    from collections.abc import Callable

BF16 = 0
TILE = 128
COLD_BYTES = 352 << 20
WARM_BYTES = 384 << 10


@dataclass(frozen=True)
class Result:
    op: str
    isa: str
    cold_us_per_row: float
    cold_gb_per_s: float
    warm_us_per_row: float
    warm_gb_per_s: float
    memcpy_ratio: float


@dataclass(frozen=True)
class Arena:
    """Rows to read and rows to write."""

    src: torch.Tensor  # bfloat16 [T, H]
    dst: torch.Tensor  # bfloat16 [T, H]
    scales: torch.Tensor  # float32 [T, S]

    @classmethod
    def make(cls, num_bytes: int, hidden: int) -> Arena:
        num_rows = max(8, num_bytes // (2 * hidden) // 8 * 8)
        src = torch.randn(64, hidden).to(torch.bfloat16).repeat(-(-num_rows // 64), 1)[:num_rows]
        scales = torch.ones(num_rows, -(-hidden // TILE))
        return cls(src.contiguous(), torch.ones_like(src), scales)


@dataclass(frozen=True)
class Op:
    name: str
    rows_per_output: int
    bytes_per_output: int
    prepare: Callable[[simd.Isa, Arena], Callable[[], None]]


def rows(tensor: torch.Tensor) -> simd.Rows:
    return simd.Rows(tensor.data_ptr(), tensor.stride(0) * tensor.element_size())


def copy_op(hidden: int, *, stream: bool) -> Op:
    def prepare(isa: simd.Isa, arena: Arena) -> Callable[[], None]:
        dst, src, num_rows = rows(arena.dst), rows(arena.src), arena.src.shape[0]
        return lambda: simd.copy_rows(
            isa, dst, src, num_rows=num_rows, num_bytes=2 * hidden, stream=stream
        )

    return Op("copy_stream" if stream else "copy", 1, 4 * hidden, prepare)


def cast_op(hidden: int, *, ue8m0: bool) -> Op:
    def prepare(isa: simd.Isa, arena: Arena) -> Callable[[], None]:
        dst = simd.Rows(arena.dst.data_ptr(), hidden)
        scales, src, num_rows = rows(arena.scales), rows(arena.src), arena.src.shape[0]
        return lambda: simd.cast_rows(
            isa,
            dst,
            scales,
            src,
            dtype=BF16,
            num_rows=num_rows,
            num_elements=hidden,
            ue8m0=ue8m0,
        )

    num_tiles = -(-hidden // TILE)
    scale_bytes = num_tiles if ue8m0 else 4 * num_tiles
    return Op("cast ue8m0" if ue8m0 else "cast fp32", 1, 3 * hidden + scale_bytes, prepare)


def outputs_of(arena: Arena, rows_per_output: int) -> int:
    run = arena.src.shape[0] // rows_per_output
    return run if rows_per_output == 1 else max(1, run * 3 // 4)


def reduce_op(hidden: int, group_sizes: list[int], *, weighted: bool = False) -> Op:
    n = sum(group_sizes)

    def prepare(isa: simd.Isa, arena: Arena) -> Callable[[], None]:
        # The rows of one output lie in runs of their own, like those that different ranks wrote.
        # Runs that start at random keep equal distances, which one bank or cache set would punish,
        # from deciding the figure.
        num_outputs, run = outputs_of(arena, n), arena.src.shape[0] // n
        spare = random.Random(0)
        starts = [k * run + spare.randint(0, run - num_outputs) for k in range(n)]
        addresses = [
            arena.src.data_ptr() + (output + start) * 2 * hidden
            for output in range(num_outputs)
            for start in starts
        ]
        job = simd.Reduction(
            dst=rows(arena.dst),
            dtype=BF16,
            num_elements=hidden,
            rows=addresses,
            weights=[0.5] * n if weighted else [],
            group_sizes=group_sizes,
            bias=0,
            stream=True,
        )
        return lambda: simd.reduce_rows(isa, job, num_outputs=num_outputs)

    groups = "+".join(map(str, group_sizes))
    name = f"reduce {groups}{' weighted' if weighted else ''}"
    return Op(name, n, (n + 1) * 2 * hidden, prepare)


def best_seconds(variants: list[Callable[[], None]], rounds: int, calls: int) -> list[float]:
    best = [float("inf")] * len(variants)
    for _ in range(rounds):
        for i, variant in enumerate(variants):
            start = time.perf_counter()
            for _ in range(calls):
                variant()
            best[i] = min(best[i], (time.perf_counter() - start) / calls)
    return best


def measure(hidden: int, rounds: int) -> list[Result]:
    ops = [
        *(copy_op(hidden, stream=stream) for stream in (False, True)),
        *(cast_op(hidden, ue8m0=ue8m0) for ue8m0 in (False, True)),
        *(reduce_op(hidden, [n]) for n in (1, 2, 4, 8)),
        reduce_op(hidden, [8], weighted=True),
        reduce_op(hidden, [4, 4]),
    ]
    variants = [(op, isa) for op in ops for isa in simd.supported_isas()]
    cold, warm = Arena.make(COLD_BYTES, hidden), Arena.make(WARM_BYTES, hidden)
    seconds = {
        "cold": best_seconds([op.prepare(isa, cold) for op, isa in variants], rounds, 1),
        "warm": best_seconds([op.prepare(isa, warm) for op, isa in variants], rounds, 100),
    }
    results = []
    memcpy_us = seconds["cold"][0] * 1e6 / cold.src.shape[0]
    for i, (op, isa) in enumerate(variants):
        cold_us = seconds["cold"][i] * 1e6 / outputs_of(cold, op.rows_per_output)
        warm_us = seconds["warm"][i] * 1e6 / outputs_of(warm, op.rows_per_output)
        results.append(
            Result(
                op=op.name,
                isa=simd.isa_name(isa),
                cold_us_per_row=cold_us,
                cold_gb_per_s=op.bytes_per_output / cold_us / 1e3,
                warm_us_per_row=warm_us,
                warm_gb_per_s=op.bytes_per_output / warm_us / 1e3,
                memcpy_ratio=cold_us / (memcpy_us * op.rows_per_output),
            )
        )
    return results


def show(results: list[Result], hidden: int) -> None:
    table = Table(title=f"one thread, BF16 rows, H = {hidden}")
    for column in ("op", "isa", "cold us/row", "GB/s", "warm us/row", "GB/s", "x memcpy"):
        table.add_column(column, justify="left" if column in ("op", "isa") else "right")
    for r in results:
        cold = (f"{r.cold_us_per_row:.2f}", f"{r.cold_gb_per_s:.1f}")
        warm = (f"{r.warm_us_per_row:.2f}", f"{r.warm_gb_per_s:.1f}")
        table.add_row(r.op, r.isa, *cold, *warm, f"{r.memcpy_ratio:.2f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results here, too")
    args = parser.parse_args()
    results = measure(args.hidden, args.rounds)
    show(results, args.hidden)
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


if __name__ == "__main__":
    main()
