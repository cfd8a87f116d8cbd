# SPDX-License-Identifier: Apache-2.0
"""Results as a table for people and as JSON for programs."""

from __future__ import annotations

import datetime
import itertools
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from deepcomm.cli.bench.figures import FORMULA
from deepcomm.cli.bench.operations import Kind, row_bytes
from deepcomm.cli.console import print_table
from deepcomm.cli.environment import commit, hardware, versions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from deepcomm.cli.bench.args import BenchConfig
    from deepcomm.cli.bench.figures import Figure, Result
    from deepcomm.cli.bench.measure import Timing

__all__ = ["print_intro", "print_results", "write_json"]

SCHEMA_VERSION = 1
RAIL = "rail"
"""How the line of an explanation begins."""
MS_FROM_US = 2000.0
"""Medians from here on make a table in milliseconds."""


def print_intro(config: BenchConfig) -> None:
    """Say what is measured and how, before it takes its time."""
    nodes = f", {config.ranks_per_node} a node" if config.ranks_per_node else ""
    machine = hardware()
    tokens = ", ".join(map(str, config.tokens))
    print(
        f"{config.mode}: {config.ranks} ranks{nodes} on {config.backend}, {tokens} tokens a rank, "
        f"hidden {config.hidden}, top-{config.topk} of {config.experts} experts, "
        f"routing {config.routing}, layout {config.recv_layout.value}\n"
        f"{machine['cpu']}, {machine['cores']} cores; {config.threads} thread(s) a rank, "
        f"baseline {config.baseline}, seed {config.seed}",
        flush=True,
    )


def print_results(config: BenchConfig, results: Sequence[Result]) -> None:
    """Print the table of all figures and what its columns mean."""
    figures = [figure for result in results for figure in result.figures]
    in_ms = min(figure.timing.p50_us for figure in figures) >= MS_FROM_US
    unit, divisor = ("ms", 1000.0) if in_ms else ("us", 1.0)
    several, compared = len(results) > 1, config.baseline != "none"
    header = ["operation", *(["tokens"] if several else [])]
    header += [f"{name}\n{unit}" for name in ("p50", "p95", "p99")]
    header += ["wire\nGB/s", "DeepEP\nGB/s"]
    header += [f"{config.baseline}\np50", "speed-\nup"] if compared else []
    header.append("times\nmemcpy")
    rows = []
    for result in results:
        for figure in result.figures:
            tokens = [str(result.tokens)] if several else []
            rows.append([_name(figure), *tokens, *_cells(figure, divisor, compared)])
    print()
    print_table(header, rows)
    print(_legend(config, results))


def _name(figure: Figure) -> str:
    """Return the operation's name; of a step, the step's name indented."""
    operation, _, step = figure.operation.partition(" / ")
    return f"  {step}" if step else operation


def _cells(figure: Figure, divisor: float, compared: bool) -> list[str]:
    timing = figure.timing
    cells = [_number(value / divisor) for value in (timing.p50_us, timing.p95_us, timing.p99_us)]
    cells += [_number(figure.wire_gbps), _number(figure.deepep_gbps)]
    if compared:
        cells.append(_number(figure.baseline.p50_us / divisor if figure.baseline else None))
        cells.append("" if figure.speedup is None else f"{figure.speedup:.1f}x")
    cells.append(_number(figure.memcpy_multiple))
    return cells


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _legend(config: BenchConfig, results: Sequence[Result]) -> str:
    calls = sorted({len(next(iter(result.timings.values())).samples_us) for result in results})
    times = f"{calls[0]}" if len(calls) == 1 else f"{calls[0]} to {calls[-1]}"
    lines = [
        "All results were checked on all ranks before measuring.",
        f"Times: maximum over ranks of each of {times} calls, in turns with the others, each after "
        "a barrier.",
        "wire: bytes that crossed to another rank / time; DeepEP: all received row bytes / time; "
        "mean a rank.",
        "memcpy: every rank at once copies as many bytes as it receives, with one thread.",
    ]
    if config.baseline != "none":
        lines.append(
            f"{config.baseline}: index_select, all_to_all_single, index_add_, FP8 cast in torch; "
            "TOKEN rows with ids and weights, BF16 sums."
        )
    return "\n".join([*lines, *_rail(results[0])])


def _rail(result: Result) -> list[str]:
    """Return what rank 0 explains of the way between nodes, if there are several."""
    lines = result.explanation.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(RAIL))
    after = itertools.takewhile(lambda line: line.startswith(" "), lines[first + 1 :])
    text = " ".join(line.strip() for line in (lines[first][len(RAIL) :], *after))
    if text.startswith("none"):
        return []
    sent_mb = result.counters.bytes_network / 1e6
    return [f"rail of rank 0: {text}; one BF16 dispatch sent {sent_mb:.3g} MB over it."]


def write_json(path: Path, config: BenchConfig, results: Sequence[Result]) -> None:
    """Write everything that was configured, found and measured."""
    document = {
        "schema": SCHEMA_VERSION,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": config.command,
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "axes": _axes(config),
        "formula": FORMULA,
        "row_bytes": {kind.value: row_bytes(kind, config.hidden) for kind in Kind},
        "results": [_result(result) for result in results],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def _axes(config: BenchConfig) -> dict[str, Any]:
    axes = asdict(config) | {"recv_layout": config.recv_layout.value}
    for name in ("json", "plot", "command"):
        del axes[name]
    return axes


def _result(result: Result) -> dict[str, Any]:
    return {
        "tokens": result.tokens,
        "checked": True,
        "traffic": asdict(result.traffic),
        "figures": [_figure(figure) for figure in result.figures],
        "timings": {name: _timing(timing) for name, timing in result.timings.items()},
        "counters of one dispatch on rank 0": asdict(result.counters),
        "explain": result.explanation,
    }


def _figure(figure: Figure) -> dict[str, Any]:
    return {
        "operation": figure.operation,
        "p50_us": figure.timing.p50_us,
        "p95_us": figure.timing.p95_us,
        "p99_us": figure.timing.p99_us,
        "wire_gbps": figure.wire_gbps,
        "deepep_gbps": figure.deepep_gbps,
        "baseline_p50_us": figure.baseline.p50_us if figure.baseline else None,
        "speedup": figure.speedup,
        "memcpy_p50_us": figure.memcpy.p50_us if figure.memcpy else None,
        "memcpy_multiple": figure.memcpy_multiple,
    }


def _timing(timing: Timing) -> dict[str, Any]:
    return {
        "p50_us": timing.p50_us,
        "p95_us": timing.p95_us,
        "p99_us": timing.p99_us,
        "samples_us": list(timing.samples_us),
    }
