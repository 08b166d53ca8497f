"""Timelines: from a trace beside a result, or from its phases' sums."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.compare.sides import Side, read_sides
from bench.report.charts import MOVED, STALLED_KV, Bar, Bars
from bench.report.timeline import read_trace, timelines_of
from bench.run.trace import chrome_trace
from tests.records import records_of
from tests.results import stored, typed, varied
from wsm.engine.device import Device
from wsm.engine.records import KV_TIERS, Records, Transfer
from wsm.engine.telemetry import Telemetry
from wsm.errors import UnusableInput
from wsm.layout.groups import GroupId

NAMED = '{"ph": "M", "tid": 0, "name": "thread_name", "args": {"name": "H2D"}}'


def test_a_trace_beside_the_result_gives_the_run_and_one_pass(measured_files: tuple[Path, Path]) -> None:
    [side] = read_sides([measured_files[0]])
    assert side.typical is not None
    run, one_pass = timelines_of(side)
    assert run.window[1] == pytest.approx(side.typical.e2e_ms, rel=0.01)
    [computed] = (lane.spans for lane in one_pass.bars if lane.label == "compute")
    start, end = one_pass.window
    assert len([span for span in computed if start <= span[0] < end]) == 2 * 48  # the built-in model's groups
    lanes = {lane.label: lane.spans for lane in run.bars}
    busy_ms = sum(end - start for start, end, _ in lanes["compute"])
    told = side.typical.phases
    assert busy_ms == pytest.approx(told.prefill.busy_ms.compute + told.decode.busy_ms.compute, rel=0.02)


def test_bars_side_by_side_are_one_lane_and_each_way_of_kv_is_its_own(tmp_path: Path) -> None:
    telemetry, device = Telemetry(Device()), Device()
    reads = Records(reads=[Transfer(GroupId(n, "attn"), None, 10, n, n + 1.5) for n in range(3)])
    for at, tier in enumerate(KV_TIERS):
        telemetry.kv_disk(tier, 3, 1, 100, at, at + 2.0)
    asked, granted = device.record(device.stream()), device.record(device.stream())
    asked.time_s, granted.time_s = 1.0, 2.0
    telemetry.kv_waited(asked, granted)
    path = tmp_path / "t.json"
    path.write_text(chrome_trace(reads + records_of(telemetry), {"decode": (0.0, 6.0)}))
    lanes = {lane.label: lane.spans for lane in read_trace(path).lanes}
    assert [span[2] for span in lanes["SSD reads"]] == ["SSD"] * 3
    for at, tier in enumerate(KV_TIERS):
        assert lanes[MOVED[tier]] == ((1e3 * at, 1e3 * at + 2e3, MOVED[tier]),)
    assert lanes["compute waits"] == ((1e3, 2e3, STALLED_KV),)
    assert "KV" not in lanes


def test_a_trace_of_before_events_said_what_they_are_of_is_shown_by_their_names(
    measured_files: tuple[Path, Path], tmp_path: Path
) -> None:
    trace = json.loads(measured_files[1].read_text(encoding="utf-8"))
    kv = {"name": "thread_name", "ph": "M", "tid": 6001, "args": {"name": "KV 2"}}
    moved = {"name": "L3.kv_read", "ph": "X", "tid": 6001, "ts": 1, "dur": 2, "args": {"kind": "kv_read"}}
    waited = {"name": "wait KV", "ph": "X", "tid": 4000, "ts": 1, "dur": 2, "args": {"kind": "kv_wait"}}
    trace["traceEvents"] += [kv, moved, waited]
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    new.write_text(json.dumps(trace))
    for event in trace["traceEvents"]:
        event["args"] = {"name": event["args"].get("name")}
    old.write_text(json.dumps(trace))
    assert read_trace(old) == read_trace(new)
    assert {"KV from its drive", "SSD reads", "CPU tier"} <= {lane.label for lane in read_trace(old).lanes}


def test_the_sums_show_kv_and_the_wait_for_it(measured: Mapping[str, Any], tmp_path: Path) -> None:
    moved = varied(measured, phases__decode__busy_ms__kv_h2d=2.0, phases__decode__stall_ms__kv=1.0)
    [only] = timelines_of(Side("a", (typed(moved),), stored(tmp_path / "a.json", moved)))
    lanes = {lane.label: lane.spans for lane in only.bars}
    [[start, end, kind]] = lanes["KV to GPU"]
    assert (end - start, kind) == (pytest.approx(2.0), "KV to GPU")
    assert STALLED_KV in {span[2] for span in lanes["compute"]}
    assert "KV from GPU" not in lanes


def test_without_a_trace_the_timeline_says_that_it_is_of_sums(measured: Mapping[str, Any], tmp_path: Path) -> None:
    [only] = timelines_of(Side("a", (typed(measured),), stored(tmp_path / "a.json", measured)))
    assert "not when" in only.note
    assert only.bars[0].spans[-1][1] == pytest.approx(measured["e2e_ms"], rel=1e-5)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"traceEvents": [{}]}',
        '{"traceEvents": [{"ph": "X", "tid": 0, "ts": 0, "dur": 1, "name": "x"}]}',
        '{"traceEvents": [' + NAMED + ', {"ph":"X","tid":0,"ts":0,"dur":-1,"name":"x"}]}',
        '{"traceEvents": [' + NAMED + ', {"ph":"X","tid":0,"ts":NaN,"dur":1,"name":"x"}]}',
    ],
)
def test_a_damaged_trace_is_one_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "t.trace.json"
    path.write_text(content)
    with pytest.raises(UnusableInput, match=r"no timeline of --trace|is damaged"):
        read_trace(path)


def test_a_long_trace_stays_a_small_page() -> None:
    draw = pytest.importorskip("bench.report.draw", reason="the plot extra is not installed")
    spans = tuple((place * 0.1, place * 0.1 + 0.09, "busy") for place in range(200_000))
    drawn = draw.svg(Bars("t", "t", "", "ms", (Bar("compute", spans),), (0.0, 20_000.0)))
    assert len(drawn) < 100_000
    assert "200000 times" in drawn


def test_a_trace_of_another_run_is_not_shown_as_this_ones(
    measured: Mapping[str, Any], measured_files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Run again without --trace, the old trace still lies there."""
    again = varied(measured, phases__decode__wall_ms=1.01 * measured["phases"]["decode"]["wall_ms"])
    shutil.copy(measured_files[1], tmp_path / "a.trace.json")
    [side] = read_sides([stored(tmp_path / "a.json", again)])
    [only] = timelines_of(side)
    assert only.note.startswith("a.trace.json is of another run. From the phases' sums")
