# SPDX-License-Identifier: Apache-2.0
"""Results as a picture: bars for one number of tokens, lines over several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from deepcomm.cli.bench.args import BenchConfig
    from deepcomm.cli.bench.figures import Figure, Result
    from deepcomm.cli.bench.measure import Timing

__all__ = ["write_plot"]

OURS, BASELINE, MEMCPY = "#0b6e99", "#c2c2c2", "#e0a030"
DPI = 150
BAR_WIDTH = 0.38
US_PER_MS = 1000


def write_plot(path: Path, config: BenchConfig, results: Sequence[Result]) -> None:
    """Draw the medians, with whiskers to the 95th percentile, into a PNG."""
    from matplotlib.figure import Figure as Canvas

    if len(results) == 1:
        canvas = Canvas(figsize=(9, 5), layout="constrained")
        _bars(canvas.subplots(), config, _operations(results[0]))
    else:
        names = [figure.operation for figure in _operations(results[0])]
        canvas = Canvas(figsize=(4.5 * len(names), 4.5), layout="constrained")
        axes = canvas.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for name, panel in zip(names, axes, strict=True):
            _lines(panel, config, name, results)
        axes[0].set_ylabel("microseconds, slowest rank (p50, whisker p95)")
        axes[0].legend(frameon=False, fontsize=8)
    canvas.suptitle(_title(config, results))
    canvas.savefig(path, dpi=DPI, format="png")


def _operations(result: Result) -> list[Figure]:
    """Return the figures of whole operations, without their steps."""
    return [figure for figure in result.figures if figure.memcpy is not None]


def _title(config: BenchConfig, results: Sequence[Result]) -> str:
    tokens = f"{results[0].tokens} tokens a rank, " if len(results) == 1 else ""
    return (
        f"{config.mode.replace('_', ' ')}, {config.ranks} ranks on {config.backend}, {tokens}"
        f"hidden {config.hidden}, top-{config.topk} of {config.experts}, {config.routing}"
    )


def _bars(panel: Any, config: BenchConfig, figures: Sequence[Figure]) -> None:
    """Draw pairs of bars, ours marked with the time of a plain copy."""
    shift = BAR_WIDTH / 2 if config.baseline != "none" else 0.0
    middles = [place - shift for place in range(len(figures))]
    _bar_group(panel, middles, [figure.timing for figure in figures], OURS, "deepcomm")
    rivals = [figure.baseline for figure in figures if figure.baseline]
    if rivals:
        others = [place + shift for place in range(len(figures))]
        _bar_group(panel, others, rivals, BASELINE, f"{config.baseline} baseline")
    left = [middle - BAR_WIDTH / 2 for middle in middles]
    right = [middle + BAR_WIDTH / 2 for middle in middles]
    copies = [figure.memcpy.p50_us / US_PER_MS for figure in figures if figure.memcpy]
    panel.hlines(copies, left, right, color=MEMCPY, linewidth=2.5, label="memcpy of as many bytes")
    for middle, figure in zip(middles, figures, strict=True):
        gain = "" if figure.speedup is None else f"\n{figure.speedup:.1f}x"
        label = f"{figure.timing.p50_us / US_PER_MS:.3g} ms{gain}"
        top = (middle, figure.timing.p95_us / US_PER_MS)
        panel.annotate(label, top, (0, 4), textcoords="offset points", ha="center", fontsize=8)
    panel.set_xticks(range(len(figures)), [f.operation.replace(" ", "\n", 1) for f in figures])
    panel.set_ylabel("milliseconds, slowest rank (bar p50, whisker p95)")
    panel.margins(y=0.15)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)


def _bar_group(
    panel: Any, middles: Sequence[float], timings: Sequence[Timing], color: str, label: str
) -> None:
    p50 = [timing.p50_us / US_PER_MS for timing in timings]
    tail = [timing.p95_us / US_PER_MS - low for timing, low in zip(timings, p50, strict=True)]
    whisker = [[0.0] * len(tail), tail]
    panel.bar(middles, p50, BAR_WIDTH, color=color, yerr=whisker, capsize=4, label=label)


def _lines(panel: Any, config: BenchConfig, name: str, results: Sequence[Result]) -> None:
    """Draw one operation over the number of tokens, on logarithmic axes."""
    everything = [figure for result in results for figure in result.figures]
    figures = [figure for figure in everything if figure.operation == name]
    tokens = [result.tokens for result in results]
    _line(panel, tokens, [figure.timing for figure in figures], "o-", OURS, "deepcomm")
    rivals = [figure.baseline for figure in figures if figure.baseline]
    if rivals:
        _line(panel, tokens, rivals, "s--", "#808080", f"{config.baseline} baseline")
    copies = [figure.memcpy.p50_us for figure in figures if figure.memcpy]
    panel.plot(tokens, copies, color=MEMCPY, linestyle=":", label="memcpy of as many bytes")
    panel.set(xscale="log", yscale="log", xlabel="tokens a rank", title=name)
    panel.set_xticks(tokens, [str(count) for count in tokens])
    panel.minorticks_off()
    panel.grid(alpha=0.3)


def _line(
    panel: Any, tokens: Sequence[int], timings: Sequence[Timing], style: str, color: str, label: str
) -> None:
    p50 = [timing.p50_us for timing in timings]
    tail = [timing.p95_us - low for timing, low in zip(timings, p50, strict=True)]
    whisker = [[0.0] * len(tail), tail]
    panel.errorbar(tokens, p50, whisker, fmt=style, color=color, capsize=3, label=label)
