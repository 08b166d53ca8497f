"""A timeline in the Chrome trace format: SSD reads, the CPU tier, copies to the GPU, computing and KV, a bar a group.

A viewer nests bars that overlap on one lane, so what overlaps lies on lanes side by side.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from wsm.engine.telemetry import Interval, Telemetry, Transfer
from wsm.layout.groups import GroupId

LANES = ("phase", "SSD reads", "CPU tier", "H2D", "compute waits", "compute", "KV")
_MOST_SIDE_BY_SIDE = 1000
"""Room in the numbering of lanes; far more than there are slots or reads in flight."""
_SHORTEST_WAIT_S = 1e-6


class Bar(NamedTuple):
    """One stay of a group in a lane, in seconds of the host's clock."""

    lane: str
    name: str
    interval: Interval
    args: dict[str, int]


def chrome_trace(telemetry: Telemetry, phases: dict[str, Interval]) -> str:
    """The trace of the given stretches of time, as JSON; to be asked when the device is idle. Times in microseconds."""
    start = min(window[0] for window in phases.values())
    end = max(window[1] for window in phases.values())
    bars = [bar for bar in _bars(telemetry, phases) if bar.interval[0] < end and bar.interval[1] > start]
    events: list[dict[str, Any]] = []
    for place, lane in enumerate(LANES):
        tracks = _side_by_side(bar for bar in bars if bar.lane == lane)
        for beside, track in enumerate(tracks or [[]]):
            tid = place * _MOST_SIDE_BY_SIDE + beside
            events += _named(tid, lane if len(tracks) < 2 else f"{lane} {beside + 1}")
            events += [_event(bar, tid, start) for bar in track]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _bars(telemetry: Telemetry, phases: dict[str, Interval]) -> Iterator[Bar]:
    for name, window in phases.items():
        yield Bar("phase", name, window, {})
    copies = _groups_of(telemetry.copies())
    copied_at = {(copy.group, copy.step): copy.end for copy in copies}
    for read in telemetry.reads:
        yield Bar("SSD reads", _name(read.group), (read.start, read.end), {"bytes": read.nbytes})
        left_at = copied_at.get((read.group, read.step))
        if read.step is not None and left_at is not None:  # from its first byte in a slot to its last one on the GPU
            yield Bar("CPU tier", _name(read.group), (read.start, max(left_at, read.end)), {"bytes": read.nbytes})
    for copy in copies:
        yield Bar("H2D", _name(copy.group), (copy.start, copy.end), {"bytes": copy.nbytes})
    for use in telemetry.uses():
        if use.granted - use.asked > _SHORTEST_WAIT_S:
            yield Bar("compute waits", f"wait {use.group or 'pass'}", (use.asked, use.granted), {})
        yield Bar("compute", str(use.group or "pass"), (use.granted, use.done), {})
    for waited in telemetry.kv_waits():
        if waited[1] - waited[0] > _SHORTEST_WAIT_S:
            yield Bar("compute waits", "wait KV", waited, {})
    for moved in telemetry.kv_transfers():
        yield Bar("KV", f"L{moved.layer}.{moved.tier}", (moved.start, moved.end), {"bytes": moved.nbytes})


def _groups_of(pieces: Iterable[Transfer]) -> list[Transfer]:
    """One transfer a group and step, from its first piece to its last."""
    whole: dict[tuple[GroupId | None, int | None], Transfer] = {}
    for piece in pieces:
        key = piece.group, piece.step
        so_far = whole.get(key, replace(piece, nbytes=0))
        whole[key] = replace(so_far, nbytes=so_far.nbytes + piece.nbytes, end=piece.end)
    return list(whole.values())


def _side_by_side(bars: Iterable[Bar]) -> list[list[Bar]]:
    """The bars in as few tracks as keep those of one track apart."""
    tracks: list[list[Bar]] = []
    free_at: list[tuple[float, int]] = []
    for bar in sorted(bars, key=lambda bar: bar.interval):
        if free_at and free_at[0][0] <= bar.interval[0]:
            track = heapq.heappop(free_at)[1]
        else:
            track = len(tracks)
            tracks.append([])
        tracks[track].append(bar)
        heapq.heappush(free_at, (bar.interval[1], track))
    return tracks


def _named(tid: int, name: str) -> list[dict[str, Any]]:
    common = {"ph": "M", "pid": 0, "tid": tid}
    return [
        {**common, "name": "thread_name", "args": {"name": name}},
        {**common, "name": "thread_sort_index", "args": {"sort_index": tid}},
    ]


def _event(bar: Bar, tid: int, start: float) -> dict[str, Any]:
    first, last = bar.interval
    times = {"ts": (first - start) * 1e6, "dur": (last - first) * 1e6}
    return {"ph": "X", "name": bar.name, "pid": 0, "tid": tid, **times, "args": bar.args}


def _name(group: GroupId | None) -> str:
    return "globals" if group is None else str(group)
