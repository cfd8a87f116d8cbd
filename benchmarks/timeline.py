# SPDX-License-Identifier: Apache-2.0
"""A picture of what ran when: one panel for each way, compute above communication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLORS = ("#0b6e99", "#e0a030")
BACKWARD_ALPHA = 0.55
DPI = 150
BAR_HEIGHT = 0.8
LANES = ("communication", "compute")
INCHES = (13.0, 2.2)
UPRIGHT_BELOW = 0.08
"""Share of the axis below which a bar's label stands upright."""


@dataclass(frozen=True)
class Span:
    """A piece of work on one lane; us since the beginning of its way."""

    name: str
    lane: str
    micro_batch: int
    is_backward: bool
    begin_us: float
    end_us: float


@dataclass(frozen=True)
class Timeline:
    """One way to do the work, on one rank."""

    title: str
    spans: tuple[Span, ...]

    @property
    def end_us(self) -> float:
        return max(span.end_us for span in self.spans)


def write_timelines(path: Path, title: str, timelines: Sequence[Timeline]) -> None:
    """Draw the ways one above the other, with a common axis of time, into a PNG."""
    from matplotlib.figure import Figure as Canvas

    size = (INCHES[0], INCHES[1] * len(timelines) + 1.0)
    canvas = Canvas(figsize=size, layout="constrained")
    panels = canvas.subplots(len(timelines), 1, sharex=True, squeeze=False)[:, 0]
    longest_us = max(timeline.end_us for timeline in timelines)
    for panel, timeline in zip(panels, timelines, strict=True):
        _panel(panel, timeline, longest_us)
    panels[-1].set_xlabel("microseconds")
    handles, labels = _legend_entries()
    canvas.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    canvas.suptitle(title)
    canvas.savefig(path, dpi=DPI, format="png")


def _panel(panel: Any, timeline: Timeline, longest_us: float) -> None:
    for span in timeline.spans:
        width = span.end_us - span.begin_us
        row = LANES.index(span.lane)
        alpha = BACKWARD_ALPHA if span.is_backward else 1.0
        panel.barh(
            row,
            width,
            BAR_HEIGHT,
            span.begin_us,
            color=COLORS[span.micro_batch],
            alpha=alpha,
            edgecolor="white",
        )
        panel.text(
            span.begin_us + width / 2,
            row,
            span.name,
            rotation=0 if width > UPRIGHT_BELOW * longest_us else 90,
            ha="center",
            va="center",
            fontsize=7,
            color="black" if span.is_backward or span.micro_batch else "white",
        )
    panel.axvline(timeline.end_us, color="#808080", linestyle=":")
    panel.set_title(f"{timeline.title}: {timeline.end_us:.0f} us", loc="left", fontsize=10)
    panel.set_yticks(range(len(LANES)), LANES)
    panel.set_xlim(0, longest_us * 1.01)
    panel.spines[["top", "right"]].set_visible(False)


def _legend_entries() -> tuple[list[Any], list[str]]:
    from matplotlib.patches import Patch

    handles, labels = [], []
    for index, color in enumerate(COLORS):
        for way, alpha in (("forward", 1.0), ("backward", BACKWARD_ALPHA)):
            handles.append(Patch(color=color, alpha=alpha))
            labels.append(f"micro-batch {index}, {way}")
    return handles, labels
