"""The timeline: every lane there, every group on it, and no two bars over each other."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from bench.run.trace import LANES, chrome_trace
from tests.records import records_of
from wsm.engine.device import Device
from wsm.engine.records import Records, Transfer
from wsm.engine.telemetry import Telemetry
from wsm.layout.groups import GroupId


def bars_by_lane(trace: str) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Bars by the lane's name without its number, then by track."""
    events = json.loads(trace)["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    lanes: dict[str, dict[int, list[dict[str, Any]]]] = {name.rstrip(" 0123456789"): {} for name in names.values()}
    for tid, name in names.items():
        bars = [event for event in events if event["ph"] == "X" and event["tid"] == tid]
        lanes[name.rstrip(" 0123456789")][tid] = bars
    return lanes


def test_reads_that_overlap_lie_side_by_side() -> None:
    spans = [(0.0, 3.0), (1.0, 4.0), (2.0, 3.5), (3.0, 5.0), (4.0, 6.0)]
    records = Records(reads=[Transfer(GroupId(n, "attn"), 2 * n, 10, *span) for n, span in enumerate(spans)])
    tracks = bars_by_lane(chrome_trace(records, {"decode": (0.0, 6.0)}))["SSD reads"]
    assert sorted(len(bars) for bars in tracks.values()) == [1, 2, 2]


def test_bars_outside_the_phases_are_left_out_and_time_starts_with_them() -> None:
    records = Records(
        reads=[Transfer(GroupId(0, "attn"), n, 10, at, at + 0.5) for n, at in enumerate((1.0, 7.0, 20.0))]
    )
    (bars,) = bars_by_lane(chrome_trace(records, {"prefill": (5.0, 8.0), "decode": (8.0, 9.0)}))["SSD reads"].values()
    args = {"kind": "ssd_read", "group": "L0.attn", "step": 1, "bytes": 10}
    assert [(bar["ts"], bar["dur"], bar["args"]) for bar in bars] == [(2e6, 0.5e6, args)]


def test_kv_that_moves_and_waits_for_it_have_their_bars() -> None:
    telemetry, device = Telemetry(Device()), Device()
    telemetry.kv_disk("kv_read", 3, 1, 100, 1.0, 2.0)
    telemetry.kv_disk("kv_write", 4, 1, 100, 1.5, 3.0)
    asked, granted = device.record(device.stream()), device.record(device.stream())
    asked.time_s, granted.time_s = 1.0, 2.0
    telemetry.kv_waited(asked, granted)
    lanes = bars_by_lane(chrome_trace(records_of(telemetry), {"decode": (0.0, 4.0)}))
    assert sorted(bar["name"] for bars in lanes["KV"].values() for bar in bars) == ["L3.kv_read", "L4.kv_write"]
    assert [bar["name"] for bars in lanes["compute waits"].values() for bar in bars] == ["wait KV"]


@pytest.fixture(scope="module")
def lanes(measured_files: tuple[Path, Path]) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """The built-in model in ``mixed``: layers on all three tiers."""
    return bars_by_lane(measured_files[1].read_text(encoding="utf-8"))


def test_every_lane_is_there_and_in_order(lanes: dict[str, dict[int, list[dict[str, Any]]]]) -> None:
    assert tuple(lanes) == LANES
    tracks = [min(track) for track in lanes.values()]
    assert tracks == sorted(tracks)


def test_no_two_bars_of_a_track_overlap(lanes: dict[str, dict[int, list[dict[str, Any]]]]) -> None:
    for track in (track for tracks in lanes.values() for track in tracks.values()):
        ends = [bar["ts"] + bar["dur"] for bar in track]
        assert all(end <= bar["ts"] + 1e-3 for end, bar in zip(ends, track[1:], strict=False))


def test_every_group_is_computed_and_streamed_ones_pass_through_the_tiers(
    lanes: dict[str, dict[int, list[dict[str, Any]]]],
) -> None:
    names = defaultdict(set)
    for lane, tracks in lanes.items():
        names[lane] = {bar["name"] for bars in tracks.values() for bar in bars}
    assert names["phase"] == {"prefill", "decode"}
    assert names["compute"] == {f"L{layer}.{kind}" for layer in range(48) for kind in ("attn", "ffn")}
    from_ssd = 48 - 4 - (40 - 6)
    assert len(names["SSD reads"]) == 2 * from_ssd
    assert names["CPU tier"] <= names["SSD reads"] <= names["H2D"]
    assert len(names["CPU tier"]) == 2 * from_ssd
    assert len(names["H2D"]) == 2 * 44
    assert not names["KV"]  # all of it is on the device
