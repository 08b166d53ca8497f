"""Charts as SVG for the page: colours are the style sheet's classes, every text is escaped."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Sequence

from bench.report.charts import Bars, Chart, Curve, Curves
from bench.report.timeline import Timeline, inside

WIDTH, LEFT, RIGHT = 960, 250, 250
_ROW, _BAR = 30, 18
CURVE_COLOURS = 8
_CHARACTERS_LEFT = 31


def draw(chart: Chart | Timeline) -> str:
    """One chart with its legend, as an ``svg`` element."""
    if isinstance(chart, Bars):
        return _bars(chart)
    if isinstance(chart, Curves):
        return _curves(chart)
    return _timeline(chart)


def kind_class(kind: str) -> str:
    """The style sheet's class of a kind: ``above the floor`` is ``k-above-the-floor``."""
    return "k-" + re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")


def ticks(most: float, least: float = 0.0, count: int = 5) -> list[float]:
    """Round numbers from ``least`` to ``most``, about ``count`` of them."""
    span = most - least
    if not span > 0:
        return [least]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(least / step - 1e-9)
    return [step * n for n in range(first, math.floor(most / step + 1e-9) + 1)]


# -- pieces


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    label = html.escape(title, quote=True)
    head = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">'
    return "\n".join([head, *parts, "</svg>"])


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "label") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, kind: str, title: str) -> str:
    place = f'x="{x:.2f}" y="{y:.1f}" width="{max(width, 0):.2f}" height="{height:.1f}"'
    return f'<rect {place} class="{kind_class(kind)}"><title>{html.escape(title)}</title></rect>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _shortened(text: str, most: int = _CHARACTERS_LEFT) -> str:
    """The end tells more than the middle: points of a sweep differ there."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"


def _legend(kinds: Sequence[str], y: float) -> Iterator[str]:
    x = float(LEFT)
    for kind in kinds:
        yield _rect(x, y - 10, 12, 12, kind, kind)
        yield _text(x + 18, y, kind)
        x += 40 + 7.2 * len(kind)


def _grid(marks: Sequence[float], scale: float, low: float, top: float, bottom: float, unit: str) -> Iterator[str]:
    for mark in marks:
        x = LEFT + (mark - low) * scale
        yield _line(x, top, x, bottom, "grid")
        yield _text(x, bottom + 16, f"{mark:g}", anchor="middle", kind="tick")
    yield _text(LEFT - 22, bottom + 16, unit, anchor="end", kind="tick")


# -- charts


def _bars(chart: Bars) -> str:
    most = max((sum(s.value for s in bar.segments) for bar in chart.bars), default=0.0) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / most
    kinds = list(dict.fromkeys(s.kind for bar in chart.bars for s in bar.segments))
    top, bottom = 34.0, 34.0 + _ROW * len(chart.bars)
    parts = [*_legend(kinds, 16), *_grid(ticks(most), scale, 0, top, bottom, chart.unit)]
    for place, bar in enumerate(chart.bars):
        y, x = top + place * _ROW, float(LEFT)
        label = f"<title>{html.escape(bar.label)}</title>"
        parts.append(f"<g>{label}{_text(LEFT - 10, y + 19, _shortened(bar.label), anchor='end')}</g>")
        for segment in bar.segments:
            told = f"{bar.label}: {segment.kind} {segment.value:.4g} {chart.unit}"
            parts.append(_rect(x, y + 6, segment.value * scale, _BAR, segment.kind, told))
            x += segment.value * scale
        if bar.mark is not None and bar.segments:
            parts.append(_line(LEFT + bar.mark * scale, y + 2, LEFT + bar.mark * scale, y + 28, "mark"))
        parts.append(_text(x + 8, y + 19, bar.after, kind="value"))
    return _svg(bottom + 26, chart.title, parts)


def _curves(chart: Curves) -> str:
    points = [point for curve in chart.curves for point in curve.points]
    xs = [x for x, _, _ in points]
    top_y = max(interval[1] if interval else y for _, y, interval in points) * 1.05 or 1.0
    low, high = min(xs), max(xs)
    scale_x, scale_y, bottom = (WIDTH - LEFT - 40) / (high - low), 260 / top_y, 34.0 + 260

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - low) * scale_x, bottom - y * scale_y

    parts = list(_grid(sorted(set(xs)), scale_x, low, 34, bottom, ""))
    parts.append(_text(WIDTH - 40, bottom + 34, chart.x_name, anchor="end", kind="tick"))
    for mark in ticks(top_y):
        y = at(low, mark)[1]
        parts += [_line(LEFT, y, WIDTH - 40, y, "grid"), _text(LEFT - 8, y + 4, f"{mark:g}", anchor="end", kind="tick")]
    parts.append(_text(LEFT - 8, 22, chart.unit, anchor="end", kind="tick"))
    for place, curve in enumerate(chart.curves):
        parts += _curve(curve, place, at, chart)
        x, y = 10, 54 + 22 * place
        parts += [_line(x, y - 4, x + 20, y - 4, f"curve c{place % CURVE_COLOURS}")]
        parts.append(_text(x + 26, y, _shortened(curve.name, 24)))
    return _svg(max(bottom + 42, 60 + 22 * len(chart.curves)), chart.title, parts)


def _curve(curve: Curve, place: int, at: object, chart: Curves) -> Iterator[str]:
    assert callable(at)
    colour = f"c{place % CURVE_COLOURS}"
    path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y, _ in curve.points)
    yield f'<polyline points="{path}" class="curve {colour}"/>'
    for x, y, interval in curve.points:
        px, py = at(x, y)
        if interval is not None:
            yield _line(px, at(x, interval[0])[1], px, at(x, interval[1])[1], f"curve {colour}")
        title = html.escape(f"{curve.name}: {chart.x_name} {x:g}, {y:.4g} {chart.unit}")
        yield f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4.5" class="dot {colour}"><title>{title}</title></circle>'


def _timeline(chart: Timeline) -> str:
    start, end = chart.window
    left, width = 130, WIDTH - 130 - 20
    scale = width / ((end - start) or 1.0)
    kinds = list(dict.fromkeys(span[2] for lane in chart.lanes for span in inside(lane.spans, chart.window)))
    top, bottom = 34.0, 34.0 + _ROW * len(chart.lanes)
    parts = list(_legend(kinds, 16))
    for mark in ticks(end, start, 8):
        x = left + (mark - start) * scale
        parts += [_line(x, top, x, bottom, "grid"), _text(x, bottom + 16, f"{mark:g}", anchor="middle", kind="tick")]
    parts.append(_text(left - 22, bottom + 16, "ms", anchor="end", kind="tick"))
    for place, lane in enumerate(chart.lanes):
        y = top + place * _ROW
        parts.append(_text(left - 10, y + 19, lane.name, anchor="end"))
        for kind in dict.fromkeys(span[2] for span in lane.spans):
            spans = [span for span in inside(lane.spans, chart.window) if span[2] == kind]
            boxes = _merged([(left + (a - start) * scale, left + (b - start) * scale) for a, b, _ in spans])
            path = "".join(
                f"M{a:.1f} {y + 6:.1f}h{max(b - a, 0.4):.1f}v{_BAR}h-{max(b - a, 0.4):.1f}z" for a, b in boxes
            )
            busy_ms = sum(b - a for a, b, _ in spans)
            title = html.escape(f"{lane.name}: {kind}, {len(spans)} times, {busy_ms:.4g} ms in all")
            parts.append(f'<path d="{path}" class="{kind_class(kind)}"><title>{title}</title></path>')
    return _svg(bottom + 26, chart.title, parts)


def _merged(boxes: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Boxes less than a third of a pixel apart drawn as one, so that a long trace stays a small page."""
    found: list[tuple[float, float]] = []
    for left, right in sorted(boxes):
        if found and left - found[-1][1] < 0.3:
            found[-1] = (found[-1][0], max(found[-1][1], right))
        else:
            found.append((left, right))
    return found
