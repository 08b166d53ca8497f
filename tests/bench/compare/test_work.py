"""What forbids comparing is said in the user's words, with what to give; tokens that may differ forbid nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.compare.compare import Against, compare, regressions
from bench.compare.sides import Side
from bench.compare.text import as_csv, as_text
from bench_infer import command_line
from tests.results import stored, typed, varied

BASE, SLOWER = [100, 101, 99, 100.5, 99.5], [110, 111, 109, 110.5, 109.5]
OTHER = {"output__sha256": "0" * 64}
INT4 = {"weights__weight_format": "int4", "weights__exact": False, "config__resolved__weight_format": "int4"}
PARTLY = {"kv__topk_blk": 4, "kv__fraction_fetched": 0.5, "kv__exact": False}


@pytest.fixture
def against(measured: Mapping[str, Any], tmp_path: Path) -> Callable[..., Against]:
    """Of a side with ``changes`` and other tokens, against one with ``base``."""

    def against(changes: dict[str, Any], base: Mapping[str, Any] | None = None) -> Against:
        a = Side("a", (typed(varied(measured, BASE, **(base or {}))),), tmp_path)
        b = Side("b", (typed(varied(measured, SLOWER, **{**OTHER, **changes})),), tmp_path)
        [found] = compare([a, b]).against
        return found

    return against


@pytest.mark.parametrize(
    ("setting", "values", "said"),
    [
        ("temperature", (0.6, 0.0), "temperature 0.6 against 0: give both the same --temperature"),
        ("temperature", (0.6, 0.8), "temperature 0.6 against 0.8: give both the same --temperature"),
        ("top_p", (0.9, 0.5), "top_p 0.9 against 0.5: give both the same --top-p"),
        ("seed", (0, 7), "seed 0 against 7: give both the same --seed"),
        ("prompt", (None, "a"), "prompt none against a: give both the same --prompt"),
    ],
)
def test_a_flag_that_chose_other_tokens_is_named_with_both_values(
    against: Callable[..., Against], setting: str, values: tuple[Any, Any], said: str
) -> None:
    path = f"config__resolved__{setting}"
    found = against({path: values[1]}, {path: values[0]})
    assert found.obstacles == (said,)
    assert found.expected == said.partition(":")[0]


def test_drawing_beside_not_drawing_is_other_work_though_tokens_agree(
    against: Callable[..., Against], measured: Mapping[str, Any]
) -> None:
    equal = {"output__sha256": measured["output"]["sha256"]}
    assert against({**equal, "config__resolved__temperature": 0.0}).verdict == "not comparable"
    assert against({**equal, "config__resolved__temperature": 0.8}).verdict == "slower"


def test_what_only_sampling_reads_explains_nothing_at_temperature_0(against: Callable[..., Against]) -> None:
    greedy = {"config__resolved__temperature": 0.0, "config__resolved__prompt_len": None}
    found = against({**greedy, "config__resolved__seed": 7, "config__resolved__top_p": 0.5}, greedy)
    assert found.obstacles[0].startswith("unequal outputs: ")
    random_ids = {**greedy, "config__resolved__prompt_len": 8}
    assert against({**random_ids, "config__resolved__seed": 7}, random_ids).obstacles == (
        "seed 0 against 7: give both the same --seed",
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (INT4, "int4 rounds the weights (`bench_infer.py quality` says how much)"),
        ({"config__resolved__dtype": "float32"}, "bfloat16 and float32 round otherwise"),
        (
            {"config__resolved__kv_dtype": "int8"},
            "--kv-dtype int8 rounds the KV (docs/KV.md says how much)",
        ),
        (PARTLY, "--topk-blk 4 left KV blocks out (0 takes all)"),
    ],
    ids=["weights", "dtype", "KV", "blocks"],
)
def test_other_tokens_of_a_lossy_setting_are_told_and_the_time_is_judged(
    against: Callable[..., Against], changes: dict[str, Any], said: str
) -> None:
    found = against(changes)
    assert (found.verdict, found.obstacles, found.expected) == ("slower", (), said)


def test_two_lossy_formats_are_both_named(against: Callable[..., Against]) -> None:
    int8 = {"weights__weight_format": "int8", "weights__exact": False}
    assert against(INT4, int8).expected.startswith("int8 and int4 round the weights (")


@pytest.mark.parametrize(
    ("changes", "base"),
    [
        ({"weights__weight_format": "exact"}, {}),
        ({"mode": "stream", "config__resolved__mode": "stream"}, {}),
        ({"config__resolved__prefetch_distance": 2}, {}),
        ({"plan__chunk_tokens": 1024, "plan__wave_rows": 2}, {}),
        ({"config__resolved__topk_blk": 4, "kv__topk_blk": 4}, {}),
        (INT4, INT4),
        ({**PARTLY, "kv__fraction_fetched": 0.51}, PARTLY),
    ],
    ids=[
        "exact beside bf16",
        "modes",
        "prefetching",
        "chunks and waves that hold the whole prompt",
        "blocks of which none was left out",
        "int4 beside itself",
        "as many blocks, of which a run fetched more",
    ],
)
def test_other_tokens_of_settings_that_change_none_stay_an_error(
    against: Callable[..., Against], changes: dict[str, Any], base: dict[str, Any]
) -> None:
    found = against(changes, base)
    assert (found.verdict, found.expected) == ("not comparable", "")
    assert found.obstacles[0].endswith(
        "no setting that differs may change tokens, so it is an error of the program or the machine"
    )


@pytest.mark.parametrize("first", [None, "a.json"])
def test_another_store_of_a_lossy_format_excuses_nothing_and_may_be_the_reason(
    against: Callable[..., Against], first: str | None
) -> None:
    """`full` has no manifest and `mixed` one: all modes give the same tokens."""
    found = against({**INT4, "config__resolved__manifest": "b.json"}, {**INT4, "config__resolved__manifest": first})
    assert found.expected == ""
    assert found.obstacles[0].endswith(
        ": the packed stores may have been calibrated otherwise; give both the same --manifest"
    )


def test_a_lossy_format_excuses_neither_other_prompts_nor_fewer_tokens(against: Callable[..., Against]) -> None:
    assert against({**INT4, "decode_tokens_total": 5}).obstacles == (
        "new tokens: 6 against 5: rows ended at a stop token: run both with --ignore-eos",
    )
    assert against({**INT4, "config__resolved__seed": 7}).verdict == "not comparable"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config__resolved__verify_rows": 8}, "give both --verify-rows 8"),
        ({"config__resolved__tp": 2}, "give both the same --tp"),
        (
            {"plan__chunk_tokens": 4},
            "of 1 row at a time may round otherwise; give both --prefill-chunk-tokens 4",
        ),
        ({"provenance__torch": "2.0"}, "is another version; run both with the same"),
    ],
)
def test_what_may_round_otherwise_is_named_beside_unequal_outputs(
    against: Callable[..., Against], changes: dict[str, Any], said: str
) -> None:
    [obstacle] = against(changes).obstacles
    assert obstacle.startswith("unequal outputs: ")
    assert obstacle.endswith(said)


def test_what_follows_from_another_batch_is_not_told_as_well(against: Callable[..., Against]) -> None:
    batch = {"batch_size": 2, "config__resolved__batch_size": 2, "prompt_lens": [8, 8], "decode_tokens_total": 12}
    assert against(batch).obstacles == ("batch_size: 1 against 2: give both the same -b",)
    longer = {**batch, "decode_tokens_total": 24, "config__resolved__max_new_tokens": 12}
    assert len(against(longer).obstacles) == 2


def test_a_lossy_side_is_judged_against_a_threshold_and_its_outputs_stay_unequal(
    measured: Mapping[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = str(stored(tmp_path / "a.json", varied(measured, BASE)))
    b = str(stored(tmp_path / "b.json", varied(measured, SLOWER, **OTHER, **INT4)))
    assert [command_line(["compare", a, b, "--threshold", percent]) for percent in ("3", "12")] == [1, 0]
    out = capsys.readouterr().out
    assert "  B has other tokens than A, as it may: int4 rounds the weights (" in out
    assert "no margin" not in out
    assert command_line(["compare", a, b, "--equal-outputs"]) == 1


def test_the_csv_says_why_outputs_differ(measured: Mapping[str, Any], tmp_path: Path) -> None:
    sides = [
        Side(name, (typed(varied(measured, rounds, **changes)),), tmp_path)
        for name, rounds, changes in (("a", BASE, {}), ("b", SLOWER, {**OTHER, **INT4}))
    ]
    comparison = compare(sides)
    assert "int4 rounds the weights" in as_csv(comparison)
    assert [side.name for side, _ in regressions(comparison, 3)] == ["b"]


# -- warnings and medians


def test_warnings_of_a_kind_are_one_line_with_all_sides_unless_verbose(
    measured: Mapping[str, Any], tmp_path: Path
) -> None:
    lines = [f"{phase}: took {n} ms, {n + 9} were predicted" for phase, n in (("prefill", 10), ("decode", 20))]
    sides = [
        Side("a", (typed(varied(measured, BASE, warnings=lines)),), tmp_path),
        Side(
            "b", (typed(varied(measured, BASE, warnings=["hot", "decode: took 30 ms, 39 were predicted"])),), tmp_path
        ),
    ]
    comparison = compare(sides)
    told = as_text(comparison).partition("warnings\n")[2].splitlines()
    assert told == [f"  A, B: {lines[0]} (and 2 more of the kind: --verbose)", "  B: hot"]
    every = as_text(comparison, verbose=True).partition("warnings\n")[2].splitlines()
    assert every == [f"  A: {lines[0]}", f"  A: {lines[1]}", "  B: hot", "  B: decode: took 30 ms, 39 were predicted"]


def test_verbose_shows_every_warning(
    measured: Mapping[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        stored(tmp_path / f"{name}.json", varied(measured, BASE, warnings=[f"took {ord(name)} ms"]))
    argv = ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    for form in ("text", "md"):
        assert command_line([*argv, "-o", form, "--verbose"]) == 0
        assert "B: took 98 ms" in capsys.readouterr().out


@pytest.mark.parametrize(("rounds", "said"), [(BASE, True), ([100.0], False)])
def test_the_table_says_that_its_figures_are_medians_and_a_summarys_are_not(
    measured: Mapping[str, Any], tmp_path: Path, rounds: list[float], said: bool
) -> None:
    side = Side("a", (typed(varied(measured, rounds)),), tmp_path)
    assert ("a run's own summary shows its round of median e2e_ms" in as_text(compare([side, side]))) is said


def test_another_checkpoint_is_told_once_and_not_again_for_its_digest(against: Callable[..., Against]) -> None:
    other = {
        "config__resolved__model": "other",
        "config__resolved__checkpoints": "/other",
        "provenance__model_digest": "1",
    }
    [told] = against(other).obstacles
    assert told.startswith("model: ")
    assert told.endswith("give both the same --checkpoints")
