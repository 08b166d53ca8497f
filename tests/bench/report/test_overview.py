"""The top of a report: which flags differ, and what is there twice."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.compare.sides import Side
from bench_infer import command_line as main
from tests.bench.result.test_speculation import with_draft
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


def test_a_draft_has_its_tokens_a_pass_beside_the_time_of_one(measured: Mapping[str, Any], tmp_path: Path) -> None:
    drafted, plain = (Side(name, (typed(r),), tmp_path) for name, r in (("a", with_draft(measured)), ("b", measured)))
    table = page([drafted, plain]).partition("<table>")[2].partition("</table>")[0]
    assert 'tpot_ms</th><th class="figure">tokens a pass</th><th class="figure">decode_tok_s' in table
    assert '<td class="figure">4.25</td>' in table
    assert "tokens a pass</th>" not in page([plain])


def test_without_a_draft_what_it_would_take_by_default_is_not_told(measured: Mapping[str, Any], tmp_path: Path) -> None:
    auto = {"config__resolved__draft_depth": "auto", "config__resolved__draft_weight_format": "auto"}
    of_draft = {f"config__resolved__{name}": value for name, value in (("draft", "ngram"), ("draft_depth", 8))}
    results = varied(measured, **auto), with_draft(measured, **of_draft, config__resolved__draft_weight_format="w8")
    sides = [Side(name, (typed(result),), tmp_path) for name, result in zip("ab", results, strict=True)]
    table = page(sides).partition("<table>")[2].partition("</table>")[0]
    told = [flag in table for flag in ("--draft-depth auto", "--draft-weight-format auto", "--draft -")]
    assert told == [False, False, False]
    assert [flag in table for flag in ("--draft ngram", "--draft-depth 8", "--draft-weight-format w8")] == [True] * 3


@pytest.mark.parametrize(("budget", "said"), [(20.0, "with --gpu-mem-gb 20"), (None, "with all of its memory")])
def test_the_head_says_on_what_and_how_much_was_run(
    measured: Mapping[str, Any], tmp_path: Path, budget: float | None, said: str
) -> None:
    on_gpu = varied(measured, provenance__gpu="NVIDIA <A> card", config__resolved__gpu_mem_gb=budget)
    head = page([Side(name, (typed(on_gpu),), tmp_path) for name in "ab"]).partition("</header>")[0]
    assert head.count(f"NVIDIA &lt;A&gt; card {said}: 1 row, 8 prompt tokens and 6 new tokens") == 1
    on_cpu = page([Side("a", (typed(measured),), tmp_path)]).partition("</header>")[0]
    assert f"{html.escape(measured['provenance']['cpu'])}: 1 row, 8 prompt tokens" in on_cpu


def test_the_same_result_twice_is_told_on_the_page_and_the_terminal(
    measured: Mapping[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, out = str(stored(tmp_path / "r.json", measured)), tmp_path / "r.html"
    assert main(["report", one, one, "--out", str(out)]) == 0
    told = f"B: 1 of its results is that of {one}: a process on both sides compares nothing"
    assert f"[WARNING] {told}\n" in capsys.readouterr().out
    assert html.escape(told) in out.read_text(encoding="utf-8")


def test_a_page_whose_folder_is_missing_says_to_make_it(
    measured: Mapping[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = str(stored(tmp_path / "r.json", measured))
    assert main(["report", one, "--out", str(tmp_path / "none" / "r.html")]) == 2
    assert "its directory does not exist; make it first" in capsys.readouterr().err
