"""Standard streams that are closed or full, and outputs without room: exit codes, sentences, and what is kept."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.run import outputs
from bench_infer import command_line
from tests.tiny import hf_directory, hf_model

SCRIPT = Path(__file__).resolve().parents[2] / "bench_infer.py"
RUN = ["--mode", "full", "--device", "cpu", "--no-probe", "--prompt-len", "8", "--max-new-tokens", "2", "--ignore-eos"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_directory(tmp_path_factory.mktemp("model"), hf_model())


def shell(arguments: str, streams: str) -> subprocess.CompletedProcess[str]:
    command = f"'{sys.executable}' '{SCRIPT}' {arguments} {streams}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", ">/dev/full 2>/dev/full", "| head -1"])
def test_a_run_whose_streams_are_gone_writes_its_result(streams: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    ended = shell(f"--checkpoints {model} {' '.join(RUN)} --out-json {out} --cache-dir {tmp_path}", streams)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert json.loads(out.read_text())["repeats"]["n"] == 1


@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        (">/dev/full", 1, "bench_infer.py: standard output: No space left on device\n"),
        (">&-", 1, "bench_infer.py: standard output: Bad file descriptor\n"),
        ("2>&-", 0, ""),
        ("| head -1", 0, ""),
    ],
)
def test_what_only_prints_fails_where_that_is_lost_but_not_for_a_reader_that_has_enough(
    streams: str, code: int, said: str
) -> None:
    ended = shell("--help", streams)
    assert (ended.returncode, ended.stderr) == (code, said)


def failing(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    real = outputs.write_atomically

    def write(path: Path, text: str) -> None:
        if path.name in names:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, text)

    monkeypatch.setattr(outputs, "write_atomically", write)


def test_a_timeline_without_room_does_not_lose_the_result(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, "t.json")
    out, trace = tmp_path / "r.json", tmp_path / "t.json"
    argv = ["--checkpoints", str(model), *RUN, "--out-json", str(out), "--trace", str(trace)]
    assert command_line([*argv, "--cache-dir", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err == f"bench_infer.py: --trace {trace}: No space left on device; {out} is written\n"
    assert "e2e_ms" in said.out
    assert json.loads(out.read_text())["repeats"]["n"] == 1


def test_a_result_without_room_is_kept_elsewhere_and_its_timeline_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, "r.json")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    out, trace = tmp_path / "r.json", tmp_path / "t.json"
    argv = ["--checkpoints", str(model), *RUN, "--out-json", str(out), "--trace", str(trace)]
    assert command_line([*argv, "--cache-dir", str(tmp_path)]) == 2
    [kept] = elsewhere.iterdir()
    said = capsys.readouterr()
    assert said.err == f"bench_infer.py: --out-json {out}: No space left on device; the result is in {kept}\n"
    assert f"all details, is in {kept}" in said.out
    assert str(out) not in said.out
    assert json.loads(kept.read_text())["repeats"]["n"] == 1
    assert json.loads(trace.read_text())["traceEvents"]


def test_where_nothing_can_be_written_nothing_is_said_to_be(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, "r.json", f"r-{os.getpid()}.json", "t.json")
    out, trace = tmp_path / "r.json", tmp_path / "t.json"
    argv = ["--checkpoints", str(model), *RUN, "--out-json", str(out), "--trace", str(trace)]
    assert command_line([*argv, "--cache-dir", str(tmp_path)]) == 2
    said, full = capsys.readouterr(), "No space left on device"
    assert said.err == f"bench_infer.py: --out-json {out}: {full}; the result is lost; --trace {trace}: {full}\n"
    assert "all details" not in said.out
    assert "e2e_ms" in said.out


def test_before_a_run_the_room_for_its_outputs_is_tried(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(file: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    out = tmp_path / "r.json"
    argv = ["--checkpoints", str(model), *RUN, "--out-json", str(out)]
    assert command_line([*argv, "--cache-dir", str(tmp_path)]) == 3
    said = capsys.readouterr().err
    assert said.startswith(f"bench_infer.py: {out}: No space left on device, and up to 1 MB may be written there")
    assert not out.exists()
