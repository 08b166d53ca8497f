"""The charts of a report as PNG, with matplotlib (the ``plot`` extra)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report.charts import Bars, Chart, Curves
from bench.report.timeline import Timeline, inside

_COLOURS: Mapping[str, str] = {
    "busy": "#0b6fb8",
    "stalled": "#d1495b",
    "stalled by KV": "#d45aa5",
    "idle": "#d9dee5",
    "prefill": "#8e5bb5",
    "decode": "#0b6fb8",
    "floor": "#0b8f78",
    "above the floor": "#d9dee5",
    "SSD": "#c77700",
    "SSD to CPU": "#c77700",
    "in CPU memory": "#b5b04a",
    "link": "#0b8f78",
    "weights to GPU": "#0b8f78",
    "KV to GPU": "#8e5bb5",
    "KV from GPU": "#b58ad6",
    "KV from its drive": "#a0522d",
    "KV to its drive": "#cd853f",
}
_DOTS_PER_INCH = 150


def write_png(chart: Chart | Timeline, folder: Path, number: int) -> Path:
    """One chart as ``folder/NN-name.png``."""
    rows = len(chart.bars) if isinstance(chart, Bars) else len(chart.lanes) if isinstance(chart, Timeline) else 9
    figure = Figure(figsize=(10, 1.6 + 0.36 * rows), layout="constrained")
    axes = figure.add_subplot()
    if isinstance(chart, Bars):
        _bars(axes, chart)
    elif isinstance(chart, Curves):
        _curves(axes, chart)
    else:
        _timeline(axes, chart)
    axes.set_title(_plain(chart.title), loc="left", fontweight="bold")
    handles, labels = axes.get_legend_handles_labels()
    kept = dict(zip(labels, handles, strict=True))
    if kept:
        figure.legend(kept.values(), kept.keys(), loc="outside lower left", ncols=4, frameon=False)
    path = folder / f"{number:02d}-{re.sub(r'[^A-Za-z0-9._=-]+', '_', chart.name)[:80]}.png"
    figure.savefig(path, dpi=_DOTS_PER_INCH)
    return path


def _plain(text: str) -> str:
    """Without what matplotlib takes for a formula."""
    return text.replace("$", r"\$")


def _bars(axes: Axes, chart: Bars) -> None:
    most = max((sum(s.value for s in bar.segments) for bar in chart.bars), default=0.0) or 1.0
    for place, bar in enumerate(chart.bars):
        x = 0.0
        for segment in bar.segments:
            colour = _COLOURS.get(segment.kind, "#0b6fb8")
            axes.barh(place, segment.value, left=x, height=0.62, color=colour, label=_plain(segment.kind))
            x += segment.value
        axes.text(x + 0.01 * most, place, _plain(bar.after), va="center", fontsize=8, color="#59636e")
    axes.set_yticks(range(len(chart.bars)), [_plain(bar.label) for bar in chart.bars], fontsize=8)
    axes.set_xlim(0, 1.45 * most)  # room for what is written behind the bars
    axes.set_ylim(len(chart.bars) - 0.5, -0.5)  # the first bar on top
    axes.set_xlabel(chart.unit)
    axes.spines[["top", "right"]].set_visible(False)


def _curves(axes: Axes, chart: Curves) -> None:
    for curve in chart.curves:
        xs, ys = [x for x, _, _ in curve.points], [y for _, y, _ in curve.points]
        [line] = axes.plot(xs, ys, marker="o", label=_plain(curve.name))
        for x, _, interval in curve.points:
            if interval is not None:
                axes.vlines(x, *interval, colors=line.get_color())
    axes.set_xlabel(chart.x_name)
    axes.set_ylabel(chart.unit)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _timeline(axes: Axes, chart: Timeline) -> None:
    for place, lane in enumerate(chart.lanes):
        for kind in dict.fromkeys(span[2] for span in lane.spans):
            spans = [(start, end - start) for start, end, found in inside(lane.spans, chart.window) if found == kind]
            if not spans:
                continue
            colour = _COLOURS.get(kind, "#0b6fb8")
            axes.broken_barh(spans, (place - 0.31, 0.62), facecolors=colour, label=_plain(kind))
    axes.set_yticks(range(len(chart.lanes)), [_plain(lane.name) for lane in chart.lanes], fontsize=8)
    axes.set_xlim(*chart.window)
    axes.set_ylim(len(chart.lanes) - 0.5, -0.5)
    axes.set_xlabel("ms")
    axes.spines[["top", "right"]].set_visible(False)
