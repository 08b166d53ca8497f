"""Sweep: processes interleaved, failures kept as results, nothing lost or doubled by a stop."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.compare.sides import read_sides
from bench.options.program import called
from bench.result.sweep_folder import Failure, Point, outcomes_in, read_points
from bench.result.types import Result
from bench.sweep import sweep as sweep_module
from bench_infer import command_line as main
from wsm.stop import Stopped

ROOT = Path(__file__).resolve().parents[3]


# -- processes: a stand-in for the script, which writes what it was asked for

STAND_IN = """
import json, os, sys, time
argv = sys.argv[1:]
out = next(word.partition("=")[2] for word in argv if word.startswith("--out-json="))
here = os.path.dirname(os.path.abspath(__file__))
open(os.path.join(here, "calls"), "a").write(json.dumps([argv, "WSM_CPU_EVICT" in os.environ, os.getpid()]) + "\\n")
if "--seed=7" in argv:
    sys.stderr.write("bench_infer.py: the run does not fit: it takes 9 GiB\\nGPU memory 9\\n")
    sys.exit(3)
if "--seed=8" in argv:
    os.kill(os.getpid(), 9)
if "--seed=9" in argv:
    open(os.path.join(here, "waiting"), "w").close()
    try:
        time.sleep(0 if os.path.exists(os.path.join(here, "go")) else 60)
    except KeyboardInterrupt:
        time.sleep(0.2)
        open(os.path.join(here, "joined"), "w").close()
        sys.exit(130)
result = json.load(open(os.path.join(here, "canned.json")))
result["load_s"]["from_process_start_s"] = time.time() % 100  # no copy of another process's result
json.dump(result, open(out, "w"))
"""


@pytest.fixture
def script(tmp_path: Path, measured: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "canned.json").write_text(json.dumps(dict(measured)))
    (folder / "script.py").write_text(STAND_IN)
    monkeypatch.setattr(sweep_module, "SCRIPT", folder / "script.py")
    return folder / "script.py"


def calls(script: Path) -> list[list[str]]:
    return [json.loads(line)[0] for line in (script.parent / "calls").read_text().splitlines()]


def seeds(script: Path) -> list[str]:
    return [word.partition("=")[2] for call in calls(script) for word in call if word.startswith("--seed=")]


def sweep(folder: Path, *argv: str) -> int:
    return main(["sweep", "--out-dir", str(folder), *argv])


def ended(folder: Path) -> dict[tuple[int, int], tuple[int, str | None]]:
    """Exit code and reason of every process that has ended, by point and repeat."""
    return {
        (point, repeat): (gave.exit_code, gave.reason) if isinstance(gave, Failure) else (0, None)
        for (repeat, point), gave in outcomes_in(folder, read_points(folder)).items()
    }


def test_repeats_go_there_and_back_over_the_points(script: Path, tmp_path: Path) -> None:
    assert sweep(tmp_path / "s", "--seed", "1,2,3", "--repeats", "3", "--inner-repeats", "4") == 0
    assert seeds(script) == ["1", "2", "3", "3", "2", "1", "1", "2", "3"]
    assert all("--repeats=4" in call for call in calls(script))
    assert set(ended(tmp_path / "s")) == {(point, repeat) for point in (1, 2, 3) for repeat in (1, 2, 3)}
    sides = read_sides([tmp_path / "s"])
    assert [(side.name, len(side.results)) for side in sides] == [("seed=1", 3), ("seed=2", 3), ("seed=3", 3)]


def test_a_failed_point_is_a_result_with_its_reason_and_not_the_end(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path / "s", "--seed", "7,8,1") == 0
    told = ended(tmp_path / "s")
    assert told[1, 1] == (3, "the run does not fit: it takes 9 GiB")
    assert told[2, 1][0] == -9
    assert "SIGKILL" in str(told[2, 1][1])
    assert told[3, 1] == (0, None)
    said = capsys.readouterr().out
    assert "[SWEEP] 3 points x 1 process, 3 to run" in said
    assert f"1 result and 2 failures in {tmp_path / 's'}\n" in said
    assert f"[SWEEP] next: {shlex.join([*called(), 'compare', str(tmp_path / 's')])}\n" in said
    assert [side.failures[0].exit_code for side in read_sides([tmp_path / "s"]) if side.failures] == [3, -9]


def test_a_sweep_of_nothing_but_failures_is_exit_1(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path / "s", "--seed", "7") == 1
    assert "every process of the sweep failed, the first with: the run does not fit" in capsys.readouterr().err


def test_what_is_there_is_not_run_again_and_more_repeats_go_on(script: Path, tmp_path: Path) -> None:
    assert sweep(tmp_path / "s", "--seed", "1,7") == 0
    assert sweep(tmp_path / "s", "--seed", "1,7") == 0
    assert seeds(script) == ["1", "7"]
    assert sweep(tmp_path / "s", "--seed", "1,7", "--repeats", "2") == 0
    assert seeds(script) == ["1", "7", "7", "1"]
    assert sweep(tmp_path / "s", "--seed", "1,7", "--repeats", "2", "--retry-failed") == 0
    assert seeds(script)[4:] == ["7", "7"]
    assert len(ended(tmp_path / "s")) == 4


def test_a_result_counts_and_not_an_earlier_failure_that_a_kill_left_beside_it(script: Path, tmp_path: Path) -> None:
    assert sweep(tmp_path / "s", "--seed", "1,2") == 0
    (tmp_path / "s" / "p01-seed=1" / "r1.failed.json").write_text('{"exit_code": 3, "reason": "before"}')
    assert sweep(tmp_path / "s", "--seed", "1,2") == 0
    assert ended(tmp_path / "s") == {(1, 1): (0, None), (2, 1): (0, None)}
    assert seeds(script) == ["1", "2"]


@pytest.mark.parametrize("other", [["--seed", "1,3"], ["--seed", "1,2", "--mode", "full"], ["--inner-repeats", "2"]])
def test_a_folder_of_another_sweep_is_refused(
    script: Path, tmp_path: Path, other: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path / "s", "--seed", "1,2") == 0
    before = sorted(path.name for path in (tmp_path / "s").rglob("*"))
    assert sweep(tmp_path / "s", *other) == 2
    assert "holds another sweep" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "s").rglob("*")) == before


def test_a_folder_of_something_else_is_refused(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("precious")
    assert sweep(tmp_path / "s", "--seed", "1") == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert sweep(tmp_path / "s" / "thesis.txt", "--seed", "1") == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "bench_infer sweep", "version": 2}'])
def test_a_description_that_cannot_be_used_is_one_sentence(
    script: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "sweep.json").write_text(content)
    for verb in (["sweep", "--seed", "1", "--out-dir"], ["compare"], ["report"]):
        assert main([*verb, str(tmp_path / "s")]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "sweep.json" in err


def test_processes_get_the_users_variables_and_no_presets(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result says which variables the user had set: a preset of the sweep's own process is none of them."""
    monkeypatch.setenv("WSM_CPU_EVICT", "belady")
    for name, user_set in (("s", ()), ("t", ("WSM_CPU_EVICT",))):
        assert main(["sweep", "--out-dir", str(tmp_path / name), "--seed", "1"], user_set) == 0
    assert [json.loads(line)[1] for line in (script.parent / "calls").read_text().splitlines()] == [False, True]


# -- stopped half-way


@pytest.fixture
def started(script: Path, tmp_path: Path) -> Callable[[], tuple[subprocess.Popen[str], int]]:
    """A sweep whose second of three points hangs, once that point runs; the hanging process's id beside it."""

    def start() -> tuple[subprocess.Popen[str], int]:
        code = (
            "import sys; from pathlib import Path; from bench.sweep import sweep as sweep_module; "
            "from bench_infer import command_line as main; "
            f"sweep_module.SCRIPT = Path({str(script)!r}); "
            f"sys.exit(main(['sweep', '--seed', '1,9,2', '--out-dir', {str(tmp_path / 's')!r}]))"
        )
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not (script.parent / "waiting").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        hanging = json.loads((script.parent / "calls").read_text().splitlines()[-1])[2]
        return process, hanging

    return start


def gone(process_id: int) -> bool:
    """Whether it ends within two seconds; a zombie has."""
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_killed_half_way_it_goes_on_where_it_stopped(
    started: Callable[[], tuple[subprocess.Popen[str], int]],
    script: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    process, hanging = started()
    assert sweep(tmp_path / "s", "--seed", "1,9,2") == 2
    assert "another sweep is running" in capsys.readouterr().err
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)
    assert gone(hanging), "the killed sweep left a process behind, which would disturb the sweep that goes on"
    assert list(ended(tmp_path / "s")) == [(1, 1)]
    (script.parent / "go").touch()
    assert sweep(tmp_path / "s", "--seed", "1,9,2") == 0
    assert seeds(script) == ["1", "9", "9", "2"]
    assert list(ended(tmp_path / "s")) == [(1, 1), (2, 1), (3, 1)]
    assert [path.name for path in (tmp_path / "s").rglob(".*") if path.name != ".lock"] == []


def test_ctrl_c_reaches_the_running_process_and_nothing_of_it_counts(
    started: Callable[[], tuple[subprocess.Popen[str], int]], script: Path, tmp_path: Path
) -> None:
    process, hanging = started()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.strip() == "bench_infer.py: interrupted; nothing half-written was left"
    assert (script.parent / "joined").exists(), "the sweep did not wait for its process to end in order"
    assert gone(hanging)
    assert list(ended(tmp_path / "s")) == [(1, 1)]


# -- with the script itself


def test_a_sweep_of_real_runs_keeps_results_and_the_reason_of_one_that_does_not_fit(
    measured_files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["--prompt-len", "4", "--max-new-tokens", "2", "--no-probe", "--device", "cpu", "--warmup-rounds", "0"]
    cache = str(measured_files[0].parent / "cache")
    argv = [*fixed, "--mode", "stream", "--cache-dir", cache, "--gpu-mem-gb", "1,0.001"]
    assert sweep(tmp_path / "s", *argv) == 0
    good, bad = read_sides([tmp_path / "s"])
    assert good.results[0].config.resolved["gpu_mem_gb"] == 1
    assert good.results[0].config.environment_set_by_user == []
    assert bad.failures[0].exit_code == 3
    assert bad.failures[0].reason.startswith("the run does not fit: it takes")
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "s")]) == 0
    assert "gave no result (exit 3: the run does not fit" in capsys.readouterr().out


def test_a_sweep_under_other_variables_is_another_sweep(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["sweep", "--seed", "1", "--out-dir", str(tmp_path / "s"), "--repeats"]
    monkeypatch.setenv("WSM_CPU_EVICT", "belady")
    assert main([*argv, "1"]) == 0  # the preset of this process, not the user's
    monkeypatch.setenv("WSM_CPU_EVICT", "fifo")
    assert main([*argv, "2"], ("WSM_CPU_EVICT",)) == 2
    assert "(its variables: none; asked for: WSM_CPU_EVICT=fifo)" in capsys.readouterr().err

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert main([*argv, "2"]) == 2
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert main([*argv, "2"]) == 0
    assert seeds(script) == ["1", "1"]


def test_fewer_repeats_lose_nothing(script: Path, tmp_path: Path) -> None:
    assert sweep(tmp_path / "s", "--seed", "1,7", "--repeats", "3") == 0
    before = ended(tmp_path / "s")
    assert sweep(tmp_path / "s", "--seed", "1,7", "--repeats", "1") == 0
    assert ended(tmp_path / "s") == before
    assert sweep(tmp_path / "s", "--seed", "1,7", "--repeats", "1", "--retry-failed") == 0
    assert seeds(script)[6:] == ["7"]
    assert set(ended(tmp_path / "s")) == {(point, repeat) for point in (1, 2) for repeat in (1, 2, 3)}


def test_a_retry_that_is_broken_off_leaves_an_outcome_of_each_process(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--seed", "1,7,8"]
    assert sweep(tmp_path / "s", *argv) == 0
    before, real = ended(tmp_path / "s"), sweep_module.run_point

    def run_point(folder: Path, point: Point, *rest: Any) -> Result | Failure:
        if point.number == 3:
            raise Stopped(signal.SIGINT)
        return real(folder, point, *rest)

    monkeypatch.setattr(sweep_module, "run_point", run_point)
    assert sweep(tmp_path / "s", *argv, "--retry-failed") == 130
    assert ended(tmp_path / "s") == before


@pytest.mark.parametrize("flag", ["--checkpoints", "--prompts", "--manifest"])
def test_a_file_that_does_not_exist_is_refused_before_the_folder_is_made(
    script: Path, tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").touch()
    argv = [flag, str(tmp_path / "there"), flag, str(tmp_path / "none")]
    assert sweep(tmp_path / "s", *argv) == 2
    assert f"{flag} {tmp_path / 'none'} does not exist" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_another_list_is_told_as_one_types_it(script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["sweep", "--out-dir", str(tmp_path / "s")]
    assert main([*argv, "--seed", "1,2"]) == 0
    assert main([*argv, "--seed", "1,3"]) == 2
    assert "(its lists: --seed 1,2; asked for: --seed 1,3)" in capsys.readouterr().err
