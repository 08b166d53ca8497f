"""The command line of a sweep: lists become points, and what no run takes is refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.options.flags import build_parser, parse
from bench.options.verb_flags import SweepOptions
from bench_infer import command_line as main
from tests.whole.test_docs import verbs_of
from wsm.errors import UnusableInput


def options_of(*argv: str) -> SweepOptions:
    verb, options = parse(["sweep", *argv])
    assert verb == "sweep"
    assert isinstance(options, SweepOptions)
    return options


def points_of(*argv: str) -> list[list[str]]:
    return [list(point.argv) for point in options_of(*argv).sweep.points]


def refusal(*argv: str) -> str:
    with pytest.raises(UnusableInput) as caught:
        options_of(*argv)
    return str(caught.value)


def test_every_combination_is_a_point_the_first_flag_changing_slowest() -> None:
    assert points_of("--mode", "mixed,stream", "--batch-size", "2", "--seed=1,2") == [
        ["--batch-size=2", "--mode=mixed", "--seed=1"],
        ["--batch-size=2", "--mode=mixed", "--seed=2"],
        ["--batch-size=2", "--mode=stream", "--seed=1"],
        ["--batch-size=2", "--mode=stream", "--seed=2"],
    ]


def test_without_lists_there_is_one_point() -> None:
    assert points_of("--mode", "full") == [["--mode=full"]]


def test_a_flag_given_several_times_is_a_list_too() -> None:
    assert points_of("--mode", "full", "--mode", "stream") == [["--mode=full"], ["--mode=stream"]]


@pytest.mark.parametrize(
    "flag", ["--raw-device", "--prompt", "--checkpoints", "--prompts", "--manifest", "--cache-dir", "--kv-device"]
)
def test_a_value_that_may_hold_commas_stays_whole(flag: str) -> None:
    assert points_of(flag, "/dev/a,/dev/b") == [[f"{flag}=/dev/a,/dev/b"]]
    assert points_of(flag, "/dev/a,/dev/b", flag, "c") == [[f"{flag}=/dev/a,/dev/b"], [f"{flag}=c"]]


def test_switches_take_on_and_off() -> None:
    assert points_of("--no-probe=on,off") == [["--no-probe"], []]
    assert points_of("--no-probe") == [["--no-probe"]]
    assert "on, off" in refusal("--no-probe=maybe,off")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--mode", "full,"], "empty value"),
        (["--mode", "full,full"], "--repeats"),
        (["--out-json", "x"], "--out-json"),
        (["--repeats", "0"], "--repeats"),
        (["--tp", "2"], "--tp"),
    ],
)
def test_a_list_that_cannot_be_swept_is_refused_by_its_flag(argv: list[str], said: str) -> None:
    assert said in refusal(*argv)


def test_every_flag_of_a_run_can_be_swept() -> None:
    """All but where a run reports, and torchrun's --tp: a new flag of a run is one of a sweep by itself."""
    run = {word for action in _actions("run") for word in action}
    sweep = {word for action in _actions("sweep") for word in action}
    assert run - sweep == {
        *("--out-json", "--trace", "-o", "--output", "--tp"),
        *("--version", "--list-models", "--no-ignore-eos"),  # the last is spelled `--ignore-eos off` there
    }


def _actions(verb: str) -> list[list[str]]:
    return [list(action.option_strings) for action in verbs_of(build_parser())[verb]._actions]


def test_a_point_that_no_run_takes_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["sweep", "--mode", "mixed,hybrid", "--out-dir", str(tmp_path / "s")]
    assert main(argv) == 2
    assert "hybrid" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_two_points_never_share_a_folder() -> None:
    options = options_of("--prompt", "a/b", "--prompt", "a b", "--prompt", "x" * 300)
    folders = [point.folder for point in options.sweep.points]
    assert len(set(folders)) == 3
    assert all("/" not in folder and len(folder) < 100 for folder in folders)
