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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.report.charts import Bars, Chart, Curves, Span

_WIDTH, _ROW, _BAR, _CURVES_TALL, _LEGEND_ROW = 960, 30, 18, 260, 22
_POINTS_PER_INCH, _PNG_DPI = 72, 150
_CHARACTER = 7.6
_MOST_CHARACTERS = 31
_INK, _SOFT, _FAINT = "#1b1f24", "#1b1f24b0", "#1b1f2426"
"""The page's own colour, whole and thinned; in the SVG it becomes ``currentColor``."""
COLOURS: Mapping[str, str] = {
    "busy": "#2585cc",
    "stalled": "#dd5564",
    "stalled by KV": "#df6cb2",
    "idle": _FAINT,
    "prefill": "#a06bcb",
    "decode": "#2585cc",
    "floor": "#1fa389",
    "above the floor": _FAINT,
    "SSD": "#d98616",
    "SSD to CPU": "#d98616",
    "in CPU memory": "#a9a445",
    "link": "#1fa389",
    "weights to GPU": "#1fa389",
    "KV to GPU": "#a06bcb",
    "KV from GPU": "#c49ae3",
    "KV from its drive": "#b0663d",
    "KV to its drive": "#d19a5b",
}
_SETTINGS: dict[Any, Any] = {
    "font.size": 13,
    "font.family": "DejaVu Sans",
    "text.color": _INK,
    "text.parse_math": False,
    "lines.solid_capstyle": "butt",
    "path.simplify": False,
    "svg.fonttype": "none",
    "grid.color": _FAINT,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
}


def svg(chart: Chart) -> str:
    """The chart as an ``svg`` element; what is under the pointer says what it is. The same chart is the same text."""
    text = io.StringIO()
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": chart.name}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a letter that its font lacks: the browser has it
        figure, told = _drawn(chart, top=4)
        figure.savefig(text, format="svg", transparent=True)
    width, height = figure.get_size_inches() * _POINTS_PER_INCH
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{html.escape(chart.title)}">'
    body = head + text.getvalue()[text.getvalue().index('<g id="figure_1">') :]
    body = re.sub(r'<g id="told(\d+)">', lambda found: f"<g><title>{html.escape(told[int(found[1])])}</title>", body)
    return re.sub(r'<g id="[^"]*"', "<g", body).replace(_INK, "currentColor")


def write_png(chart: Chart, folder: Path, number: int) -> Path:
    """The chart under its title as ``folder/NN-name.png``."""
    path = folder / f"{number:02d}-{re.sub(r'[^A-Za-z0-9._=-]+', '_', chart.name)[:80]}.png"
    with matplotlib.rc_context(_SETTINGS):
        figure, _ = _drawn(chart, top=36)
        figure.suptitle(chart.title, x=0.01, y=0.99, ha="left", va="top", fontsize=15, fontweight="bold")
        figure.savefig(path, dpi=_PNG_DPI)
    return path


def _drawn(chart: Chart, top: float) -> tuple[Figure, list[str]]:
    """The figure, with ``top`` points of room above, and what to say of the part whose id in the SVG is ``told<n>``."""
    bars = chart.bars if isinstance(chart, Bars) else ()
    left = 24 + _CHARACTER * max((len(_shortened(bar.label)) for bar in bars), default=8)
    right = 250 if any(bar.after for bar in bars) else 20
    tall = _ROW * len(bars) if isinstance(chart, Bars) else _CURVES_TALL
    legend = _legend(chart)
    widths = [_CHARACTER * len(name) + 48 for name in legend] or [1]
    columns = len(widths) if sum(widths) <= _WIDTH - left else max(1, int((_WIDTH - left) / max(widths)))
    above = top + _LEGEND_ROW * math.ceil(len(legend) / columns) + (8 if isinstance(chart, Bars) else 32)
    below = 28 if isinstance(chart, Bars) else 44
    height = above + tall + below
    figure = Figure(figsize=(_WIDTH / _POINTS_PER_INCH, height / _POINTS_PER_INCH))
    axes = figure.add_axes((left / _WIDTH, below / height, (_WIDTH - left - right) / _WIDTH, tall / height))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=12)
    axes.grid(axis="x" if isinstance(chart, Bars) else "both", clip_on=False)
    axes.xaxis.set_major_formatter("{x:g}")
    told: list[str] = []
    if isinstance(chart, Bars):
        _bars(axes, chart, told)
    else:
        _curves(axes, chart, told)
    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in legend.items()],
        loc="upper left",
        bbox_to_anchor=(left / _WIDTH, 1 - top / height),
        ncols=columns,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1,
        handleheight=1,
    )
    return figure, told


def _legend(chart: Chart) -> dict[str, str]:
    """The legend: kinds of a bar chart, curves by their names."""
    if isinstance(chart, Curves):
        return {curve.name: f"C{place}" for place, curve in enumerate(chart.curves)}
    kinds = dict.fromkeys(kind for bar in chart.bars for _, _, kind in inside(bar.spans, chart.window))
    return {kind: _colour(kind) for kind in kinds}


def _bars(axes: Axes, chart: Bars, told: list[str]) -> None:
    low, high = chart.window[0], max(chart.window[1], chart.window[0] + 1e-9)
    pixel = (high - low) / (_WIDTH * axes.get_position().width)
    axes.set_xlim(low, high)
    axes.set_ylim(len(chart.bars) - 0.5, -0.5)  # the first bar on top
    axes.set_yticks([])
    _beside(axes, chart.unit, (0, 0), (-22, -4), ha="right", va="top", color=_SOFT, fontsize=12)
    for place, bar in enumerate(chart.bars):
        middle = 1 - (place + 0.5) / len(chart.bars)
        _beside(axes, _shortened(bar.label), (0, middle), (-10, 0), ha="right", va="center", gid=_tell(told, bar.label))
        shown = list(inside(bar.spans, chart.window))
        for kind in dict.fromkeys(span[2] for span in shown):
            spans = [(start, end) for start, end, found in shown if found == kind]
            times = f"{len(spans)} times, " if len(spans) > 1 else ""
            gid = _tell(told, f"{bar.label}: {kind}, {times}{sum(b - a for a, b in spans):.4g} {chart.unit}")
            line = [x for a, b in _merged(spans, pixel / 3) for x in (a, max(b, a + pixel / 2), math.nan)]
            axes.plot(line, [place] * len(line), color=_colour(kind), lw=_BAR, clip_on=False, gid=gid)
        if bar.mark is not None and bar.spans:
            axes.plot([bar.mark] * 2, [place - 0.43, place + 0.43], color=_INK, linestyle=(0, (2, 1.5)), clip_on=False)
        end = max((span[1] for span in bar.spans), default=low)
        _beside(axes, bar.after, ((end - low) / (high - low), middle), (8, 0), va="center", color=_SOFT, fontsize=12)


def _curves(axes: Axes, chart: Curves, told: list[str]) -> None:
    for curve, colour in zip(chart.curves, _legend(chart).values(), strict=True):
        axes.plot([x for x, _, _ in curve.points], [y for _, y, _ in curve.points], color=colour, lw=2, clip_on=False)
        for x, y, interval in curve.points:
            if interval is not None:
                axes.plot([x, x], interval, color=colour, lw=2, clip_on=False)
            gid = _tell(told, f"{curve.name}: {chart.x_name} {x:g}, {y:.4g} {chart.unit}")
            axes.scatter(x, y, s=64, color=colour, zorder=3, clip_on=False, gid=gid)
    axes.set_xticks(sorted({x for curve in chart.curves for x, _, _ in curve.points}))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}")
    _beside(axes, chart.unit, (0, 1), (-8, 12), ha="right", color=_SOFT, fontsize=12)
    _beside(axes, chart.x_name, (1, 0), (0, -36), ha="right", color=_SOFT, fontsize=12)


def _tell(told: list[str], text: str) -> str:
    """The id of a part that ``text`` is told of."""
    told.append(text)
    return f"told{len(told) - 1}"


def _colour(kind: str) -> str:
    return COLOURS.get(kind, COLOURS["busy"])


def _beside(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **how: Any) -> None:
    """Text at a place of the plot (0 to 1 across and up), moved by points."""
    axes.annotate(text, at, offset, xycoords="axes fraction", textcoords="offset points", **how)


def inside(spans: Sequence[Span], window: tuple[float, float]) -> Iterator[Span]:
    """What of the spans is in the window."""
    for start, end, kind in spans:
        if end > window[0] and start < window[1]:
            yield max(start, window[0]), min(end, window[1]), kind


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
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: half - 1]}…{text[-half:]}"
