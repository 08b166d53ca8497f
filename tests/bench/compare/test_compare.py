"""Compare: the one test, what differs by name, and what forbids comparing."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.compare.compare import Comparison, are_equal, compare, outputs_of, regressions
from bench.compare.sides import Side, read_sides
from bench.compare.text import as_csv, as_markdown, as_text, letters
from bench.compare.verdict import FEWEST
from bench.result.sweep_folder import Failure
from bench.result.types import METRICS
from bench_infer import command_line as main
from tests.results import stored, typed, varied
from wsm.errors import UnusableInput

BASE, SLOWER = [100, 101, 99, 100.5, 99.5], [110, 111, 109, 110.5, 109.5]


@pytest.fixture
def side(measured: Mapping[str, Any], tmp_path: Path) -> Callable[..., Side]:
    def side(name: str, rounds_ms: list[float], **changes: Any) -> Side:
        return Side(name, (typed(varied(measured, rounds_ms, **changes)),), tmp_path / name)

    return side


# -- verdicts


@pytest.mark.parametrize(
    ("samples", "verdict"),
    [(SLOWER, "slower"), ([s / 1.1 for s in BASE], "faster"), (BASE, "no difference shown"), ([50.0], "no verdict")],
)
def test_the_verdict_is_of_the_side_against_the_first(
    side: Callable[..., Side], samples: list[float], verdict: str
) -> None:
    comparison = compare([side("a", BASE), side("b", samples)])
    assert [against.verdict for against in comparison.against] == [verdict]
    assert f"B: {verdict}: " in as_text(comparison)


def test_with_too_few_rounds_it_is_said_how_many_are_needed(side: Callable[..., Side]) -> None:
    text = as_text(compare([side("a", BASE), side("b", SLOWER[:4])]))
    assert "B: no verdict: n is 5 and 4, and a verdict needs 5 a side" in text
    assert "slower" not in text


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("config__resolved__model", "Llama-3.1-8B", "model: builtin-v1 against Llama-3.1-8B"),
        ("provenance__model_digest", "beef", "model digest"),
        ("batch_size", 4, "batch_size: 1 against 4"),
        ("prompt_lens", [9], "prompt tokens: [8] against [9]"),
        ("decode_tokens_total", 5, "new tokens: 6 against 5"),
        ("provenance__gpu", "a GPU", "compute device"),
        ("output__sha256", "0" * 64, "unequal outputs"),
    ],
)
def test_what_forbids_comparing_is_named_and_there_is_no_verdict(
    side: Callable[..., Side], path: str, value: object, said: str
) -> None:
    comparison = compare([side("a", BASE), side("b", SLOWER, **{path: value})])
    [against] = comparison.against
    assert (against.verdict, against.ratio) == ("not comparable", None)
    assert said in " ".join(against.obstacles)
    assert f"not comparable: {against.obstacles[0]}" in as_text(comparison)
    assert "give both" not in against.why
    for text in (as_text(comparison), as_markdown(comparison)):
        table, _, _ = text.lower().partition("where the time went")
        assert table.endswith(f"\n\nb is not comparable with a: {against.why.lower()}\n\n")


@pytest.mark.parametrize(
    ("figure", "values", "setting", "flag"),
    [
        ("decode_tokens_total", (6, 12), "max_new_tokens", "-n"),
        ("prompt_lens", ([8], [9]), "prompt_len", "-p"),
        ("batch_size", (1, 2), "batch_size", "-b"),
    ],
)
def test_where_one_flag_made_the_work_different_it_is_named(
    side: Callable[..., Side], figure: str, values: tuple[Any, Any], setting: str, flag: str
) -> None:
    sides = [
        side(name, BASE, **{figure: value, f"config__resolved__{setting}": at})
        for at, (name, value) in enumerate(zip("ab", values, strict=True), 1)
    ]
    [against] = compare(sides).against
    [obstacle] = against.obstacles
    assert obstacle.endswith(f": {values[0]} against {values[1]}: give both the same {flag}")


def test_other_tokens_explain_another_output(side: Callable[..., Side]) -> None:
    [against] = compare([side("a", BASE), side("b", BASE, prompt_lens=[9], output__sha256="0" * 64)]).against
    assert against.obstacles == (
        "prompt tokens: [8] against [9]: the prompts are not the same: run both with the same ones",
    )


def test_another_way_to_draw_tokens_is_named_only_where_tokens_were_drawn(
    side: Callable[..., Side], measured: Mapping[str, Any]
) -> None:
    assert measured["output"]["sampler"] == 2
    older = {"output__sampler": 1, "output__sha256": "0" * 64}
    for temperature, said in ((0.0, "unequal outputs"), (0.8, "sampler: 2 against 1")):
        drawn = {"config__resolved__temperature": temperature}
        [against] = compare([side("a", BASE, **drawn), side("b", BASE, **drawn, **older)]).against
        assert len(against.obstacles) == 1
        assert said in against.obstacles[0]


def test_outputs_that_differ_within_a_side_forbid_comparing(measured: Mapping[str, Any], tmp_path: Path) -> None:
    two = typed(varied(measured, BASE)), typed(varied(measured, BASE, output__sha256="0" * 64))
    [against] = compare([Side("a", two, tmp_path), Side("b", two, tmp_path)]).against
    assert "a gave 2 different outputs from the same settings" in against.obstacles


def test_a_point_that_failed_is_told_with_its_reason(side: Callable[..., Side], tmp_path: Path) -> None:
    failed = Side("b", (), tmp_path, (Failure(3, "the run does not fit"),))
    comparison = compare([side("a", BASE), failed, side("c", BASE)])
    assert [against.verdict for against in comparison.against] == ["not comparable", "no difference shown"]
    for text in (as_text(comparison), as_markdown(comparison)):
        assert "b gave no result (exit 3: the run does not fit)" in text


def test_one_side_is_nothing_to_compare(side: Callable[..., Side]) -> None:
    with pytest.raises(UnusableInput, match="two sides or more"):
        compare([side("a", BASE)])


# -- differences


def test_every_setting_and_provenance_field_that_differs_is_named_and_no_other(side: Callable[..., Side]) -> None:
    changes = {
        "config__resolved__gpu_cached_layers": 7,
        "config__resolved__out_json": "other.json",
        "config__environment__WSM_CPU_EVICT": "fifo",
        "provenance__git_commit": "abc",
        "provenance__drive": {"device": "nvme0n1", "model": "fast", "rotational": False, "filesystem": "xfs"},
        "provenance__utc": "2030-01-01T00:00:00+00:00",
    }
    comparison = compare([side("a", BASE, provenance__drive=None), side("b", BASE, **changes)])
    assert set(comparison.settings) == {"gpu_cached_layers", "WSM_CPU_EVICT"}
    drive = {"drive.device", "drive.model", "drive.rotational", "drive.filesystem"}
    assert set(comparison.provenance) - {"drive"} == drive | {"git_commit"}
    assert "  gpu_cached_layers: A 4, B 7" in as_text(comparison).splitlines()
    assert "  drive.model: A -, B fast" in as_text(comparison).splitlines()


def test_each_warning_is_told_once_with_its_sides(side: Callable[..., Side]) -> None:
    one = side("a", BASE, warnings=["hot", "narrow"])
    lines = as_text(compare([one, side("b", BASE, warnings=["hot"])])).splitlines()
    assert "  A, B: hot" in lines
    assert "  A: narrow" in lines


# -- as text, Markdown and CSV


def many(side: Callable[..., Side]) -> Comparison:
    return compare([side("a", BASE), *(side(f"s{n}", SLOWER) for n in range(6))])


def test_the_text_shows_every_fixed_metric_of_every_side_beside_the_base(side: Callable[..., Side]) -> None:
    text = as_text(many(side))
    for metric in METRICS:
        assert text.count(f"median {metric} ") == 2  # six sides are two blocks, each with the base
    assert text.count("decode ssd busy_ms") == 2
    assert "99 % interval" in text
    heads = [
        line.split() for line in text.splitlines() if line.startswith("    ") and set(line.split()) <= set("ABCDEFG")
    ]
    assert heads[0] == ["A", "B", "C", "D", "E"]
    assert heads[2] == ["A", "F", "G"]


def test_the_markdown_tables_have_as_many_cells_in_every_line(side: Callable[..., Side]) -> None:
    text = as_markdown(compare([side("a|b", BASE), side("c", SLOWER)]))
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert len(tables) == 2
    for lines in tables:
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_the_csv_has_a_line_each_side_and_bare_numbers(side: Callable[..., Side]) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(many(side)))))
    assert [row["side"] for row in rows] == ["a", "s0", "s1", "s2", "s3", "s4", "s5"]
    assert (rows[0]["verdict"], rows[1]["verdict"]) == ("base", "slower")
    assert float(rows[1]["ratio"]) == pytest.approx(1.1, rel=1e-3)
    assert float(rows[1]["ratio_low99"]) < 1.1 < float(rows[1]["ratio_high99"])
    assert float(rows[1]["median e2e_ms"]) == 110


def test_columns_are_lettered_beyond_z() -> None:
    assert [letters(place) for place in (0, 25, 26, 51, 52, 701, 702)] == ["A", "Z", "AA", "AZ", "BA", "ZZ", "AAA"]


# -- the verb


@pytest.fixture
def two_files(measured: Mapping[str, Any], tmp_path: Path) -> tuple[str, str]:
    paths = [stored(tmp_path / f"{name}.json", varied(measured, s)) for name, s in (("a", BASE), ("b", SLOWER))]
    return str(paths[0]), str(paths[1])


@pytest.mark.parametrize(("threshold", "code"), [("3", 1), ("12", 0), ("0", 1)])
def test_a_regression_beyond_the_threshold_is_exit_1(
    two_files: tuple[str, str], threshold: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *two_files, "--threshold", threshold]) == code
    err = capsys.readouterr().err
    assert ("slower than a by 10.0 %" in err) == (code == 1)
    assert main(["compare", *reversed(two_files), "--threshold", threshold]) == 0


def test_a_threshold_that_cannot_be_judged_is_no_silent_success(
    measured: Mapping[str, Any], two_files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = str(stored(tmp_path / "few.json", varied(measured, BASE[:3])))
    assert main(["compare", two_files[0], few, "--threshold", "3"]) == 2
    assert "cannot be judged for few: n is 5 and 3" in capsys.readouterr().err


def test_a_difference_that_is_not_shown_is_no_regression(side: Callable[..., Side]) -> None:
    noisy = compare([side("a", [80, 100, 120, 90, 110]), side("b", [90, 115, 130, 100, 118])])
    assert list(regressions(noisy, 3)) == []


@pytest.mark.parametrize(
    ("base", "samples", "threshold", "told"),
    [
        ([80, 100, 120, 90, 110], [90, 115, 130, 100, 118], "3", True),  # no difference shown: it may be slower
        (BASE, [102, 103, 108, 109, 104], "8", True),  # slower, by less than the threshold, or by more
        (BASE, BASE[::-1], "3", False),
        (BASE, SLOWER, "12", False),
        (BASE, SLOWER, "3", False),  # that is a regression, which is said itself
    ],
)
def test_a_threshold_that_the_interval_does_not_decide_is_told(
    measured: Mapping[str, Any],
    tmp_path: Path,
    base: list[float],
    samples: list[float],
    threshold: str,
    told: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = [str(stored(tmp_path / f"{n}.json", varied(measured, s))) for n, s in (("a", base), ("b", samples))]
    code = main(["compare", *paths, "--threshold", threshold])
    assert ("is undecided for b" in capsys.readouterr().err) == told
    assert code == (1 if (samples, threshold) == (SLOWER, "3") else 0)


# -- copies


def test_five_copies_of_a_result_are_one_sample_and_get_no_verdict(measured: Mapping[str, Any], tmp_path: Path) -> None:
    for place in range(5):
        stored(tmp_path / "base" / f"r{place}.json", varied(measured, [BASE[place]]))
        stored(tmp_path / "copies" / f"r{place}.json", varied(measured, [50.0]))
    comparison = compare(read_sides([tmp_path / "base", tmp_path / "copies"]))
    [against] = comparison.against
    assert against.verdict == "no verdict"
    assert against.why.startswith("n is 5 and 1,")
    text = as_text(comparison)
    assert "  B: 4 of its results are copies of another one: each process counts once" in text.splitlines()


def test_a_line_twice_in_a_file_of_lines_counts_once(measured: Mapping[str, Any], tmp_path: Path) -> None:
    lines = [json.dumps(varied(measured, [n])) + "\n" for n in BASE]
    (tmp_path / "all.jsonl").write_text("".join(lines + lines[:2]))
    [side] = read_sides([tmp_path / "all.jsonl"])
    assert (side.samples("e2e_ms"), side.copies) == (BASE, 2)


def test_a_process_on_two_sides_is_told_though_none_of_them_is_the_base(
    measured: Mapping[str, Any], tmp_path: Path
) -> None:
    paths = [
        stored(tmp_path / f"{n}.json", varied(measured, s)) for n, s in (("a", BASE), ("b", SLOWER), ("c", SLOWER))
    ]
    told = as_text(compare(read_sides(paths)))
    assert "  C: 1 of its results is that of b: a process on both sides compares nothing" in told.splitlines()


def test_a_process_on_both_sides_is_told(measured: Mapping[str, Any], tmp_path: Path) -> None:
    one = stored(tmp_path / "a.json", varied(measured, BASE))
    two = stored(tmp_path / "b.json", varied(measured, BASE))
    text = as_text(compare(read_sides([one, two])))
    assert "  B: 1 of its results is that of a: a process on both sides compares nothing" in text.splitlines()


@pytest.mark.parametrize("output", ["text", "md", "csv"])
def test_the_verb_prints_each_form(two_files: tuple[str, str], output: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *two_files, "-o", output]) == 0
    made = {"text": as_text, "md": as_markdown, "csv": as_csv}[output]
    assert capsys.readouterr().out == made(compare(read_sides([Path(path) for path in two_files]))) + "\n"


# -- what a side mixes


@pytest.mark.parametrize(
    "changes", [{"provenance__gpu": "another GPU"}, {"provenance__gpu": None, "provenance__cpu": "another CPU"}]
)
def test_a_side_of_several_devices_gets_no_verdict(
    measured: Mapping[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    one = typed(varied(measured, BASE))
    mixed = Side("b", (one, one, typed(varied(measured, BASE, **changes))), tmp_path)
    for sides in ([Side("a", (one,), tmp_path), mixed], [mixed, Side("a", (one,), tmp_path)]):
        [against] = compare(sides).against
        assert against.verdict == "not comparable"
        assert any(told.startswith("b mixes compute devices: ") for told in against.obstacles)


def test_code_and_libraries_that_differ_within_a_side_are_warned_of(
    measured: Mapping[str, Any], tmp_path: Path
) -> None:
    old = varied(measured, BASE, provenance__git_commit="abc", provenance__torch="2.0")
    both = typed(old), typed(varied(old, provenance__torch="2.1"))
    lines = as_text(compare([Side("a", both[:1], tmp_path), Side("b", both, tmp_path)]))
    assert "  B: its results differ in torch: 2.0, 2.1" in lines.splitlines()
    assert "differ in git_commit" not in lines


def test_below_five_samples_no_interval_is_printed(side: Callable[..., Side]) -> None:
    few = compare([side("a", BASE[:2]), side("b", SLOWER[:2])])
    [line] = [line for line in as_text(few).splitlines() if line.startswith("99 % interval")]
    assert line.split()[-1] == "-"
    [row] = list(csv.DictReader(io.StringIO(as_csv(few))))[1:]
    assert (row["ratio_low99"], row["ratio_high99"]) == ("", "")
    assert float(row["ratio"]) > 1


# -- outputs


def test_whether_the_outputs_are_equal_is_said_in_every_form_for_people(side: Callable[..., Side]) -> None:
    other = side("b", BASE, output__sha256="b" * 64)
    for form in (as_text, as_markdown):
        same = form(compare([side("a", BASE), side("b", SLOWER), side("c", BASE[:1])]))
        assert "equal: all 3 sides generated the same tokens" in same
        digest = side("a", BASE).results[0].output.sha256[:12]
        assert f"not equal: A, C {digest}; B bbbbbbbbbbbb" in form(compare([side("a", BASE), other, side("c", BASE)]))


def test_unequal_outputs_are_exit_1_only_where_equal_ones_are_asked_for(
    measured: Mapping[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / name) for name in ("a.json", "b.json", "c.json")]
    for path, digest in zip(paths, "aab", strict=True):
        Path(path).write_text(json.dumps(varied(measured, BASE, output__sha256=64 * digest)))
    assert main(["compare", *paths]) == 0
    assert main(["compare", "--equal-outputs", *paths[:2]]) == 0
    assert capsys.readouterr().err == ""
    assert main(["compare", "--equal-outputs", *paths]) == 1
    assert capsys.readouterr().err == ("bench_infer.py: the outputs are not equal: A, B aaaaaaaaaaaa; C bbbbbbbbbbbb\n")


def test_a_side_without_a_result_has_no_equal_output(side: Callable[..., Side], tmp_path: Path) -> None:
    failed = Side("b", (), tmp_path, (Failure(3, "it does not fit"),))
    assert not are_equal(outputs_of(compare([side("a", BASE), failed])))
    assert not are_equal(outputs_of(compare([failed, failed])))
    assert "not equal: A " in as_text(compare([side("a", BASE), failed]))
    assert "B no result" in as_text(compare([side("a", BASE), failed]))


def test_make_bench_runs_as_many_rounds_as_a_verdict_needs_and_fails_where_outputs_differ() -> None:
    makefile = (Path(__file__).resolve().parents[3] / "Makefile").read_text(encoding="utf-8")
    [rounds] = re.findall(r"^ROUNDS := (\d+)$", makefile, re.MULTILINE)
    assert int(rounds) >= FEWEST
    recipe = makefile.partition("\nbench:")[2].partition("\ntest:")[0]
    assert "--repeats $(ROUNDS) " in recipe
    assert "bench_infer.py compare --equal-outputs " in recipe


def test_floors_of_two_kinds_of_matmul_are_not_held_against_each_other(side: Callable[..., Side]) -> None:
    rate = {"value": 700.0, "median": 690.0, "unit": "TFLOPs", "spread_pct": 1.0, "how": ""}
    changes: dict[str, Any] = {"phases__prefill__bound_by": "compute", "phases__decode__bound_by": "h2d"}
    older = side("older", BASE, **changes)
    newer = side("newer", BASE, **changes, ceilings__matmul_burst=rate)
    [(said, names)] = [(w, n) for w, n in compare([older, newer]).warnings.items() if "matmul" in w]
    assert said.startswith("its prefill floor counts arithmetic")
    assert names == ["newer"]
    assert not [warning for warning in compare([newer, newer]).warnings if "matmul" in warning]
