"""What is told of speculation: in the JSON, the summary, a comparison and a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.compare.compare import compare
from bench.compare.sides import Side
from bench.compare.text import as_text
from bench.result.results import plain
from bench.result.summary import row, summary
from bench.result.types_speculation import Speculation, SyntheticAgreement, acceptance_by_depth
from bench.run.speculation import agreement_warnings
from tests.results import typed, varied

PAIR = SyntheticAgreement(agree=0.8, second=0.1, realised_agree=0.803, realised_second=0.098)
FOUND = Speculation(
    draft="synthetic:Llama-3.2-1B:agree=0.8,second=0.1",
    nodes=24,
    depth=8,
    width=6,
    auto_depth=False,
    passes=60,
    tokens_a_pass=4.25,
    row_passes=[10, 20, 0, 30],
    weight_bytes_a_token=4.74e9,
    drafting_ms=12.5,
    drafting_hidden_pct=88.0,
    synthetic_agreement=PAIR,
)


def with_draft(measured: Mapping[str, Any], found: Speculation | None = FOUND, **changes: Any) -> dict[str, Any]:
    changes |= {"io_bw_MBps__weight_h2d_MBps": 55_400.0}
    return varied(measured, [100.0] * 5, speculation=found and msgspec.to_builtins(found), **changes)


def test_tokens_a_pass_bytes_a_token_and_the_link_stand_in_one_line(measured: Mapping[str, Any]) -> None:
    lines = summary(typed(with_draft(measured))).splitlines()
    assert "a token: 4.25 tokens a pass, 4.740 GB over a link of 55.4 GB/s" in map(str.strip, lines)
    said = " ".join(lines)
    assert "tree of 6 a level, depth 8, 24 nodes, drafting 12.500 ms a pass, 88 % of it while the link copied" in said
    assert "synthetic agreement: 0.803 and 0.098 (asked 0.8 and 0.1): no model's acceptance" in said


def test_a_chain_is_called_one_and_what_was_not_measured_is_left_out(measured: Mapping[str, Any]) -> None:
    bare = msgspec.structs.replace(
        FOUND, draft="ngram", width=1, drafting_ms=None, drafting_hidden_pct=None, synthetic_agreement=None
    )
    said = summary(typed(with_draft(measured, bare)))
    assert "speculation: ngram: chain, depth 8, 24 nodes\n" in said
    assert "drafting" not in said
    assert "agreement" not in said


def test_without_a_draft_nothing_is_said_of_one(measured: Mapping[str, Any]) -> None:
    assert measured["speculation"] is None
    assert "speculation" not in summary(typed(dict(measured)))
    earlier = {name: part for name, part in measured.items() if name != "speculation"}
    assert "speculation" not in summary(typed(earlier))


def test_acceptance_is_of_the_passes_that_came_so_deep() -> None:
    assert list(acceptance_by_depth(FOUND)) == pytest.approx([50 / 60, 30 / 50, 1.0])
    assert list(acceptance_by_depth(msgspec.structs.replace(FOUND, row_passes=[]))) == []


def test_the_json_keeps_it_and_a_row_has_tokens_a_pass(measured: Mapping[str, Any]) -> None:
    result = typed(with_draft(measured))
    assert result.speculation == FOUND
    assert plain(result)["speculation"]["row_passes"] == [10, 20, 0, 30]
    head, cells = (line.split(",") for line in row(result, "csv").splitlines())
    assert cells[head.index("tokens_a_pass")] == "4.25"


def test_equal_tokens_with_and_without_a_draft_are_the_same_work(measured: Mapping[str, Any], tmp_path: Path) -> None:
    passes = {"decode_forward_passes": 2, "config__resolved__verify_rows": 24, "config__resolved__draft": FOUND.draft}
    sides = [
        Side("none", (typed(varied(measured, [200.0, 201.0, 199.0, 200.5, 199.5])),), tmp_path),
        Side("drafted", (typed(with_draft(measured, **passes)),), tmp_path),
    ]
    comparison = compare(sides)
    assert [against.verdict for against in comparison.against] == ["faster"]
    assert comparison.figures["tokens a pass"] == [None, 4.25]
    text = as_text(comparison)
    assert "equal: all 2 sides generated the same tokens" in text
    assert f"draft: A -, B {FOUND.draft}" in text


def test_without_drafts_a_comparison_has_no_row_on_them(measured: Mapping[str, Any], tmp_path: Path) -> None:
    sides = [Side(name, (typed(dict(measured)),), tmp_path) for name in "ab"]
    assert "tokens a pass" not in compare(sides).figures


def test_the_page_of_a_report_tells_it(measured: Mapping[str, Any], tmp_path: Path) -> None:
    page = pytest.importorskip("bench.report.page").page
    text = page([Side("drafted", (typed(with_draft(measured)),), tmp_path)])
    assert "a token: 4.25 tokens a pass, 4.740 GB over a link of 55.4 GB/s" in text
    assert "2: 20 (33.3 %)" in text


@pytest.mark.parametrize(
    ("pair", "tokens", "said"),
    [
        (PAIR, 256, []),
        (msgspec.structs.replace(PAIR, realised_second=0.131), 256, ["second=0.1 was asked for"]),
        (msgspec.structs.replace(PAIR, realised_agree=0.76), 256, ["agree=0.8 was asked for"]),
        (msgspec.structs.replace(PAIR, realised_agree=0.5), 64, ["64 new tokens cannot show an agreement"]),
    ],
)
def test_a_pair_is_marked_and_an_agreement_that_was_missed_is_told(
    pair: SyntheticAgreement, tokens: int, said: list[str]
) -> None:
    marked, *lines = agreement_warnings(msgspec.structs.replace(FOUND, synthetic_agreement=pair), tokens)
    assert "no figure here is a model's acceptance" in marked
    assert [expected in line for expected, line in zip(said, lines, strict=True)] == [True] * len(said)


def test_a_model_s_own_acceptance_is_not_marked() -> None:
    assert not list(agreement_warnings(None, 256))
    assert not list(agreement_warnings(msgspec.structs.replace(FOUND, synthetic_agreement=None), 256))


def test_a_comparison_shows_the_rows_that_a_draft_ran_where_the_flag_left_them_open(
    measured: Mapping[str, Any],
) -> None:
    results = measured, with_draft(measured, config__resolved__verify_rows=24), with_draft(measured)
    sides = [Side(name, (typed(result),), Path(name)) for name, result in zip("abc", results, strict=True)]
    assert compare(sides).settings["verify_rows"] == [1, 24, 24]
    assert "verify_rows" not in compare(sides[1:]).settings
