"""When each tier worked: from a trace beside a result, or from its phases' sums."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.compare.sides import TRACE_SUFFIX, Side
from bench.report.charts import MOVED, STALLED_KV, number
from bench.result.results import plain
from wsm.errors import UnusableInput

Span = tuple[float, float, str]
"""Start and end in ms, and the kind that decides the colour."""
_KIND_OF_LANE = {
    "SSD reads": "SSD",
    "CPU tier": "in CPU memory",
    "H2D": "link",
    "compute waits": "stalled",
    "compute": "busy",
}
SAME_RUN = 1e-3
"""How far a trace's phases may be from the result's, which are rounded."""
_KV = "KV"
"""The lane of all KV that moves: its bars' names end in the tier, and each tier is drawn as a lane of its own."""
_KV_TIERS = tuple(tier for tier in MOVED if tier.startswith("kv_"))


@dataclass(frozen=True, slots=True)
class Lane:
    name: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Timeline:
    """Lanes below each other over ``window`` (ms)."""

    name: str
    title: str
    note: str
    window: tuple[float, float]
    lanes: tuple[Lane, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace's lanes, and when each pass began: at the computation whose name comes first, again and again (ms)."""

    lanes: tuple[Lane, ...]
    passes: tuple[float, ...]

    @property
    def phases(self) -> tuple[Span, ...]:
        return tuple(span for lane in self.lanes if lane.name == "phase" for span in lane.spans)


def timelines_of(side: Side) -> Iterator[Timeline]:
    """The whole run and one decode pass, if its trace lies beside the result; else what the phases' sums tell.

    Raises:
        UnusableInput: if the trace is damaged.
    """
    if side.typical is None:
        return
    others = ""
    for path in _traces_beside(side):
        read = read_trace(path)
        if _is_of(read, plain(side.typical)):
            break
        others += f"{path.name} is of another run. "
    else:
        yield _from_phases(side.name, plain(side.typical), others)
        return
    # What was read ahead for a pass after the last one ends outside the phases.
    end = max((span[1] for span in read.phases), default=0.0)
    note = f"Every read, copy and computation, from {path.name}."
    yield Timeline(f"timeline-{side.name}", "Timeline of the run", note, (0.0, end), read.lanes)
    window = _middle_pass(read)
    if window is not None:
        note = "The same, magnified: a pass in the middle of the decode."
        yield Timeline(f"timeline-pass-{side.name}", "Timeline of one decode pass", note, window, read.lanes)


def inside(spans: Sequence[Span], window: tuple[float, float]) -> Iterator[Span]:
    """What of the spans lies in the window."""
    for start, end, kind in spans:
        if end > window[0] and start < window[1]:
            yield max(start, window[0]), min(end, window[1]), kind


def _traces_beside(side: Side) -> Iterator[Path]:
    """``mixed.trace.json`` beside ``mixed.json``, and what ``--trace`` named if it lies there."""
    if side.source.suffix != ".json" or side.typical is None:
        return
    named = side.typical.config.resolved.get("trace")
    places = [side.source.with_suffix(TRACE_SUFFIX)]
    if isinstance(named, str):
        places.append(side.source.parent / Path(named).name)
    yield from (place for place in dict.fromkeys(places) if place.is_file())


def _is_of(trace: Trace, result: Mapping[str, Any]) -> bool:
    """Whether the phases took as long in both: a file of the name may have outlived its run."""
    took_ms = {kind: end - start for start, end, kind in trace.phases}
    told_ms = {name: float(result["phases"][name]["wall_ms"]) for name in ("prefill", "decode")}
    return set(took_ms) == set(told_ms) and all(
        math.isclose(took_ms[name], ms, rel_tol=SAME_RUN, abs_tol=1e-3) for name, ms in told_ms.items()
    )


def read_trace(path: Path) -> Trace:
    """A Chrome trace that ``--trace`` wrote.

    Raises:
        UnusableInput: if it is none.
    """
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        lane_of = {event["tid"]: _lane(event["args"]["name"]) for event in events if event["name"] == "thread_name"}
        spans: dict[str, list[Span]] = {lane: [] for lane in lane_of.values()}
        computed: list[tuple[float, str]] = []
        for event in events:
            if event["ph"] == "X":
                start, length = float(event["ts"]) / 1e3, float(event["dur"]) / 1e3
                if not (math.isfinite(start) and math.isfinite(length) and length >= 0):
                    raise ValueError(f"an event at {start} ms lasts {length} ms")
                lane, name = lane_of[event["tid"]], str(event["name"])
                kind = _kind(lane, name)
                spans.setdefault(kind if lane == _KV else lane, []).append((start, start + length, kind))
                if lane == "compute":
                    computed.append((start, name))
    except OSError as error:
        raise UnusableInput(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UnusableInput(f"{path} is no timeline of --trace ({error}): delete it, or trace the run again") from error
    first = min(computed, default=(0.0, ""))[1]
    lanes = tuple(Lane(lane, tuple(sorted(found))) for lane, found in spans.items() if found or lane != _KV)
    return Trace(lanes, tuple(sorted(start for start, name in computed if name == first)))


def _lane(thread: str) -> str:
    """``H2D 2`` is the second track of ``H2D``, for bars that overlap those of the first."""
    return re.sub(r" \d+$", "", thread)


def _kind(lane: str, event: str) -> str:
    if lane == "phase":
        return event
    if lane == _KV:
        tier = event.rpartition(".")[2]
        return MOVED.get(tier, tier)
    if lane == "compute waits" and event == f"wait {_KV}":
        return STALLED_KV
    return _KIND_OF_LANE.get(lane, "busy")


def _middle_pass(trace: Trace) -> tuple[float, float] | None:
    """A pass in the middle of the decode; None where fewer than two begin in it."""
    decode = next((span for span in trace.phases if span[2] == "decode"), None)
    if decode is None:
        return None
    starts = [start for start in trace.passes if decode[0] <= start <= decode[1]]
    middle = len(starts) // 2
    return (starts[middle - 1], starts[middle]) if middle else None


def _from_phases(name: str, result: Mapping[str, Any], note: str = "") -> Timeline:
    """Each tier's sums, drawn inside their phase: how long, not when."""
    lanes: dict[str, list[Span]] = {"phase": [], "SSD reads": [], "H2D": [], "compute": []}
    lanes |= {MOVED[tier]: [] for tier in _KV_TIERS}
    start = 0.0
    for phase in ("prefill", "decode"):
        found = result["phases"][phase]
        end = start + float(found["wall_ms"])
        lanes["phase"].append((start, end, phase))
        for tier, lane in (("ssd", "SSD reads"), ("h2d", "H2D"), ("compute", "compute")):
            busy = number(found["busy_ms"].get(tier)) or 0.0
            lanes[lane].append((start, min(end, start + busy), _KIND_OF_LANE[lane]))
            if tier == "compute":
                lanes[lane] += _waits(found["stall_ms"], start + busy, end)
        for tier in _KV_TIERS:
            busy = number(found["busy_ms"].get(tier)) or 0.0
            lanes[MOVED[tier]].append((start, min(end, start + busy), MOVED[tier]))
        start = end
    note += "From the phases' sums: how long each tier worked in a phase, not when. Run with --trace for the moments."
    kept = {lane: tuple(span for span in spans if span[1] > span[0]) for lane, spans in lanes.items()}
    shown = tuple(Lane(lane, spans) for lane, spans in kept.items() if spans or lane not in MOVED.values())
    return Timeline(f"timeline-{name}", "Timeline of the run", note, (0.0, start), shown)


def _waits(stall_ms: Mapping[str, Any], start: float, end: float) -> Iterator[Span]:
    """What the computation waited for, one after the other."""
    for tier, kind in (("h2d", "stalled"), ("kv", STALLED_KV)):
        waited = number(stall_ms.get(tier)) or 0.0
        yield min(end, start), min(end, start + waited), kind
        start += waited
