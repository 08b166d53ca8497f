"""A timeline in the Chrome trace format: SSD reads, the CPU tier, copies to the GPU, computing and KV, a bar per group.

A viewer nests bars that overlap on one lane, so what overlaps is on lanes side by side. What a program wants to know of
an event is in its ``args``: ``kind`` (phase, ssd_read, cpu_tier, weight_h2d, weight_wait, kv_wait, compute,
weight_decode, draft, or what of KV moved: kv_h2d, kv_d2h, kv_read, kv_write), ``group``, ``layer`` of KV, ``step`` of
the pass order, and ``bytes``.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from wsm.engine.records import Interval, Records, Transfer
from wsm.layout.groups import GroupId

LANES = ("phase", "SSD reads", "CPU tier", "H2D", "compute waits", "compute", "decode", "draft", "KV")
_MOST_SIDE_BY_SIDE = 1000
"""Room in the numbering of lanes; far more than there are slots or reads in flight."""
_SHORTEST_WAIT_S = 1e-6


class Stay(NamedTuple):
    """One stay of a group in a lane, in seconds of the host's clock."""

    lane: str
    name: str
    interval: Interval
    args: dict[str, Any]


def chrome_trace(records: Records, phases: dict[str, Interval]) -> str:
    """The trace of the given stretches of time, as JSON; times in microseconds."""
    start = min(window[0] for window in phases.values())
    end = max(window[1] for window in phases.values())
    stays = [stay for stay in _stays(records, phases, end) if stay.interval[0] < end and stay.interval[1] > start]
    events: list[dict[str, Any]] = []
    for place, lane in enumerate(LANES):
        tracks = _side_by_side(stay for stay in stays if stay.lane == lane)
        for beside, track in enumerate(tracks or [[]]):
            tid = place * _MOST_SIDE_BY_SIDE + beside
            shown = lane if len(tracks) < 2 else f"{lane} {beside + 1}"
            for name, args in {"thread_name": {"name": shown}, "thread_sort_index": {"sort_index": tid}}.items():
                events.append({"ph": "M", "pid": 0, "tid": tid, "name": name, "args": args})
            for stay in track:
                first, last = stay.interval
                times = {"ts": (first - start) * 1e6, "dur": (last - first) * 1e6}
                events.append({"ph": "X", "name": stay.name, "pid": 0, "tid": tid, **times, "args": stay.args})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _stays(records: Records, phases: dict[str, Interval], trace_end: float) -> Iterator[Stay]:
    for name, window in phases.items():
        yield Stay("phase", name, window, {"kind": "phase"})
    copies = _groups_of(records.copies)
    copied_at = {(copy.group, copy.step): copy.end for copy in copies}
    for read in records.reads:
        yield _moved("SSD reads", "ssd_read", read)
        if read.step is not None:  # from its first byte in a slot to its last one on the GPU, or the trace's end
            left_at = copied_at.get((read.group, read.step), trace_end)
            yield _moved("CPU tier", "cpu_tier", replace(read, end=max(left_at, read.end)))
    for copy in copies:
        yield _moved("H2D", "weight_h2d", copy)
    for use in records.uses:
        group = str(use.group or "pass")
        args = {"group": group, "step": use.step}
        if use.granted - use.asked > _SHORTEST_WAIT_S:
            yield Stay("compute waits", f"wait {group}", (use.asked, use.granted), {"kind": "weight_wait", **args})
        yield Stay("compute", group, (use.granted, use.done), {"kind": "compute", **args})
    for made in records.decodings:
        args = {"kind": "weight_decode", "group": str(made.group), "bytes": made.nbytes}
        yield Stay("decode", str(made.group), (made.start, made.end), args)
    for drafted in records.drafts:
        yield Stay("draft", "draft", drafted, {"kind": "draft"})
    for waited in records.kv_waits:
        if waited[1] - waited[0] > _SHORTEST_WAIT_S:
            yield Stay("compute waits", "wait KV", waited, {"kind": "kv_wait"})
    for moved in records.kv:
        args = {"kind": moved.tier, "layer": moved.layer, "bytes": moved.nbytes}
        yield Stay("KV", f"L{moved.layer}.{moved.tier}", (moved.start, moved.end), args)


def _moved(lane: str, kind: str, moved: Transfer) -> Stay:
    group = "globals" if moved.group is None else str(moved.group)
    args = {"kind": kind, "group": group, "step": moved.step, "bytes": moved.nbytes}
    return Stay(lane, group, (moved.start, moved.end), args)


def _groups_of(pieces: Iterable[Transfer]) -> list[Transfer]:
    """One transfer a group and step, from its first piece to its last."""
    whole: dict[tuple[GroupId | None, int | None], Transfer] = {}
    for piece in pieces:
        key = piece.group, piece.step
        so_far = whole.get(key, replace(piece, nbytes=0))
        whole[key] = replace(so_far, nbytes=so_far.nbytes + piece.nbytes, end=piece.end)
    return list(whole.values())


def _side_by_side(stays: Iterable[Stay]) -> list[list[Stay]]:
    """The stays in as few tracks as keep those of one track apart."""
    tracks: list[list[Stay]] = []
    free_at: list[tuple[float, int]] = []
    for stay in sorted(stays, key=lambda stay: stay.interval):
        if free_at and free_at[0][0] <= stay.interval[0]:
            track = heapq.heappop(free_at)[1]
        else:
            track = len(tracks)
            tracks.append([])
        tracks[track].append(stay)
        heapq.heappush(free_at, (stay.interval[1], track))
    return tracks
