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
Point = tuple[float, float, Sequence[float] | None]
"""x, y and, where it is known, the interval of y."""


@dataclass(frozen=True, slots=True)
class Bar:
    """Spans on one line; ``after`` is written behind them, at ``mark`` a line is drawn across."""

    label: str
    spans: tuple[Span, ...]
    after: str = ""
    mark: float | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing: ``name`` becomes a file's, ``note`` says what is shown."""

    name: str
    title: str
    note: str
    unit: str


@dataclass(frozen=True, slots=True)
class Bars(Chart):
    """Bars below each other on one scale, of which ``window`` is shown: None is all, from 0."""

    bars: Sequence[Bar]
    window: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Curves(Chart):
    """One figure over one swept flag, a curve for every combination of the others."""

    x_name: str
    curves: Mapping[str, Sequence[Point]]


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
_OF_TIMES = "Medians over rounds or processes; in brackets the 95 % bootstrap interval of the median of e2e_ms."
_OF_FLOORS = (
    "How much of the measured time the hardware's own rates explain: at 100 % nothing else limits the run. "
    "A run that beat its floor has no share of it: a ceiling was measured too low."
)
_OF_TIERS = (
    f"Each tier over the whole phase. Stalled: computing waited for weights, {STALLED_KV}: for KV. "
    "Idle: nothing to do, or embedding, head and sampling."
)
_OF_BYTES = "Bytes that moved between the phase's first and last moment (10^6 bytes)."


def overview_charts(sides: Sequence[Side]) -> Iterator[Bars]:
    """Of all sides together: their times, and how far from the floor they are."""
    alone = len(sides) == 1
    times, reached = [], []
    for place, side in enumerate(sides):
        times.append(_time(side, side.name if alone else f"{letters(place)}: {side.name}"))
        phases = phases_of(side.typical) if side.typical else {"prefill": None, "decode": None}
        reached += [_roofline(found, name if alone else f"{letters(place)}, {name}") for name, found in phases.items()]
    yield Bars("times", "Time of a run", _OF_TIMES, "ms", times)
    yield Bars("roofline", "Distance from the floor", _OF_FLOORS, "%", reached)


def side_charts(side: Side) -> Iterator[Bars]:
    """Of one side: time and bytes per phase; full pages nothing, and there is nothing to draw."""
    phases = phases_of(side.typical) if side.typical else {}
    if tiers := [bar for name, phase in phases.items() for bar in _tier_times(name, phase)]:
        yield Bars(f"tiers-{side.name}", "Time per phase", _OF_TIERS, "ms", tiers)
    if moved := [bar for name, phase in phases.items() for bar in _moved(name, phase)]:
        yield Bars(f"bytes-{side.name}", "Bytes per phase", _OF_BYTES, "MB", moved)


def phases_of(result: Result) -> dict[str, Phase]:
    """By their names, in their order."""
    return {"prefill": result.phases.prefill, "decode": result.phases.decode}


def stacked(label: str, parts: Mapping[str, float], after: str = "", mark: float | None = None) -> Bar:
    """A bar of kinds end to end, from 0."""
    ends = list(accumulate(parts.values(), initial=0.0))
    return Bar(label, tuple(zip(ends, ends[1:], parts, strict=False)), after, mark)


def _time(side: Side, label: str) -> Bar:
    if not side.results:
        return Bar(label, (), "no result")
    e2e = side.samples("e2e_ms")
    interval = median_interval(e2e)
    spread = f" [{shown_cell(interval[0])}, {shown_cell(interval[1])}]" if interval else ""
    parts = {name: statistics.median(side.samples(f"{name}_ms")) for name in ("prefill", "decode")}
    return stacked(label, parts, f"{shown_cell(statistics.median(e2e))} ms{spread}")


def _roofline(phase: Phase | None, label: str) -> Bar:
    if phase is None or phase.floor_ms is None:
        return Bar(label, (), "no floor known")
    if (reached := phase.roofline_pct) is None:
        too_low = f"faster than the floor: ceiling of {phase.bound_by} too low"
        return Bar(label, (), too_low if phase.beats_floor else "no time to measure the floor by")
    after = f"{reached:.1f} %, bound by {phase.bound_by}"
    return stacked(label, {"floor": reached, "above the floor": 100 - reached}, after, mark=100.0)


def _tier_times(name: str, phase: Phase) -> Iterator[Bar]:
    for tier, label in _TIERS.items():
        if (busy := getattr(phase.busy_ms, tier)) is None:
            continue
        parts, after = {"busy": busy}, f"{100 * busy / phase.wall_ms:.0f} % busy" if phase.wall_ms else ""
        # A tier's stall is time that the next tier waited for it: part of neither its busy nor its idle time.
        if tier == "compute":
            parts |= stalls_of(phase)
        elif stall := getattr(phase.stall_ms, tier, None):
            after += f", {stall:.4g} ms waited for"
        if (idle := getattr(phase.idle_ms, tier, None)) is not None:
            parts["idle"] = idle
        yield stacked(f"{name}, {label}", parts, after)


def stalls_of(phase: Phase) -> dict[str, float]:
    """What computing waited for, in ms, by the legend's words."""
    waited = {"stalled": phase.stall_ms.h2d, STALLED_KV: phase.stall_ms.kv}
    return {kind: ms for kind, ms in waited.items() if ms}


def _moved(name: str, phase: Phase) -> Iterator[Bar]:
    for key, moved in MOVED.items():
        if megabytes := getattr(phase.bytes_moved, key) / 1e6:
            after = f"{megabytes:.4g} MB, {megabytes / (phase.passes or 1):.4g} MB a pass"
            yield stacked(f"{name}, {moved}", {moved: megabytes}, after)


# -- a sweep


def sweep_charts(sides: Sequence[Side]) -> Iterator[Curves]:
    """Curves over every swept flag whose values are numbers, two or more."""
    swept = [side for side in sides if side.values and side.results]
    for flag in dict.fromkeys(flag for side in swept for flag in side.values):
        try:
            values = {float(side.values.get(flag, "")) for side in swept}
        except ValueError:
            continue
        if all(map(math.isfinite, values)) and len(values) > 1:
            yield _curves(swept, flag, "e2e_ms", "ms", "Time of a run")
            if passes := [side for side in swept if side.samples("decode_tok_s")]:
                yield _curves(passes, flag, "decode_tok_s", "tokens/s", "Tokens a second of the decode")


def _curves(sides: Sequence[Side], flag: str, metric: str, unit: str, title: str) -> Curves:
    curves: dict[str, list[Point]] = {}
    for side in sides:
        others = ", ".join(f"{name.lstrip('-')} {value}" for name, value in side.values.items() if name != flag)
        samples = side.samples(metric)
        point = (float(side.values[flag]), statistics.median(samples), median_interval(samples))
        curves.setdefault(others or metric, []).append(point)
        curves[others or metric].sort(key=lambda point: point[0])
    note = f"{metric}, median of each point; bars are the 95 % bootstrap interval of the median where n is 3 or more."
    return Curves(f"sweep-{flag.lstrip('-')}-{metric}", f"{title} over {flag}", note, unit, flag, curves)
