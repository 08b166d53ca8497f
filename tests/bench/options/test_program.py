"""Commands that the program prints call what called it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.options.program import called

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("script", "ranks", "expected"),
    [
        ("bench_infer.py", 1, [".venv/bin/python", "bench_infer.py"]),
        ("../x/bench_infer.py", 1, [".venv/bin/python", "../x/bench_infer.py"]),
        ("HERE/.venv/bin/bench-infer", 1, [".venv/bin/bench-infer"]),
        ("bench_infer.py", 4, [".venv/bin/torchrun", "--nproc-per-node", "4", "bench_infer.py"]),
        ("/elsewhere/pytest", 1, [".venv/bin/python", str(ROOT / "bench_infer.py")]),
    ],
)
def test_a_printed_command_names_the_interpreter_and_the_script_as_called(
    script: str, ranks: int, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.setattr(sys, "argv", [script.replace("HERE", str(tmp_path)), "--auto"])
    assert called(ranks) == expected


def test_an_interpreter_elsewhere_is_named_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    assert called()[0] == "/usr/bin/python3"


@pytest.mark.parametrize("argv", [["--help"], ["compare", "a.json", "b.json"], ["--mode", "full"]])
def test_an_interpreter_without_the_packages_is_told_in_one_sentence(argv: list[str]) -> None:
    bare = [sys.executable, "-E", "-s", "-S", "bench_infer.py"]  # -S: the standard library alone
    ended = subprocess.run([*bare, *argv], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    [said] = ended.stderr.splitlines()
    assert f" is not installed in {sys.executable}: run .venv/bin/python bench_infer.py, or `make bench`" in said
