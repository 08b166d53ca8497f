"""The verb ``cache``: it tells what this program left, clears what is named, never what is in use or not its own."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from pathlib import Path

import pytest

from bench.cli.cache import entries_of
from bench_infer import command_line as main
from tests.stores import checkpoint
from wsm.store.cache import cached_store, store_path

HEX = "0123456789abcdef"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A packed store, last used 40 days ago, ceilings, the built-in model, leftovers, and files of somebody else."""
    import torch

    folder = tmp_path / "cache"
    cached_store(checkpoint(), torch.bfloat16, folder, say=lambda line: None, progress=lambda total: lambda n: None)
    (folder / f"ceilings.{HEX}.json").write_text("{}")
    (folder / f"ceilings-{HEX}.json").write_text("{}")
    (folder / "builtin-v1").mkdir()
    (folder / "builtin-v1" / "config.json").write_text("{}")
    (folder / f".r.json.{HEX}{HEX}.tmp").write_text("half")
    (folder / f"gone-{HEX}.wsm").write_bytes(bytes(8192))
    (folder / "thesis.json").write_text("mine")
    (folder / "photos").mkdir()
    for path in folder.iterdir():
        if path.suffix in (".wsm", ".json", ".lock", ".tmp"):
            os.utime(path, (time.time() - 40 * 86400,) * 2)
    os.utime(folder / f"ceilings.{HEX}.json")
    return folder


def store_of(cache: Path) -> Path:
    import torch

    return store_path(checkpoint(), torch.bfloat16, cache)


def test_it_lists_what_is_there_with_size_age_and_last_use(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "list", "--cache-dir", str(cache)]) == 0
    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if line.startswith(store_of(cache).stem)]
    assert "packed " in line
    assert " in bfloat16 " in line
    assert line.count("40 d ago") == 2
    assert out.count("left over") == 3
    assert "built-in model" in out
    assert "ceilings of a machine" in out
    assert "thesis" not in out
    assert "photos" not in out
    assert "6 in " in out.splitlines()[-1]


def test_a_use_is_seen_and_to_list_is_none(cache: Path) -> None:
    import torch

    def used() -> float:
        return next(entry.used for entry in entries_of(cache) if entry.name == store_of(cache).stem)

    before = used()
    assert main(["cache", "list", "--cache-dir", str(cache)]) == 0
    assert used() == before
    cached_store(checkpoint(), torch.bfloat16, cache, say=lambda line: None, progress=lambda total: lambda n: None)
    assert used() > before + 86400


def test_it_clears_what_is_named_and_nothing_else(cache: Path) -> None:
    others = {path.name for path in cache.iterdir() if not path.name.startswith(store_of(cache).stem)}
    assert main(["cache", "clear", store_of(cache).stem, "--yes", "--cache-dir", str(cache)]) == 0
    assert {path.name for path in cache.iterdir()} == others


def test_it_clears_by_age(cache: Path) -> None:
    assert main(["cache", "clear", "--older-than", "39", "--yes", "--cache-dir", str(cache)]) == 0
    assert {path.name for path in cache.iterdir()} == {f"ceilings.{HEX}.json", "builtin-v1", "thesis.json", "photos"}


def test_all_is_all_of_ours(cache: Path) -> None:
    assert main(["cache", "clear", "--all", "--yes", "--cache-dir", str(cache)]) == 0
    assert {path.name for path in cache.iterdir()} == {"thesis.json", "photos"}


def test_what_a_process_uses_stays(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (store_of(cache), store_of(cache).with_suffix(".lock")):  # a run, and a pack
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            assert main(["cache", "clear", "*", "--yes", "--cache-dir", str(cache)]) == 0
            assert f"{store_of(cache).stem} is in use and stays" in capsys.readouterr().out
            assert store_of(cache).exists()
            assert main(["cache", "list", "--cache-dir", str(cache)]) == 0
            assert "in use" in capsys.readouterr().out
    (cache / f".r.json.{HEX}{HEX}.tmp").write_text("being written just now")
    assert main(["cache", "clear", "--all", "--yes", "--cache-dir", str(cache)]) == 0
    assert (cache / f".r.json.{HEX}{HEX}.tmp").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["clear"], "say what"),
        (["clear", "none*", "--yes"], "nothing in .* is called none"),
        (["clear", "--all"], "no terminal to ask on"),
        (["clear", "x", "--all"], "exclude each other"),
        (["tidy"], "cache tidy is not known"),
    ],
)
def test_what_it_does_not_do_is_said(
    cache: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(cache.rglob("*"))
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    assert main(["cache", *words, "--cache-dir", str(cache)]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert sorted(cache.rglob("*")) == before


def test_a_manifest_that_is_damaged_makes_it_a_leftover(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = store_of(cache).with_suffix(".json")
    for content in ("{", "[]", json.dumps({"model": {}, "dtype": "bfloat16"})):
        manifest.write_text(content)
        assert main(["cache", "list", "--cache-dir", str(cache)]) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith(store_of(cache).stem)]
        assert "left over" in line


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"[" * 100_000])
def test_a_damaged_manifest_in_the_cache_is_packed_anew(cache: Path, content: bytes) -> None:
    import torch

    store_of(cache).with_suffix(".json").write_bytes(content)
    packed: list[str] = []
    found = cached_store(checkpoint(), torch.bfloat16, cache, say=packed.append, progress=lambda total: lambda n: None)
    assert len(packed) == 1
    assert found.path == store_of(cache).with_suffix(".json")


def test_without_a_flag_it_lists_the_directory_that_runs_fill(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache.parent / ".cache").mkdir()
    cache.rename(cache.parent / ".cache" / "wsm-bench")
    monkeypatch.setenv("HOME", str(cache.parent))
    assert main(["cache", "list"]) == 0
    assert "builtin-v1" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["list"], ["clear", "--all"]])
def test_a_cache_directory_that_is_not_there_is_an_error_where_it_was_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    assert main(["cache", *words, "--cache-dir", str(tmp_path / "typo")]) == 2
    assert f"--cache-dir {tmp_path / 'typo'} does not exist: name the one that runs" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["cache", *words]) == 0
    assert f"{tmp_path / '.cache/wsm-bench'} does not exist: no run has kept" in capsys.readouterr().out
