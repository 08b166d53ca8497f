"""The top of a report: which flags differ, and what is there twice."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.compare.sides import Side
from bench_infer import command_line as main
from tests.results import stored, typed, varied

pytest.importorskip("bench.report.draw", reason="the plot extra is not installed")
page = pytest.importorskip("bench.report.page").page


def test_the_first_table_names_the_flags_that_differ(measured: Mapping[str, Any], tmp_path: Path) -> None:
    sides = [
        Side(name, (typed(varied(measured, [100.0], config__resolved__temperature=at, mode=mode)),), tmp_path)
        for name, at, mode in (("a", 0.6, "mixed"), ("b", 0.0, "stream"))
    ]
    table = page(sides).partition("<table>")[2].partition("</table>")[0]
    assert "flags that differ" in table
    assert [cell in table for cell in ("--temperature 0.6<", "--temperature 0<", "--mode")] == [True, True, False]
    assert "flags that differ" not in page(sides[:1])


def test_the_points_of_a_sweep_need_no_flags_beside_their_names(swept: list[Side]) -> None:
    assert "flags that differ" not in page(swept)


def test_the_same_result_twice_is_told_on_the_page_and_the_terminal(
    measured: Mapping[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, out = str(stored(tmp_path / "r.json", measured)), tmp_path / "r.html"
    assert main(["report", one, one, "--out", str(out)]) == 0
    told = f"B: 1 of its results are those of {one}: a process on both sides compares nothing"
    assert f"[WARNING] {told}\n" in capsys.readouterr().out
    assert html.escape(told) in out.read_text(encoding="utf-8")


def test_a_page_whose_folder_is_missing_says_to_make_it(
    measured: Mapping[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = str(stored(tmp_path / "r.json", measured))
    assert main(["report", one, "--out", str(tmp_path / "none" / "r.html")]) == 2
    assert "its folder does not exist; make it first" in capsys.readouterr().err
