"""What a killed process has left beside a file goes with the next write; what a living one writes stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from wsm.disk import atomic
from wsm.disk.atomic import write_atomically

WRITER = """
import os, sys
from pathlib import Path
from wsm.disk import atomic
def wait(*_):
    print("writing", flush=True)
    sys.stdin.readline()
os.fsync = wait
atomic.write_atomically(Path(sys.argv[1]), "of the other process")
"""


def writer(path: Path) -> subprocess.Popen[str]:
    """A process in the middle of writing ``path``; a line to it lets it go on."""
    command = [sys.executable, "-c", WRITER, str(path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "writing\n"
    return other


def test_what_a_killed_writer_has_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "m[1].json"
    other = writer(path)
    other.send_signal(signal.SIGKILL)
    other.communicate()
    assert len(os.listdir(tmp_path)) == 1, "its temporary file"
    unlike = [tmp_path / f".{path.name}.mine.tmp", tmp_path / f".other.json.{'0' * 32}.tmp"]
    for file in unlike:
        file.write_text("somebody else's")
    write_atomically(path, "whole")
    assert path.read_text() == "whole"
    assert set(tmp_path.iterdir()) == {path, *unlike}


def test_what_a_living_process_writes_is_not_taken_from_it(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    other = writer(path)
    write_atomically(path, "first")
    assert path.read_text() == "first"
    other.communicate("\n")
    assert other.returncode == 0
    assert path.read_text() == "of the other process"
    assert list(tmp_path.iterdir()) == [path]


def test_a_temporary_file_that_is_removed_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes the new file for one that was left behind, in the moment before its lock."""
    real, removed = atomic.fcntl.flock, list[Path]()

    def raced(file: int, operation: int) -> None:
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        real(file, operation)

    monkeypatch.setattr(atomic.fcntl, "flock", raced)
    write_atomically(tmp_path / "m.json", "whole")
    assert (tmp_path / "m.json").read_text() == "whole"
    assert len(removed) == 1


def test_another_writer_takes_no_temporary_file_away_that_is_whole_and_not_renamed_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was closed before its rename has no lock any more: it would pass for left behind."""
    path, real = tmp_path / "m.json", os.replace

    def raced(source: Path, target: Path) -> None:
        atomic.remove_left_behind(path)
        real(source, target)

    monkeypatch.setattr(os, "replace", raced)
    write_atomically(path, "whole")
    assert path.read_text() == "whole"
