"""What a report draws, as numbers: the page draws it as SVG, ``--png`` with matplotlib."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.compare.sides import Side
from bench.compare.text import letters, shown_cell
from bench.result.results import plain
from bench.result.spread import median_interval


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a bar; ``kind`` decides its colour and stands in the legend."""

    kind: str
    value: float


@dataclass(frozen=True, slots=True)
class Bar:
    """Segments end to end; ``after`` is written behind them, ``mark`` is where a line is drawn across."""

    label: str
    segments: tuple[Segment, ...]
    after: str = ""
    mark: float | None = None


@dataclass(frozen=True, slots=True)
class Bars:
    """Horizontal bars on one scale."""

    name: str
    title: str
    note: str
    unit: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of x, y and, where it is known, the interval of y."""

    name: str
    points: tuple[tuple[float, float, tuple[float, float] | None], ...]


@dataclass(frozen=True, slots=True)
class Curves:
    """One figure over one swept flag, a curve for every combination of the others."""

    name: str
    title: str
    note: str
    x_name: str
    unit: str
    curves: tuple[Curve, ...]


Chart = Bars | Curves
MOST_BELIEVED_PCT = 105.0
"""A run cannot be faster than its floor; some 5 % of it are the ceilings' own noise."""
MOVED = {
    "ssd_read": "SSD to CPU",
    "weight_h2d": "weights to GPU",
    "kv_h2d": "KV to GPU",
    "kv_d2h": "KV from GPU",
    "kv_read": "KV from its drive",
    "kv_write": "KV to its drive",
}
"""What moves, by the names of a result and of a trace."""
STALLED_KV = "stalled by KV"
_TIERS = {
    "ssd": "SSD reads",
    "h2d": "link",
    "compute": "compute",
    **{tier: told for tier, told in MOVED.items() if tier.startswith("kv_")},
}


def overview_charts(sides: Sequence[Side]) -> Iterator[Chart]:
    """Of all sides together: their times, and how far from the floor they are."""
    yield _times(sides)
    yield _rooflines(sides)


def side_charts(side: Side) -> Iterator[Chart]:
    """Of one side: time and bytes per phase."""
    if side.typical is not None:
        charts = _tier_times(side.name, plain(side.typical)), _moved(side.name, plain(side.typical))
        yield from (chart for chart in charts if chart.bars)  # full pages nothing: there is nothing to draw


# -- of all sides


def _times(sides: Sequence[Side]) -> Bars:
    bars = []
    for place, side in enumerate(sides):
        label = side.name if len(sides) == 1 else f"{letters(place)}: {side.name}"
        if not side.results:
            bars.append(Bar(label, (), "no result"))
            continue
        e2e = side.samples("e2e_ms")
        parts = tuple(Segment(k, statistics.median(side.samples(f"{k}_ms"))) for k in ("prefill", "decode"))
        interval = median_interval(e2e)
        spread = f" [{shown_cell(interval[0])}, {shown_cell(interval[1])}]" if interval else ""
        bars.append(Bar(label, parts, f"{shown_cell(statistics.median(e2e))} ms{spread}"))
    note = "Medians over rounds or processes; in brackets the 95 % bootstrap interval of the median of e2e_ms."
    return Bars("times", "Time of a run", note, "ms", tuple(bars))


def _rooflines(sides: Sequence[Side]) -> Bars:
    bars = []
    for place, side in enumerate(sides):
        for phase in ("prefill", "decode"):
            label = phase if len(sides) == 1 else f"{letters(place)}, {phase}"
            found = plain(side.typical)["phases"][phase] if side.typical is not None else None
            if found is None or found["floor_ms"] is None:
                bars.append(Bar(label, (), "no floor known"))
                continue
            percent = found["roofline_pct"]
            if percent is None:
                bars.append(Bar(label, (), "no time to measure the floor by"))
                continue
            reached = Segment("floor", min(100.0, percent))
            rest = Segment("above the floor", max(0.0, 100 - percent))
            after = f"{percent:.1f} %, bound by {found['bound_by']}"
            if percent > MOST_BELIEVED_PCT:
                after = f"{percent:.0f} %: ceiling of {found['bound_by']} too low"
            bars.append(Bar(label, (reached, rest), after, mark=100.0))
    note = (
        "How much of the measured time the hardware's own rates explain: at 100 % nothing else limits the run. "
        "Above it, a ceiling was measured too low."
    )
    return Bars("roofline", "Distance from the floor", note, "%", tuple(bars))


# -- of one side


def _tier_times(name: str, result: Mapping[str, Any]) -> Bars:
    bars = []
    for phase, found in result["phases"].items():
        for tier, told in _TIERS.items():
            busy, stall, idle = (number(found[group].get(tier)) for group in ("busy_ms", "stall_ms", "idle_ms"))
            if busy is None:
                continue
            parts = [Segment("busy", busy)]
            if tier == "compute":
                # A tier's stall is time that the next tier waited for it: part of neither its busy nor its idle time.
                parts.append(Segment("stalled", number(found["stall_ms"].get("h2d")) or 0.0))
                if waited := number(found["stall_ms"].get("kv")):
                    parts.append(Segment(STALLED_KV, waited))
            if idle is not None:
                parts.append(Segment("idle", idle))
            after = f"{100 * busy / found['wall_ms']:.0f} % busy" if found["wall_ms"] else ""
            if stall and tier != "compute":
                after += f", {stall:.4g} ms waited for"
            bars.append(Bar(f"{phase}, {told}", tuple(parts), after))
    note = (
        f"Each tier over the whole phase. Stalled: computing waited for weights, {STALLED_KV}: for KV. "
        "Idle: nothing to do, or embedding, head and sampling."
    )
    return Bars(f"tiers-{name}", "Time per phase", note, "ms", tuple(bars))


def _moved(name: str, result: Mapping[str, Any]) -> Bars:
    bars = []
    for phase, found in result["phases"].items():
        for key, value in found["bytes_moved"].items():
            amount = number(value)
            if not amount:
                continue
            passes = number(found["passes"]) or 1
            after = f"{amount / 1e6:.4g} MB, {amount / passes / 1e6:.4g} MB a pass"
            bars.append(Bar(f"{phase}, {MOVED.get(key, key)}", (Segment(MOVED.get(key, key), amount / 1e6),), after))
    note = "Bytes that moved between the phase's first and last moment (10^6 bytes)."
    return Bars(f"bytes-{name}", "Bytes per phase", note, "MB", tuple(bars))


def number(value: Any) -> float | None:
    """A figure of a result, if it is one."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


# -- a sweep


def sweep_charts(sides: Sequence[Side]) -> Iterator[Chart]:
    """Curves over every swept flag whose values are numbers, two or more."""
    swept = [side for side in sides if side.values and side.results]
    for flag in dict.fromkeys(flag for side in swept for flag in side.values):
        values = [_as_number(side.values.get(flag)) for side in swept]
        if None not in values and len(set(values)) > 1:
            yield _curves(swept, flag, "e2e_ms", "ms", "Time of a run")
            yield _curves(swept, flag, "throughput_tok_s", "tokens/s", "Decode throughput")


def _as_number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else None
    except ValueError:
        return None
    return value if value is not None and math.isfinite(value) else None


def _curves(sides: Sequence[Side], flag: str, metric: str, unit: str, title: str) -> Curves:
    found: dict[str, list[tuple[float, float, tuple[float, float] | None]]] = {}
    for side in sides:
        others = ", ".join(f"{name.lstrip('-')} {value}" for name, value in side.values.items() if name != flag)
        samples = side.samples(metric)
        point = (float(side.values[flag]), statistics.median(samples), median_interval(samples))
        found.setdefault(others or metric, []).append(point)
    curves = tuple(Curve(name, tuple(sorted(points, key=lambda p: p[0]))) for name, points in found.items())
    note = f"{metric}, median of each point; bars are the 95 % bootstrap interval of the median where n is 3 or more."
    return Curves(f"sweep-{flag.lstrip('-')}-{metric}", f"{title} over {flag}", note, flag, unit, curves)
