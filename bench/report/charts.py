"""What a report draws, as numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from bench.compare.sides import Side
from bench.compare.text import letters, shown_cell
from bench.result.spread import median_interval
from bench.result.types import Result
from bench.result.types_phases import Phase

Span = tuple[float, float, str]
"""Start and end in the chart's unit, and the kind, which decides the colour and is in the legend."""
PHASES = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Bar:
    """Spans on one line; ``after`` is written behind them, at ``mark`` a line is drawn across."""

    label: str
    spans: tuple[Span, ...]
    after: str = ""
    mark: float | None = None


@dataclass(frozen=True, slots=True)
class Bars:
    """Bars below each other on one scale, of which ``window`` is shown."""

    name: str
    title: str
    note: str
    unit: str
    bars: tuple[Bar, ...]
    window: tuple[float, float]


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
KV_MOVED = {tier: name for tier, name in MOVED.items() if tier.startswith("kv_")}
STALLED_KV = "stalled by KV"
_TIERS = {"ssd": "SSD reads", "h2d": "link", "compute": "compute", **KV_MOVED}


def overview_charts(sides: Sequence[Side]) -> Iterator[Bars]:
    """Of all sides together: their times, and how far from the floor they are."""
    alone = len(sides) == 1
    note = "Medians over rounds or processes; in brackets the 95 % bootstrap interval of the median of e2e_ms."
    times = [_time(side, side.name if alone else f"{letters(n)}: {side.name}") for n, side in enumerate(sides)]
    yield _from_zero("times", "Time of a run", note, "ms", times)
    note = (
        "How much of the measured time the hardware's own rates explain: at 100 % nothing else limits the run. "
        "Above it, a ceiling was measured too low."
    )
    reached = [
        _roofline(side, phase, phase if alone else f"{letters(n)}, {phase}")
        for n, side in enumerate(sides)
        for phase in PHASES
    ]
    yield _from_zero("roofline", "Distance from the floor", note, "%", reached)


def side_charts(side: Side) -> Iterator[Bars]:
    """Of one side: time and bytes per phase."""
    if side.typical is None:
        return
    note = (
        f"Each tier over the whole phase. Stalled: computing waited for weights, {STALLED_KV}: for KV. "
        "Idle: nothing to do, or embedding, head and sampling."
    )
    if tiers := list(_tier_times(side.typical)):
        yield _from_zero(f"tiers-{side.name}", "Time per phase", note, "ms", tiers)
    note = "Bytes that moved between the phase's first and last moment (10^6 bytes)."
    if moved := list(_moved(side.typical)):  # full pages nothing: there is nothing to draw
        yield _from_zero(f"bytes-{side.name}", "Bytes per phase", note, "MB", moved)


def _from_zero(name: str, title: str, note: str, unit: str, bars: Sequence[Bar]) -> Bars:
    most = max((span[1] for bar in bars for span in bar.spans), default=0.0)
    return Bars(name, title, note, unit, tuple(bars), (0.0, most or 1.0))


def _stacked(label: str, parts: Mapping[str, float], after: str, mark: float | None = None) -> Bar:
    """A bar of kinds end to end, from 0."""
    ends = list(accumulate(parts.values(), initial=0.0))
    return Bar(label, tuple(zip(ends, ends[1:], parts, strict=False)), after, mark)


# -- of all sides


def _time(side: Side, label: str) -> Bar:
    if not side.results:
        return Bar(label, (), "no result")
    e2e = side.samples("e2e_ms")
    interval = median_interval(e2e)
    spread = f" [{shown_cell(interval[0])}, {shown_cell(interval[1])}]" if interval else ""
    parts = {phase: statistics.median(side.samples(f"{phase}_ms")) for phase in PHASES}
    return _stacked(label, parts, f"{shown_cell(statistics.median(e2e))} ms{spread}")


def _roofline(side: Side, phase: str, label: str) -> Bar:
    found: Phase | None = getattr(side.typical.phases, phase) if side.typical is not None else None
    if found is None or found.floor_ms is None:
        return Bar(label, (), "no floor known")
    percent, bound_by = found.roofline_pct, found.bound_by
    if percent is None:
        return Bar(label, (), "no time to measure the floor by")
    after = f"{percent:.1f} %, bound by {bound_by}"
    if percent > MOST_BELIEVED_PCT:
        after = f"{percent:.0f} %: ceiling of {bound_by} too low"
    reached = min(100.0, percent)
    return _stacked(label, {"floor": reached, "above the floor": 100 - reached}, after, mark=100.0)


# -- of one side


def phases_of(result: Result) -> Iterator[tuple[str, Phase]]:
    for phase in PHASES:
        yield phase, getattr(result.phases, phase)


def _tier_times(result: Result) -> Iterator[Bar]:
    for phase, found in phases_of(result):
        for tier, name in _TIERS.items():
            busy: float | None = getattr(found.busy_ms, tier)
            stall: float | None = getattr(found.stall_ms, tier, None)
            idle: float | None = getattr(found.idle_ms, tier, None)
            if busy is None:
                continue
            parts = {"busy": busy}
            if tier == "compute":
                # A tier's stall is time that the next tier waited for it: part of neither its busy nor its idle time.
                parts["stalled"] = found.stall_ms.h2d or 0.0
                if found.stall_ms.kv:
                    parts[STALLED_KV] = found.stall_ms.kv
            if idle is not None:
                parts["idle"] = idle
            after = f"{100 * busy / found.wall_ms:.0f} % busy" if found.wall_ms else ""
            if stall:
                after += f", {stall:.4g} ms waited for"
            yield _stacked(f"{phase}, {name}", parts, after)


def _moved(result: Result) -> Iterator[Bar]:
    for phase, found in phases_of(result):
        for key, name in MOVED.items():
            if megabytes := getattr(found.bytes_moved, key) / 1e6:
                after = f"{megabytes:.4g} MB, {megabytes / (found.passes or 1):.4g} MB a pass"
                yield _stacked(f"{phase}, {name}", {name: megabytes}, after)


# -- a sweep


def sweep_charts(sides: Sequence[Side]) -> Iterator[Curves]:
    """Curves over every swept flag whose values are numbers, two or more."""
    swept = [side for side in sides if side.values and side.results]
    for flag in dict.fromkeys(flag for side in swept for flag in side.values):
        values = {_as_number(side.values.get(flag, "")) for side in swept}
        if None not in values and len(values) > 1:
            yield _curves(swept, flag, "e2e_ms", "ms", "Time of a run")
            yield _curves(swept, flag, "throughput_tok_s", "tokens/s", "Decode throughput")


def _as_number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _curves(sides: Sequence[Side], flag: str, metric: str, unit: str, title: str) -> Curves:
    found: dict[str, list[tuple[float, float, tuple[float, float] | None]]] = {}
    for side in sides:
        others = ", ".join(f"{name.lstrip('-')} {value}" for name, value in side.values.items() if name != flag)
        samples = side.samples(metric)
        point = (float(side.values[flag]), statistics.median(samples), median_interval(samples))
        found.setdefault(others or metric, []).append(point)
    curves = tuple(Curve(name, tuple(sorted(points, key=lambda point: point[0]))) for name, points in found.items())
    note = f"{metric}, median of each point; bars are the 95 % bootstrap interval of the median where n is 3 or more."
    return Curves(f"sweep-{flag.lstrip('-')}-{metric}", f"{title} over {flag}", note, flag, unit, curves)
