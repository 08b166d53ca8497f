"""When each tier worked: from a trace beside a result, or from its phases' sums."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.compare.sides import TRACE_SUFFIX, Side
from bench.report.charts import KV_MOVED, STALLED_KV, Bar, Bars, Span, phases_of, stalls_of
from bench.result.types import Result
from wsm.disk.files import parse_json, read_file
from wsm.errors import UnusableInput

MOST_BYTES = 1 << 30
_SHOWN = {
    "phase": ("phase", ""),
    "ssd_read": ("SSD reads", "SSD"),
    "cpu_tier": ("CPU tier", "in CPU memory"),
    "weight_h2d": ("H2D", "link"),
    "weight_wait": ("compute waits", "stalled"),
    "kv_wait": ("compute waits", STALLED_KV),
    "compute": ("compute", "busy"),
    "weight_decode": ("decode", "decoding weights"),
    "draft": ("draft", "drafting"),
    **{tier: (name, name) for tier, name in KV_MOVED.items()},
}
"""The lane and the legend's word of each kind of a trace's events; a phase's word is its name."""
_KIND_OF_TIER = {"ssd": "ssd_read", "h2d": "weight_h2d", "compute": "compute", **{tier: tier for tier in KV_MOVED}}


class Trace(NamedTuple):
    """A trace's lanes, the phases' first, and when each pass began: at the computation named first, each time (ms)."""

    lanes: Sequence[Bar]
    passes: Sequence[float]


def timelines_of(side: Side) -> Iterator[Bars]:
    """The whole run and one decode pass, if its trace is beside the result; else what the phases' sums say.

    Raises UnusableInput if the trace is damaged.
    """
    if side.typical is None:
        return
    note = ""
    for path in _traces_beside(side.source, side.typical):
        read = read_trace(path)
        if not _is_of(read, side.typical):
            note += f"{path.name} is of another run. "
            continue
        # What was read ahead for a pass after the last one ends outside the phases.
        window = 0.0, max(span[1] for span in read.lanes[0].spans)
        note = f"Every read, copy and computation, from {path.name}."
        yield Bars(f"timeline-{side.name}", "Timeline of the run", note, "ms", read.lanes, window)
        if one := _middle_pass(read):
            note = "The same, magnified: a pass in the middle of the decode."
            yield Bars(f"timeline-pass-{side.name}", "Timeline of one decode pass", note, "ms", read.lanes, one)
        return
    note += "From the phases' sums: how long each tier worked in a phase, not when. Run with --trace for the moments."
    yield Bars(f"timeline-{side.name}", "Timeline of the run", note, "ms", _lanes(_sums(side.typical)))


def _traces_beside(source: Path, result: Result) -> Iterator[Path]:
    """``mixed.trace.json`` beside ``mixed.json``, and what ``--trace`` named if it is there."""
    if source.suffix == ".json":
        places = [source.with_suffix(TRACE_SUFFIX)]
        if named := result.config.resolved.get("trace"):
            places.append(source.parent / Path(str(named)).name)
        yield from (place for place in dict.fromkeys(places) if place.is_file())


def _is_of(trace: Trace, result: Result) -> bool:
    """Whether the phases took as long in both (the result's are rounded): a trace may have outlived its run."""
    took_ms = {name: end - start for start, end, name in trace.lanes[0].spans}
    phases = phases_of(result)
    return took_ms.keys() == phases.keys() and all(
        math.isclose(took_ms[name], phase.wall_ms, rel_tol=1e-3, abs_tol=1e-3) for name, phase in phases.items()
    )


def read_trace(path: Path) -> Trace:
    """A Chrome trace that ``--trace`` wrote; raises UnusableInput if it is none."""
    mend = "delete it, or trace the run again"
    found = parse_json(read_file(path, most_bytes=MOST_BYTES), str(path), mend)
    try:
        events = found["traceEvents"]
        threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
        spans: dict[str, list[Span]] = {lane: [] for lane, _ in _SHOWN.values()}
        computed: list[tuple[float, str]] = []
        for event in events:
            if event["ph"] == "X":
                start, length, name = float(event["ts"]) / 1e3, float(event["dur"]) / 1e3, str(event["name"])
                if not (math.isfinite(start) and math.isfinite(length) and length >= 0):
                    raise ValueError(f"an event at {start} ms lasts {length} ms")
                lane, word = _SHOWN[event["args"].get("kind") or _kind_by_name(threads[event["tid"]], name)]
                spans[lane].append((start, start + length, word or name))
                if lane == "compute":
                    computed.append((start, name))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnusableInput(f"{path} is no timeline of --trace ({error}): {mend}") from error
    first = min(computed, default=(0.0, ""))[1]
    return Trace(_lanes(spans), sorted(start for start, name in computed if name == first))


def _kind_by_name(thread: str, name: str) -> str:
    """The kind of an event in a trace of before events had one; ``H2D 2`` is the second track of ``H2D``."""
    lane = thread.rstrip(" 0123456789")
    if lane == "KV":
        return name.rpartition(".")[2]
    kind_of = {shown: kind for kind, (shown, _) in reversed(_SHOWN.items())}
    return "kv_wait" if name == "wait KV" else kind_of[lane]


def _lanes(spans: Mapping[str, Sequence[Span]]) -> list[Bar]:
    """Those of KV only where some of it moved, those of decoding and drafting where something was."""
    rare = {*KV_MOVED.values(), "decode", "draft"}
    return [Bar(lane, tuple(sorted(s))) for lane, s in spans.items() if s or lane not in rare]


def _middle_pass(trace: Trace) -> tuple[float, float] | None:
    """A pass in the middle of the decode; None where fewer than two begin in it."""
    start, end = next((start, end) for start, end, phase in trace.lanes[0].spans if phase == "decode")
    starts = [begun for begun in trace.passes if start <= begun <= end]
    middle = len(starts) // 2
    return (starts[middle - 1], starts[middle]) if middle else None


def _sums(result: Result) -> dict[str, list[Span]]:
    """Each tier's times inside their phase, one after the other: how long, not when."""
    spans: dict[str, list[Span]] = {"phase": [], **{_SHOWN[kind][0]: [] for kind in _KIND_OF_TIER.values()}}
    start = 0.0
    for name, phase in phases_of(result).items():
        end = start + phase.wall_ms
        spans["phase"].append((start, end, name))
        for tier, kind in _KIND_OF_TIER.items():
            lane, word = _SHOWN[kind]
            parts, at = {word: getattr(phase.busy_ms, tier)}, start
            if tier == "compute":
                parts |= stalls_of(phase)
            for part, ms in parts.items():
                if ms and at < end:
                    spans[lane].append((at, min(end, at + ms), part))
                    at += ms
        start = end
    return spans
