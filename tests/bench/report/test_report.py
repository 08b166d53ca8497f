"""The page of a report: complete, self-contained, safe with what a file may hold; and its plots."""

from __future__ import annotations

import builtins
import html
import json
import re
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench.compare.sides import Side
from bench.options.program import called
from bench.report.charts import MOVED, STALLED_KV, Bar, Curves, overview_charts, side_charts, sweep_charts
from bench.result.sweep_folder import Failure
from bench_infer import command_line as main
from tests.results import stored, typed, varied
from wsm.engine.records import KV_TIERS

draw = pytest.importorskip("bench.report.draw", reason="the plot extra is not installed")
page = pytest.importorskip("bench.report.page").page

# -- the page


class Reader(HTMLParser):
    """Every tag has its end; what a browser would fetch or run is noted."""

    VOID = frozenset({"meta", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.active: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href", "data", "action")]
        self.fetched += [str(value) for name, value in attrs if name == "xlink:href" and not str(value).startswith("#")]
        self.active += [f"{tag} {name}" for name, _ in attrs if name.startswith("on")] + [tag] * (tag == "script")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_is_well_formed_fetches_nothing_and_runs_nothing(swept: list[Side]) -> None:
    text = page(swept)
    reader = read(text)
    assert set(reader.fetched) == {"data:,"}
    assert reader.active == []
    assert not re.search(r"url\(|@import|https?:", text)


def test_the_page_shows_every_side_every_setting_and_every_warning(swept: list[Side]) -> None:
    text = html.unescape(page(swept))
    result = swept[0].results[0]
    for side in swept:
        assert f": {side.name}</h2>" in text
    for name, value in result.config.resolved.items():
        if name not in ("out_json", "trace", "quiet"):
            assert f'<td class="value">{name}</td><td class="value">{"-" if value is None else value}</td>' in text
    for warning in result.warnings:
        assert f"<li>{warning}</li>" in text
    assert "A process failed with exit 3: it does not <fit>" in text


HOSTILE = """</title></style></svg><script>alert(1)</script><img src=x onerror=alert(2)>"'&"""


WORDS = {"mixed", "ssd", "h2d", "d2h", "hbm", "compute", "MBps", "TFLOPs", "auto", "first", "always"}
"""What the shape of a result allows in its place and nothing else."""


def test_nothing_in_a_file_becomes_markup(measured: Mapping[str, Any], tmp_path: Path) -> None:
    """Every text of a result, its trace and its name, made hostile."""

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poisoned(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [poisoned(inner) for inner in value]
        return HOSTILE + value if isinstance(value, str) and value not in WORDS else value

    result = poisoned(json.loads(json.dumps(dict(measured))))
    result["config"]["resolved"][HOSTILE] = HOSTILE
    result["output"]["sha256"] = measured["output"]["sha256"]
    result["phases"]["decode"]["busy_ms"][HOSTILE] = 5.0
    result["phases"]["decode"]["bytes_moved"][HOSTILE] = 5
    other = varied(result, config__resolved__temperature=HOSTILE)
    sides = [
        Side(HOSTILE, (typed(result),), tmp_path, (Failure(1, HOSTILE),), {"--seed": "1", HOSTILE: HOSTILE}),
        Side("b", (typed(other),), tmp_path, (), {"--seed": "2", HOSTILE: "x"}),
    ]
    text = page(sides)
    reader = read(text)
    assert reader.active == []
    assert set(reader.fetched) == {"data:,"}
    assert "<script" not in text
    assert "<img" not in text
    assert html.escape(HOSTILE) in text


def test_a_single_result_needs_no_comparison(measured: Mapping[str, Any], tmp_path: Path) -> None:
    text = page([Side("alone", (typed(measured),), tmp_path)])
    assert "Verdicts" not in text
    assert "A: alone" in text


# -- what is drawn


def parts(bar: Bar) -> dict[str, float]:
    """How long each kind is."""
    return {kind: end - start for start, end, kind in bar.spans}


def test_times_and_rooflines_are_the_results_figures(swept: list[Side]) -> None:
    times, rooflines = overview_charts(swept)
    assert times.bars[0].after == "400 ms [392, 416]"
    assert times.bars[5].after == "no result"
    decode = swept[0].results[0].phases.decode
    bar = rooflines.bars[1]
    assert parts(bar)["floor"] == pytest.approx(min(100, decode.roofline_pct))
    assert sum(parts(bar).values()) == pytest.approx(100)


def test_a_floor_that_was_beaten_is_told_and_not_drawn(measured: Mapping[str, Any], tmp_path: Path) -> None:
    """In an old result too, which has the share of a floor that was none."""
    floor_ms = 2.5 * measured["phases"]["decode"]["wall_ms"]
    changes = {"floor_ms": floor_ms, "roofline_pct": 250.0, "bound_by": "ssd"}
    beaten = typed(varied(measured, **{f"phases__decode__{name}": value for name, value in changes.items()}))
    bar = list(overview_charts([Side("a", (beaten,), tmp_path)]))[1].bars[1]
    assert bar.spans == ()
    assert bar.after == "faster than the floor: ceiling of ssd too low"


def test_a_side_shows_each_tiers_time_and_bytes(measured: Mapping[str, Any], tmp_path: Path) -> None:
    tiers, moved = side_charts(Side("a", (typed(measured),), tmp_path))
    decode = measured["phases"]["decode"]
    compute = next(bar for bar in tiers.bars if bar.label == "decode, compute")
    assert sum(parts(compute).values()) == pytest.approx(decode["wall_ms"], rel=0.01)
    [read_MB] = next(parts(bar).values() for bar in moved.bars if bar.label == "decode, SSD to CPU")
    assert read_MB == pytest.approx(decode["bytes_moved"]["ssd_read"] / 1e6)


def test_a_sweep_gives_a_curve_for_every_combination_of_the_other_flags(swept: list[Side]) -> None:
    times, rates = sweep_charts(swept)
    assert isinstance(times, Curves)
    assert isinstance(rates, Curves)
    assert (times.x_name, times.unit) == ("--prefetch-distance", "ms")
    assert {name: [(x, y) for x, y, _ in points] for name, points in times.curves.items()} == {
        "mode mixed": [(4, 400), (6, 600), (8, 800)],
        "mode stream": [(4, pytest.approx(320)), (6, pytest.approx(480))],
    }
    assert times.curves["mode mixed"][0][2] == [392.0, 416.0]


def test_what_moves_and_what_waits_has_a_colour_of_its_own() -> None:
    assert set(MOVED) == {"ssd_read", "weight_h2d", *KV_TIERS}
    for kind in (*MOVED.values(), "busy", "stalled", STALLED_KV, "idle", "SSD", "in CPU memory", "link"):
        assert kind in draw.COLOURS


def test_a_side_shows_the_wait_for_kv_and_its_ways(measured: Mapping[str, Any], tmp_path: Path) -> None:
    waited = varied(
        measured,
        phases__decode__stall_ms__kv=1.5,
        phases__decode__busy_ms__kv_read=2.5,
        phases__decode__bytes_moved__kv_read=3_000_000,
    )
    tiers, moved = side_charts(Side("a", (typed(waited),), tmp_path))
    found = {bar.label: parts(bar) for bar in (*tiers.bars, *moved.bars)}
    assert found["decode, compute"][STALLED_KV] == pytest.approx(1.5)
    assert [*found["decode, KV from its drive"].values()] == [3.0]
    assert STALLED_KV not in found["prefill, compute"]


def test_the_same_results_are_the_same_page(swept: list[Side]) -> None:
    assert page(swept) == page(swept)


def test_what_is_under_the_pointer_says_what_it_is_and_long_labels_are_whole_there(
    measured: Mapping[str, Any], tmp_path: Path
) -> None:
    name = "a name that is longer than the room beside its bar"
    text = page([Side(name, (typed(varied(measured, [100.0])),), tmp_path)])
    assert f"<title>{name}</title>" in text
    assert f"<title>{name}: prefill, {measured['repeats']['raw'][0]['prefill_ms']:.4g} ms</title>" in text


# -- the verb


def test_the_verb_writes_the_page_and_a_plot_for_every_chart(
    measured_files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plots = tmp_path / "r.html", tmp_path / "plots"
    assert main(["report", str(measured_files[0]), "--out", str(out), "--png", str(plots)]) == 0
    assert "<!doctype html>" in out.read_text(encoding="utf-8")
    written = sorted(plots.iterdir())
    assert len(written) == out.read_text(encoding="utf-8").count("<figure>") > 4
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_curves_become_a_plot_too(swept: list[Side], tmp_path: Path) -> None:
    for number, chart in enumerate(sweep_charts(swept)):
        assert draw.write_png(chart, tmp_path, number).stat().st_size > 5000


@pytest.mark.parametrize("more", [[], ["--png", "p"]])
def test_without_matplotlib_it_is_exit_2_and_names_the_extra(
    measured_files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
) -> None:
    import_module = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return import_module(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for module in ("draw", "page"):
        monkeypatch.delitem(sys.modules, f"bench.report.{module}")
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(measured_files[0]), "--out", "r.html", *more]) == 2
    err = capsys.readouterr().err
    assert err == f"bench_infer.py: report needs matplotlib: {called()[0]} -m pip install matplotlib\n"
    assert list(tmp_path.iterdir()) == []


def test_the_page_never_replaces_a_result(measured: Mapping[str, Any], tmp_path: Path) -> None:
    path = stored(tmp_path / "r.json", measured)
    before = path.read_bytes()
    for out in (path, tmp_path, tmp_path / "none" / "r.html"):
        assert main(["report", str(path), "--out", str(out)]) == 2
    assert path.read_bytes() == before


@pytest.mark.parametrize("out", ["p01-mode=mixed/r1.json", "sweep.json", "results.jsonl", "link.html", "new.json"])
def test_the_page_never_replaces_what_lies_in_a_folder_it_reads(
    measured: Mapping[str, Any], tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sw"
    stored(sweep / "p01-mode=mixed" / "r1.json", measured)
    point = {"number": 1, "values": {"--mode": "mixed"}}
    stored(sweep / "sweep.json", {"format": "bench_infer sweep", "version": 1, "points": [point]})
    (sweep / "results.jsonl").touch()
    (sweep / "link.html").symlink_to(sweep / "p01-mode=mixed" / "r1.json")
    before = {path: path.read_bytes() for path in sweep.rglob("*.*") if path.is_file()}
    assert main(["report", str(sweep), "--out", str(sweep / out)]) == 2
    assert "--out" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in sweep.rglob("*.*") if path.is_file()} == before
    assert main(["report", str(sweep), "--out", str(sweep / "page.html")]) == 0


def test_the_page_replaces_a_page_and_no_other_file(
    measured_files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "README"
    out.write_text("precious")
    command = ["report", str(measured_files[0]), "--out", str(out)]
    assert main(command) == 2
    assert "holds no page that can be read" in capsys.readouterr().err
    assert out.read_text() == "precious"
    out.write_text("")
    assert [main(command), main(command)] == [0, 0]


@pytest.mark.parametrize("png", ["taken", "taken/plots", "r.html"])
def test_plots_that_find_no_folder_are_refused_before_the_page_is_written(
    measured_files: tuple[Path, Path], tmp_path: Path, png: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("precious")
    out = tmp_path / "r.html"
    assert main(["report", str(measured_files[0]), "--out", str(out), "--png", str(tmp_path / png)]) == 2
    assert "--png" in capsys.readouterr().err
    assert not out.exists()


def test_a_floor_without_a_distance_is_told_and_not_drawn(measured: Mapping[str, Any], tmp_path: Path) -> None:
    """Of a phase that took no time: floor_ms is there and roofline_pct null."""
    side = Side(
        "a", (typed(varied(measured, phases__decode__floor_ms=1.0, phases__decode__roofline_pct=None)),), tmp_path
    )
    bar = list(overview_charts([side]))[1].bars[1]
    assert bar.spans == ()
    assert "<svg" in page([side])


@pytest.mark.parametrize("odd", ["nan", "inf", "-inf"])
def test_a_swept_value_that_is_not_finite_is_no_place_on_an_axis(
    measured: Mapping[str, Any], tmp_path: Path, odd: str
) -> None:
    sides = [Side(text, (typed(measured),), tmp_path, (), {"--x": text}) for text in ("1", odd, "2")]
    assert list(sweep_charts(sides)) == []
