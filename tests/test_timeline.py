"""Timelines: from a trace beside a result, or from its phases' sums."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.sides import Side, read_sides
from bench.svg import draw
from bench.timeline import Lane, Timeline, read_trace, timelines_of
from llama.config import UnusableInput
from tests.results import stored


def test_a_trace_beside_the_result_gives_the_run_and_one_pass(measured_files: tuple[Path, Path]) -> None:
    [side] = read_sides([measured_files[0]])
    assert side.typical is not None
    run, one_pass = timelines_of(side)
    assert run.window[1] == pytest.approx(side.typical["e2e_ms"], rel=0.01)
    [computed] = (lane.spans for lane in one_pass.lanes if lane.name == "compute")
    start, end = one_pass.window
    assert len([span for span in computed if start <= span[0] < end]) == 2 * 48  # the built-in model's groups
    lanes = {lane.name: lane.spans for lane in run.lanes}
    busy_ms = sum(end - start for start, end, _ in lanes["compute"])
    told = side.typical["phases"]
    assert busy_ms == pytest.approx(
        told["prefill"]["busy_ms"]["compute"] + told["decode"]["busy_ms"]["compute"], rel=0.02
    )


def test_without_a_trace_the_timeline_says_that_it_is_of_sums(measured: Mapping[str, Any], tmp_path: Path) -> None:
    [only] = timelines_of(Side("a", (dict(measured),), stored(tmp_path / "a.json", measured)))
    assert "not when" in only.note
    assert only.window[1] == pytest.approx(measured["e2e_ms"], rel=1e-5)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"traceEvents": [{}]}',
        '{"traceEvents": [{"ph": "X", "tid": 0, "ts": 0, "dur": 1, "name": "x"}]}',
        '{"traceEvents": [{"ph":"M","tid":0,"args":{"name":"x"}},{"ph":"X","tid":0,"ts":0,"dur":-1,"name":"x"}]}',
        '{"traceEvents": [{"ph":"M","tid":0,"args":{"name":"x"}},{"ph":"X","tid":0,"ts":NaN,"dur":1,"name":"x"}]}',
    ],
)
def test_a_damaged_trace_is_one_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "t.trace.json"
    path.write_text(content)
    with pytest.raises(UnusableInput, match="no timeline of --trace"):
        read_trace(path)


def test_a_long_trace_stays_a_small_page() -> None:
    spans = tuple((place * 0.1, place * 0.1 + 0.09, "busy") for place in range(200_000))
    drawn = draw(Timeline("t", "t", "", (0.0, 20_000.0), (Lane("compute", spans),)))
    assert len(drawn) < 100_000
    assert "200000 times" in drawn
