"""Where a verb is to write and cannot: one sentence that names the flag and what to do, before any work."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.results import stored
from tests.whole.conftest import Run


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in which nothing can be made; root may write everywhere, so the system's answer is put in its place."""
    folder, real = tmp_path / "ro", tempfile.TemporaryFile
    folder.mkdir()

    def refuse(*, dir: Path) -> object:
        if dir == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    return folder


def refused(flag: str, place: Path) -> str:
    return f"bench_infer.py: {flag} {place} cannot be written (Permission denied); name another\n"


def test_prompts_for_a_read_only_folder_name_the_flag(read_only: Path, run: Run) -> None:
    out = read_only / "p.txt"
    code, _, err = run("prompts", "--out", out, "--count", 1, "--tokens", 8)
    assert (code, err) == (2, refused("--out", out))


@pytest.mark.parametrize("name", ["", "new/deeper"])
def test_a_sweep_for_a_read_only_folder_names_the_flag(read_only: Path, run: Run, name: str) -> None:
    code, _, err = run("sweep", "--out-dir", read_only / name, "--mode", "full")
    assert (code, err) == (2, refused("--out-dir", read_only / name))


@pytest.mark.parametrize(("flag", "name"), [("--out", "r.html"), ("--png", "")])
def test_a_report_for_a_read_only_folder_names_the_flag(
    read_only: Path, run: Run, tmp_path: Path, measured: Mapping[str, Any], flag: str, name: str
) -> None:
    result = stored(tmp_path / "r" / "r.json", measured)
    code, _, err = run("report", result, "--out", tmp_path / "r.html", flag, read_only / name)
    assert (code, err) == (2, refused(flag, read_only / name))
