"""Where outputs part, and whether it is a near tie there."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.compare.compare import compare
from bench.compare.difference import Difference, first_difference
from bench.compare.sides import Side
from bench.compare.text import as_csv, as_markdown, as_text
from bench.report.page import page
from bench.result.results import read_result
from bench.result.types import Result
from bench.run import record
from bench_infer import command_line
from tests.results import typed, varied
from wsm.errors import UnusableInput

ROWS = {"batch_size": 2, "prompt_lens": [8, 5], "output__tokens": [[4, 5, 6], [7, 8, 9]]}
PARTED = {**ROWS, "output__tokens": [[4, 5, 6], [7, 3, 9]], "output__sha256": "b" * 64}
MARGINS = {"output__margins": [[9.0, 8.0, 7.0], [5.0, 0.125, 4.0]]}


@pytest.fixture
def result(measured: Mapping[str, Any]) -> Callable[..., Result]:
    return lambda **changes: typed(varied(measured, [100.0], **changes))


def test_the_first_token_that_differs_is_found_with_its_place_and_margin(result: Callable[..., Result]) -> None:
    found = first_difference(result(**ROWS), result(**PARTED, **MARGINS))
    assert found == Difference(row=1, token=2, position=6, tokens=(8, 3), margins=(None, 0.125))


def test_a_row_that_was_to_be_shorter_does_not_part_at_its_end(result: Callable[..., Result]) -> None:
    shorter = {**PARTED, "output__margins": [[9.0, 8.0], [5.0, 5.0]]}
    base = result(**ROWS, output__margins=[[1.0, 2.0, 3.0]] * 2)
    assert first_difference(base, result(**{**shorter, "output__tokens": [[4, 5], [7, 8]]})) is None
    found = first_difference(base, result(**{**shorter, "output__tokens": [[4, 5], [7, 3]]}))
    assert found == Difference(row=1, token=2, position=6, tokens=(8, 3), margins=(2.0, 5.0))


@pytest.mark.parametrize(
    "side",
    [
        ROWS,
        {**PARTED, "output__tokens": None},
        {**PARTED, "prompt_lens": [8, 6]},
        {**PARTED, "provenance__model_digest": "c" * 64},
    ],
    ids=["equal", "no tokens kept", "other prompts", "another model"],
)
def test_no_difference_is_told_where_none_is_known(side: dict[str, Any], result: Callable[..., Result]) -> None:
    assert first_difference(result(**ROWS), result(**side)) is None


def test_a_file_of_before_tokens_were_kept_has_no_known_difference(
    measured: Mapping[str, Any], result: Callable[..., Result]
) -> None:
    older = varied(measured, [100.0], **PARTED)
    for key in ("tokens", "margins"):
        del older["output"][key]
    assert first_difference(result(**ROWS), typed(older)) is None


def test_every_form_says_where_outputs_part(result: Callable[..., Result], tmp_path: Path) -> None:
    sides = [
        Side(name, (result(**changes),), tmp_path / name)
        for name, changes in (("plain", ROWS), ("drafted", {**PARTED, **MARGINS}), ("bare", PARTED))
    ]
    comparison = compare(sides)
    where = "parts from A in row 1 at new token 2 (position 6): token 3 against token 8; "
    for form in (as_text(comparison), as_markdown(comparison), page(sides)):
        assert f"B {where}the largest logit is above the next there by 0.125 in B" in form
        assert f"C {where}no margin was kept" in form
    rows = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    told = [[row[f"differs {name}"] for name in ("row", "token", "margin base", "margin side")] for row in rows]
    assert told == [["", "", "", ""], ["1", "2", "", "0.125"], ["1", "2", "", ""]]
    assert "differs" not in as_csv(compare([sides[0], sides[0]]))


def test_a_file_whose_margins_are_not_those_of_its_tokens_is_refused(result: Callable[..., Result]) -> None:
    with pytest.raises(UnusableInput, match="margins and tokens are not as many"):
        result(**ROWS, output__margins=[[1.0]])


def test_a_run_keeps_the_tokens_that_its_digest_is_of(measured: Mapping[str, Any]) -> None:
    output = measured["output"]
    assert hashlib.sha256(json.dumps(output["tokens"]).encode()).hexdigest() == output["sha256"]
    assert output["margins"] is None


def test_a_run_with_nodes_keeps_margins_unless_its_tokens_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--device", "cpu", "--mode", "full", "--prompt-len", "8", "--max-new-tokens", "3", "--verify-rows", "2"]
    argv += ["--temperature", "0", "--no-probe", "--cache-dir", str(tmp_path), "--out-json", str(tmp_path / "r.json")]
    found = []
    for most in (3, 2):
        monkeypatch.setattr(record, "MOST_TOKENS", most)
        assert command_line(argv) == 0
        found.append(read_result(tmp_path / "r.json").output)
    kept, dropped = found
    assert kept.tokens
    assert kept.margins
    assert [len(row) for row in kept.margins] == [3]
    assert (dropped.tokens, dropped.margins) == (None, None)
    assert dropped.sha256 == kept.sha256
