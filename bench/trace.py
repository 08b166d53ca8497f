"""A timeline in the Chrome trace format: SSD reads, copies to the GPU, waiting and computing, a bar each group."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from llama.checkpoint.names import GroupId
from wsm.telemetry import Interval, Telemetry

_LANES = ("phase", "SSD reads", "H2D", "compute waits", "compute")


def chrome_trace(telemetry: Telemetry, phases: dict[str, Interval]) -> str:
    """The trace of the given stretches of time, as JSON; to be asked when the device is idle. Times in microseconds."""
    start = min(window[0] for window in phases.values())
    end = max(window[1] for window in phases.values())
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": lane, "args": {"name": name}}
        for lane, name in enumerate(_LANES)
    ]
    for lane, name, (first, last), args in _bars(telemetry, phases):
        if first < end and last > start:
            times = {"ts": (first - start) * 1e6, "dur": (last - first) * 1e6}
            events.append({"ph": "X", "name": name, "pid": 0, "tid": lane, **times, "args": args})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _bars(telemetry: Telemetry, phases: dict[str, Interval]) -> Iterator[tuple[int, str, Interval, dict[str, int]]]:
    for name, window in phases.items():
        yield 0, name, window, {}
    for lane, transfers in ((1, telemetry.reads), (2, telemetry.copies())):
        for moved in transfers:
            yield lane, _name(moved.group), (moved.start, moved.end), {"bytes": moved.nbytes}
    for use in telemetry.uses():
        if use.granted - use.asked > 1e-6:
            yield 3, f"wait {use.group or 'pass'}", (use.asked, use.granted), {}
        yield 4, str(use.group or "pass"), (use.granted, use.done), {}


def _name(group: GroupId | None) -> str:
    return "globals" if group is None else str(group)
