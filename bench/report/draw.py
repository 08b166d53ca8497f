"""A report's charts with matplotlib: as SVG inside the page, and the same as PNG.

A point of the figure is a pixel of the page. Colours can be read on light and on dark paper; text and grid take the
page's own.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.report.charts import Bars, Chart, Curves

_WIDTH, _ROW, _BAR, _CURVES_ROWS, _LEGEND_ROW, _MARGINS = 960, 30, 18, 9, 24, 64
_POINTS_PER_INCH, _PNG_DPI = 72, 150
_CHARACTERS, _LABEL_CHARACTERS = 120, 31
_INK, _SOFT, _FAINT = "#1b1f24", "#1b1f24b0", "#1b1f2426"
"""The page's own colour, whole and thinned; in the SVG it becomes ``currentColor``."""
COLOURS = {
    **dict.fromkeys(("busy", "decode"), "#2585cc"),
    **dict.fromkeys(("idle", "above the floor"), _FAINT),
    **dict.fromkeys(("SSD", "SSD to CPU"), "#d98616"),
    **dict.fromkeys(("floor", "link", "weights to GPU"), "#1fa389"),
    **dict.fromkeys(("prefill", "KV to GPU"), "#a06bcb"),
    "KV from GPU": "#c49ae3",
    "KV from its drive": "#b0663d",
    "KV to its drive": "#d19a5b",
    "in CPU memory": "#a9a445",
    "stalled": "#dd5564",
    "stalled by KV": "#df6cb2",
}
_SETTINGS: dict[Any, Any] = {
    "font.size": 13,
    "font.family": "DejaVu Sans",
    "text.color": _INK,
    "text.parse_math": False,
    "axes.labelcolor": _SOFT,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _INK,
    "ytick.major.pad": 8,
    "grid.color": _FAINT,
    "legend.frameon": False,
    "legend.handlelength": 1,
    "legend.handleheight": 1,
    "lines.solid_capstyle": "butt",
    "path.simplify": False,
    "svg.fonttype": "none",
}


def svg(chart: Chart) -> str:
    """The chart as an ``svg`` element; what is under the pointer says what it is. The same chart is the same text."""
    text = io.StringIO()
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": chart.name}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a letter that its font lacks: the browser has it
        figure, hints = _drawn(chart, title=None)
        figure.savefig(text, format="svg", transparent=True)
    width, height = figure.get_size_inches() * _POINTS_PER_INCH
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{html.escape(chart.title)}">'
    body = head + text.getvalue()[text.getvalue().index('<g id="figure_1">') :]
    body = re.sub(r'<g id="hint(\d+)">', lambda found: f"<g><title>{html.escape(hints[int(found[1])])}</title>", body)
    return re.sub(r'<g id="[^"]*"', "<g", body).replace(_INK, "currentColor")


def write_png(chart: Chart, folder: Path, number: int) -> Path:
    """The chart under its title as ``folder/NN-name.png``."""
    path = folder / f"{number:02d}-{re.sub(r'[^A-Za-z0-9._=-]+', '_', chart.name)[:80]}.png"
    with matplotlib.rc_context(_SETTINGS):
        _drawn(chart, title=chart.title)[0].savefig(path, dpi=_PNG_DPI)
    return path


def _drawn(chart: Chart, title: str | None) -> tuple[Figure, list[str]]:
    """The figure, and what to say of the part whose id in the SVG is ``hint<n>``."""
    figure, hints = Figure(layout="constrained"), list[str]()
    axes = figure.add_subplot()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.set_major_formatter("{x:g}")
    if isinstance(chart, Bars):
        legend, rows = _bars(axes, chart, hints), len(chart.bars)
    else:
        assert isinstance(chart, Curves)
        legend, rows = _curves(axes, chart, hints), _CURVES_ROWS
    widths = [len(name) + 6 for name in legend] or [1]
    columns = len(widths) if sum(widths) <= _CHARACTERS else max(1, _CHARACTERS // max(widths))
    height = _MARGINS + _ROW * rows + _LEGEND_ROW * (math.ceil(len(legend) / columns) + (title is not None))
    figure.set_size_inches(_WIDTH / _POINTS_PER_INCH, height / _POINTS_PER_INCH)
    handles = [Patch(color=colour, label=name) for name, colour in legend.items()]
    box = figure.legend(handles=handles, title=title, loc="outside upper left", ncols=columns, alignment="left")
    box.get_title().set(fontweight="bold", fontsize=15)
    return figure, hints


def _bars(axes: Axes, chart: Bars, hints: list[str]) -> dict[str, str]:
    """Draws them; the colours of the kinds."""
    legend: dict[str, str] = {}
    low, high = chart.window or (0.0, max((span[1] for bar in chart.bars for span in bar.spans), default=0.0))
    high = high if high > low else low + 1.0
    pixel = (high - low) / _WIDTH
    axes.set(xlim=(low, high), ylim=(len(chart.bars) - 0.5, -0.5), xlabel=chart.unit)  # the first bar on top
    axes.set_yticks(range(len(chart.bars)), [_shortened(bar.label) for bar in chart.bars])
    axes.grid(axis="x", clip_on=False)
    for place, (bar, label) in enumerate(zip(chart.bars, axes.get_yticklabels(), strict=True)):
        label.set_gid(_hint(hints, bar.label))
        shown = [(max(a, low), min(b, high), kind) for a, b, kind in bar.spans if b > low and a < high]
        for kind in dict.fromkeys(span[2] for span in shown):
            legend[kind] = COLOURS.get(kind, COLOURS["busy"])
            spans = [(start, end) for start, end, found in shown if found == kind]
            times = f"{len(spans)} times, " if len(spans) > 1 else ""
            gid = _hint(hints, f"{bar.label}: {kind}, {times}{sum(b - a for a, b in spans):.4g} {chart.unit}")
            line = [x for a, b in _merged(spans, pixel / 3) for x in (a, max(b, a + pixel / 2), math.nan)]
            axes.plot(line, [place] * len(line), color=legend[kind], lw=_BAR, clip_on=False, gid=gid)
        if bar.mark is not None and bar.spans:
            axes.plot([bar.mark] * 2, [place - 0.43, place + 0.43], color=_INK, linestyle=(0, (2, 1.5)), clip_on=False)
        end = max((span[1] for span in bar.spans), default=low)
        axes.annotate(bar.after, (end, place), (8, 0), textcoords="offset points", va="center", color=_SOFT)
    return legend


def _curves(axes: Axes, chart: Curves, hints: list[str]) -> dict[str, str]:
    """Draws them; their colours."""
    legend = {name: f"C{place}" for place, name in enumerate(chart.curves)}
    axes.grid(clip_on=False)
    for name, points in chart.curves.items():
        line: dict[str, Any] = {"color": legend[name], "lw": 2, "clip_on": False}
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], **line)
        for x, y, interval in points:
            if interval is not None:
                axes.plot([x, x], interval, **line)
            gid = _hint(hints, f"{name}: {chart.x_name} {x:g}, {y:.4g} {chart.unit}")
            axes.scatter(x, y, s=64, color=legend[name], zorder=3, clip_on=False, gid=gid)
    axes.set_xticks(sorted({x for points in chart.curves.values() for x, _, _ in points}))
    axes.set(xlabel=chart.x_name, ylabel=chart.unit)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}")
    return legend


def _hint(hints: list[str], text: str) -> str:
    """The id of a part of which the page says ``text``."""
    hints.append(text)
    return f"hint{len(hints) - 1}"


def _merged(spans: Sequence[tuple[float, float]], gap: float) -> list[tuple[float, float]]:
    """Spans less than ``gap`` apart as one, so that a long trace stays a small page."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start - found[-1][1] < gap:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _shortened(text: str) -> str:
    """The end tells more than the middle: points of a sweep differ there."""
    half = _LABEL_CHARACTERS // 2
    return text if len(text) <= _LABEL_CHARACTERS else f"{text[: half - 1]}…{text[-half:]}"
