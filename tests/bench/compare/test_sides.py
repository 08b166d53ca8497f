"""What can be compared: results, folders, sweeps; and the one sentence for what cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.compare.sides import Side, differing, mixed_within, read_sides
from bench.result.types import SCHEMA_VERSION
from bench_infer import command_line as main
from tests.results import stored, varied
from wsm.errors import UnusableInput
from wsm.settings import CHOSEN


def refusal(*paths: Path) -> str:
    with pytest.raises(UnusableInput) as caught:
        read_sides(paths)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert str(paths[-1]) in sentence
    return sentence


# -- what a side is


def test_the_samples_of_one_result_are_its_rounds(measured: Mapping[str, Any], tmp_path: Path) -> None:
    [side] = read_sides([stored(tmp_path / "a.json", varied(measured, [5, 6, 7]))])
    assert (side.name, side.sampled, side.samples("e2e_ms")) == ("a", "3 rounds", [5, 6, 7])


def test_the_samples_of_several_results_are_one_each(measured: Mapping[str, Any], tmp_path: Path) -> None:
    """Rounds of one process are no independent samples of what differs from process to process."""
    for place, rounds in enumerate(([5, 6, 7], [8, 9, 10])):
        stored(tmp_path / "mixed" / f"r{place}.json", varied(measured, rounds))
    [side] = read_sides([tmp_path / "mixed"])
    assert (side.name, side.sampled, side.samples("e2e_ms")) == ("mixed", "2 processes", [6, 9])
    assert side.typical is not None
    assert side.typical.e2e_ms == 6


def test_a_folder_is_read_in_the_order_of_its_numbers(measured: Mapping[str, Any], tmp_path: Path) -> None:
    for number in (10, 2, 1):
        stored(tmp_path / "s" / f"r{number}.json", varied(measured, [float(number)]))
    assert read_sides([tmp_path / "s"])[0].samples("e2e_ms") == [1, 2, 10]


def test_a_trace_in_a_folder_is_no_result(
    measured: Mapping[str, Any], measured_files: tuple[Path, Path], tmp_path: Path
) -> None:
    stored(tmp_path / "s" / "run.json", measured)
    shutil.copy(measured_files[1], tmp_path / "s" / "run.trace.json")
    assert len(read_sides([tmp_path / "s"])[0].results) == 1


def test_lines_of_whole_results_are_one_side(measured: Mapping[str, Any], tmp_path: Path) -> None:
    """What `-o json` prints, run after run, into one file."""
    lines = tmp_path / "all.jsonl"
    lines.write_text("".join(json.dumps(varied(measured, [n])) + "\n" for n in (3, 4)))
    [side] = read_sides([lines])
    assert side.samples("e2e_ms") == [3, 4]


def test_sides_of_one_name_are_told_apart(measured: Mapping[str, Any], tmp_path: Path) -> None:
    one, two = stored(tmp_path / "x" / "r.json", measured), stored(tmp_path / "y" / "r.json", measured)
    assert [side.name for side in read_sides([one, two])] == [str(one), str(two)]
    assert [side.name for side in read_sides([one, one])] == [str(one), f"{one} (2)"]


def test_runs_of_different_settings_are_no_side(measured: Mapping[str, Any], tmp_path: Path) -> None:
    stored(tmp_path / "s" / "a.json", measured)
    stored(tmp_path / "s" / "b.json", varied(measured, config__resolved__gpu_cached_layers=9))
    assert "gpu_cached_layers 4, 9" in refusal(tmp_path / "s")


def test_where_a_run_wrote_to_is_no_setting(measured: Mapping[str, Any], tmp_path: Path) -> None:
    stored(tmp_path / "s" / "a.json", measured)
    stored(tmp_path / "s" / "b.json", varied(measured, config__resolved__out_json="elsewhere", config__argv=["x"]))
    assert len(read_sides([tmp_path / "s"])[0].results) == 2


def test_what_one_side_lacks_differs() -> None:
    assert differing([{"a": 1, "b": 2}, {"a": 1}]) == {"b": [2, None]}


def test_a_side_without_results_has_nothing_typical(tmp_path: Path) -> None:
    assert Side("x", (), tmp_path).typical is None


# -- what cannot be read


def test_a_sweep_s_lines_of_an_earlier_program_are_a_side_for_each_point(
    measured: Mapping[str, Any], tmp_path: Path
) -> None:
    def line(point: int, result: Any, **more: Any) -> str:
        values = {"--mode": "mixed", "--seed": str(point)}
        gave = {"exit_code": 0, "reason": None, "result": result, **more}
        return json.dumps({"point": point, "repeat": 1, "values": values, **gave})

    result = dict(measured)
    failed = line(2, None, exit_code=3, reason="it does not fit")
    lines = tmp_path / "results.jsonl"
    lines.write_text("\n".join([line(1, result), failed, line(1, varied(result, [7.0]))]) + "\n")
    first, second = read_sides([lines])
    assert (first.name, len(first.results), first.failures) == ("mode=mixed seed=1", 2, ())
    assert (second.name, second.results, str(second.failures[0])) == (
        "mode=mixed seed=2",
        (),
        "exit 3: it does not fit",
    )
    lines.write_text('{"point": 1, "values": 3}\n')
    assert "line 1" in refusal(lines)


def test_a_missing_file_an_empty_folder_and_an_empty_jsonl_are_named(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.json")
    assert "holds no result" in refusal(tmp_path)
    (tmp_path / "e.jsonl").touch()
    assert "empty" in refusal(tmp_path / "e.jsonl")


@pytest.mark.parametrize(("version", "age"), [(SCHEMA_VERSION + 1, "a newer"), (SCHEMA_VERSION - 1, "an older")])
def test_another_schema_is_told_to_be_newer_or_older(
    measured: Mapping[str, Any], tmp_path: Path, version: int, age: str
) -> None:
    assert age in refusal(stored(tmp_path / "r.json", varied(measured, schema_version=version)))


def test_a_line_broken_off_is_named_by_its_number(measured: Mapping[str, Any], tmp_path: Path) -> None:
    whole = json.dumps(dict(measured))
    (tmp_path / "r.jsonl").write_text(f"{whole}\n{whole[:100]}")
    assert "line 2" in refusal(tmp_path / "r.jsonl")


@pytest.mark.parametrize("line", ["null", '{"point": 1}', '{"point": "x", "values": {}, "result": null}', "[]", "3"])
def test_a_line_that_is_no_result_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "r.jsonl").write_text(line)
    assert "line 1" in refusal(tmp_path / "r.jsonl")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("phases", [], "phases: expected `object`, got `array`"),
        ("phases__decode__busy_ms", None, "phases.decode.busy_ms: expected `object`, got `null`"),
        ("phases__decode__wall_ms", "12", "phases.decode.wall_ms: expected `float`, got `str`"),
        ("e2e_ms", 0, "e2e_ms: expected `float` > 0.0"),
        ("e2e_ms", -1.0, "e2e_ms: expected `float` > 0.0"),
        ("e2e_ms", float("inf"), "e2e_ms is Infinity"),
        ("repeats__raw", [], "repeats.raw: expected `array` of length >= 1"),
        ("output__sha256", 5, "output.sha256: expected `str`, got `int`"),
        ("warnings", ["x", 3], "warnings[1]: expected `str`, got `int`"),
        ("config__resolved", None, "config.resolved: expected `object`, got `null`"),
    ],
)
def test_a_result_changed_by_hand_is_refused_by_the_key(
    measured: Mapping[str, Any], tmp_path: Path, path: str, value: object, said: str
) -> None:
    assert said in refusal(stored(tmp_path / "r.json", varied(measured, **{path: value})))


@pytest.mark.parametrize("key", ["phases", "repeats", "config", "output", "warnings"])
def test_a_key_that_comparing_needs_is_named_when_it_is_missing(
    measured: Mapping[str, Any], tmp_path: Path, key: str
) -> None:
    lacking = {name: value for name, value in measured.items() if name != key}
    assert f"{key} is missing" in refusal(stored(tmp_path / "r.json", lacking))


def test_a_result_of_before_a_key_was_added_can_still_be_read(measured: Mapping[str, Any], tmp_path: Path) -> None:
    older = {name: value for name, value in varied(measured).items() if name not in ("conditions", "load", "kv")}
    for spread in older["repeats"]["statistics"].values():
        del spread["median_ci95"]
    assert read_sides([stored(tmp_path / "r.json", older)])


@pytest.mark.parametrize("verb", ["compare", "report"])
def test_what_cannot_be_read_is_exit_2_and_one_line(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "read.md").write_text("# no JSON")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "f").mkdir()
    for path in ("bad.json", "none.json", "read.md", "other.json", "f"):
        assert main([verb, path, path]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert ("name what a run's --out-json wrote" in err) == (path != "f")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("e2e_ms", 10**400),
        ("e2e_ms", -(10**400)),
        ("batch_size", 10**24),
        ("phases__decode__bytes_moved__ssd_read", 10**400),
        ("phases__decode__bytes_moved__of_tomorrow", 10**400),
        ("ceilings__of_tomorrow", {"value": [1e300]}),
    ],
)
def test_a_number_that_no_run_gives_is_refused_by_its_key(
    measured: Mapping[str, Any], tmp_path: Path, path: str, value: object
) -> None:
    assert path.split("__")[-1] in refusal(stored(tmp_path / "r.json", varied(measured, **{path: value})))


def test_a_schema_of_the_future_is_told_though_it_lost_a_key(measured: Mapping[str, Any], tmp_path: Path) -> None:
    later = {key: value for key, value in measured.items() if key != "wsm"}
    told = refusal(stored(tmp_path / "r.json", {**later, "schema_version": SCHEMA_VERSION + 1}))
    assert "a newer bench_infer.py" in told
    assert "wsm is missing" in refusal(stored(tmp_path / "r.json", later))


def test_what_auto_chose_by_the_free_memory_is_no_other_setting(measured: Mapping[str, Any], tmp_path: Path) -> None:
    auto = varied(measured, config__resolved__auto=True)
    chosen = {f"config__resolved__{name}": "cpu" if name == "embedding" else 9 for name in CHOSEN}
    stored(tmp_path / "s" / "r1.json", auto)
    stored(tmp_path / "s" / "r2.json", varied(auto, **chosen))
    [side] = read_sides([tmp_path / "s"])
    assert mixed_within(side)["gpu_cached_layers"] == [4, 9]
    stored(tmp_path / "s" / "r3.json", varied(auto, config__resolved__staging_mb=1))
    assert "staging_mb" in refusal(tmp_path / "s")
