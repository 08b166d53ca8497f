"""A model that fits beside the SSD: what is said, what is packed, and what the result calls itself."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench_infer import command_line as main

FLAGS = ["--device", "cpu", "--prompt-len", "8", "--max-new-tokens", "3", "--ignore-eos", "--no-probe"]
LAYERS = 48
"""Of the built-in model, 4 of them on the GPU at the defaults."""
Run = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: object) -> tuple[dict[str, Any], str]:
        out = tmp_path / "r.json"
        argv = (*FLAGS, "--cache-dir", tmp_path / "cache", "--out-json", out, *argv)
        assert main([str(word) for word in argv]) == 0
        return json.loads(out.read_text(encoding="utf-8")), capsys.readouterr().out

    return run


def packed(tmp_path: Path) -> list[Path]:
    return [*(tmp_path / "cache").glob("*.wsm")]


@pytest.mark.parametrize(
    ("places", "way", "same_as"),
    [
        (["--cpu-cache-layers", "44"], "CPU(pinned) -> GPU", "stream"),
        (["--cpu-cache-layers", "99", "--gpu-cached-layers", "20"], "CPU(pinned) -> GPU", "stream"),
        (["--gpu-cached-layers", "60"], "GPU", "preload"),
    ],
)
def test_mixed_without_a_layer_on_the_ssd_says_what_it_is_and_packs_nothing(
    run: Run, tmp_path: Path, places: list[str], way: str, same_as: str
) -> None:
    result, said = run(*places)
    assert f"({way} by layer)" in said
    assert "use_raw_ssd" not in said
    assert "SSD backend" not in said
    assert packed(tmp_path) == []
    [warning] = [line for line in result["warnings"] if "no layer is left for the SSD" in line]
    assert f"equals --mode {same_as}, " in warning
    assert f"[INFO] {warning}" in said  # before the run, too
    assert result["wsm"]["ssd_enabled"] is False
    assert result["residency"]["ssd"]["layers"] == 0
    same, _ = run(*places, "--mode", same_as)
    assert same["output"]["sha256"] == result["output"]["sha256"]


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
@pytest.mark.parametrize(
    "places", [[], ["--gpu-cached-layers", 1], ["--gpu-cached-layers", 0, "--cpu-cache-layers", 9]]
)
def test_what_is_named_to_stream_from_the_ssd_can_be_given(
    layers: int, places: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*more: object) -> str:
        shape = ["--synthetic", f"Llama-3.2-1B:layers={layers}", "--cache-dir", tmp_path, "--out-json", os.devnull]
        assert main([str(word) for word in ("plan", *shape, *FLAGS, *more)]) == 0
        return capsys.readouterr().out

    found = said(*places)
    assert "no layer is left for the SSD" in found
    if layers == 1:
        assert "one layer is too few to stream from it" in found
        return
    most = dict(re.findall(r"at most (\d+) (--\S+)", found))
    flags = {flag: int(value) for value, flag in most.items()}
    if "fewer --cpu-cache-layers than are then left" in found:
        flags["--cpu-cache-layers"] = layers - flags["--gpu-cached-layers"] - 1
    given = [word for flag, value in flags.items() for word in (flag, value)]
    assert "no layer is left for the SSD" not in said(*places, *given)


def test_stream_with_all_layers_on_the_gpu_says_that_nothing_streams(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, said = run("--mode", "stream", "--gpu-cached-layers", LAYERS)
    [warning] = [line for line in result["warnings"] if "no layer is left to stream" in line]
    assert "all 48 are on the GPU, so this run equals --mode preload" in warning
    assert f"[INFO] {warning}" in said
    assert result["phases"]["decode"]["bytes"]["weight_h2d"] == 0
    same, _ = run("--mode", "preload")
    assert same["output"]["sha256"] == result["output"]["sha256"]
    assert not [line for line in run("--mode", "stream")[0]["warnings"] if "left to stream" in line]
    argv = ["plan", "--device", "cpu", "--prompt-len", "8", "--mode", "stream", "--cache-dir", str(tmp_path)]
    assert main([*argv, "--gpu-cached-layers", "48"]) == 0
    assert "[INFO] no layer is left to stream" in capsys.readouterr().out


def test_mixed_with_a_layer_on_the_ssd_is_packed_and_warns_of_nothing(run: Run, tmp_path: Path) -> None:
    result, said = run("--cpu-cache-layers", "43")
    assert "(SSD -> CPU(pinned) -> GPU by layer)" in said
    assert len(packed(tmp_path)) == 1
    assert not [line for line in result["warnings"] if "SSD" in line]
    assert result["wsm"]["ssd_enabled"] is True


def test_a_window_that_holds_all_layers_reads_no_store(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fifo` with as many slots as layers: each is read once, so nothing has to be packed for it."""
    result, said = run("--cpu-cache-layers", "43")
    for store in packed(tmp_path):
        store.unlink()
    monkeypatch.setenv("WSM_CPU_EVICT", "fifo")
    fifo, said = run("--cpu-cache-layers", "44")
    assert "(CPU(pinned) -> GPU by layer)" in said
    assert packed(tmp_path) == []
    assert fifo["output"]["sha256"] == result["output"]["sha256"]
    assert fifo["phases"]["decode"]["bytes"]["ssd_read"] == 0


def test_a_named_store_is_read_although_nothing_streams_from_it(run: Run, tmp_path: Path) -> None:
    store, manifest = tmp_path / "s.wsm", tmp_path / "s.json"
    pack = ["pack", "--to", str(store), "--manifest", str(manifest), "--cache-dir", str(tmp_path / "cache")]
    assert main(pack) == 0
    result, said = run("--cpu-cache-layers", "44", "--manifest", manifest)
    assert "(CPU(pinned) -> GPU by layer)" in said
    assert result["load"]["read_bytes"] > 0
    assert packed(tmp_path) == []


def test_the_values_in_force_are_those_after_clipping(run: Run) -> None:
    resolved = run("--gpu-cached-layers", "6", "--cpu-cache-layers", "99")[0]["config"]["resolved"]
    assert (resolved["gpu_cached_layers"], resolved["cpu_cache_layers"]) == (6, LAYERS - 6)
    result, said = run("--cpu-cache-layers", "3", "--warmup-layers", "20")
    resolved = result["config"]["resolved"]
    assert "--prefetch-distance 6 clipped to 3" in said
    assert (resolved["prefetch_distance"], resolved["cpu_cache_layers"]) == (3, 3)
    assert resolved["warmup_layers"] < 20
    assert f"--warmup-layers 20 clipped to {resolved['warmup_layers']}" in said


def test_plan_says_so_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--device", "cpu", "--prompt-len", "8", "--cpu-cache-layers", "44"]
    assert main([*argv, "--cache-dir", str(tmp_path)]) == 0
    assert "note: no layer is left for the SSD: all 48 are on the GPU or in CPU memory" in capsys.readouterr().out
