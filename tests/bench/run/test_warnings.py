"""What a run warns of: cut prompts, rounds that differ, ceilings that are missing or varied."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from bench.result.types_phases import Phase
from bench.run.warnings import disturbed_ceilings, steadiness_warnings, unmeasured
from bench_infer import command_line
from tests.results import typed, varied
from wsm.plan.time import Ceiling

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, list[str]]]:
    """A short run of the built-in model: what it said on stderr, and the result's warnings."""

    def run(*argv: str) -> tuple[str, list[str]]:
        flags = ["--device", "cpu", "--cache-dir", str(tmp_path / "c"), "--out-json", str(tmp_path / "r.json")]
        capsys.readouterr()
        assert command_line([*flags, "-n", "2", "--warmup-rounds", "0", *argv]) == 0
        return capsys.readouterr().err, json.loads((tmp_path / "r.json").read_text())["warnings"]

    return run


def test_a_prompt_that_is_cut_is_a_warning_of_the_result(run: Callable[..., tuple[str, list[str]]]) -> None:
    flags = ["--mode", "full", "--no-probe", "--max-seq-len", "12", "-o", "csv", "-p"]
    cut = "1 of 1 prompt cut to the last 10 tokens (the longest had 50; --max-seq-len 52 keeps it whole)"
    err, warnings = run(*flags, "50")
    assert cut in warnings
    assert f"[WARNING] {cut}\n" in err
    err, warnings = run(*flags, "10")
    assert "cut to" not in err + "".join(warnings)


# -- rounds


def test_a_first_round_that_was_faster_was_not_a_cold_one() -> None:
    [line] = steadiness_warnings([60.0, 101, 99, 100, 100])
    assert line.startswith(
        "the first round took 60.0 ms, the median of the others is 100.0 ms: later rounds were slower"
    )
    assert "warm" not in line


# -- ceilings


def phases(measured: Mapping[str, Any], **changed: Any) -> dict[str, Phase]:
    return msgspec.structs.asdict(typed(varied(measured, **changed)).phases)


@pytest.mark.parametrize(("spread", "warned"), [(2404.0, True), (25.1, True), (25.0, False), (None, False)])
def test_a_floor_from_a_ceiling_that_varied_is_warned_of(
    measured: Mapping[str, Any], spread: float | None, warned: bool
) -> None:
    decode = {"bound_by": "compute", "floor_ms": 1.0, "roofline_pct": 50.0, "ceiling_spread_pct": spread}
    whole = {"prefill": measured["phases"]["prefill"] | {"ceiling_spread_pct": None}}
    whole["decode"] = measured["phases"]["decode"] | decode
    lines = list(disturbed_ceilings(phases(measured, phases=whole)))
    assert len(lines) == warned
    for line in lines:
        assert line.startswith(f"decode: the ceiling of matmul, behind this floor, varied by {spread:.0f} % while")
        assert line.endswith("roofline_pct are doubtful; measure again on a quiet machine")


def test_one_ceiling_behind_both_floors_is_one_warning(measured: Mapping[str, Any]) -> None:
    varied_too_much = {"bound_by": "hbm", "floor_ms": 1.0, "roofline_pct": 50.0, "ceiling_spread_pct": 40.0}
    whole = {name: phase | varied_too_much for name, phase in measured["phases"].items()}
    [line] = disturbed_ceilings(phases(measured, phases=whole))
    assert line.startswith("prefill and decode: the ceiling of hbm, behind these floors, varied by 40 %")


def test_a_run_whose_ceilings_varied_says_so(
    run: Callable[..., tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"hbm": ("MBps", 1e6), "matmul": ("TFLOPs", 1e3)}
    found = {name: Ceiling(rate, rate, unit, 2404.0, "told") for name, (unit, rate) in rates.items()}
    monkeypatch.setattr("bench.run.ceilings.probe", lambda llm: found)
    _, warnings = run("--mode", "full", "-p", "8")
    assert any("varied by 2404 % while it was measured" in line for line in warnings)


def test_without_a_probe_the_cache_lacks_this_model_in_this_mode_not_this_hardware(
    run: Callable[..., tuple[str, list[str]]],
) -> None:
    run("--mode", "full", "-p", "8")  # this hardware's ceilings are in the cache now
    _, warnings = run("--mode", "stream", "-p", "8", "--no-probe")
    [line] = [line for line in warnings if "--no-probe" in line]
    assert line.startswith("no ceilings (--no-probe, and the cache has none of this model in this mode with these bud")
    assert "run it once without --no-probe" in line


def test_a_ceiling_that_alone_is_missing_is_named(measured: Mapping[str, Any]) -> None:
    """Those that varied are not kept: a cache may have the rest."""
    unknown = {name: phase | {"floor_ms": None, "bound_by": None} for name, phase in measured["phases"].items()}
    found = phases(measured, phases=unknown)
    known = {name: Ceiling(1.0, 1.0, "MBps", 1.0, "") for name in ("hbm", "matmul", "ssd")}
    [line] = unmeasured(CUDA, known, found, no_probe=True)
    assert line.startswith("no ceiling of h2d (--no-probe, and the cache has none of this model")
    del known["ssd"]
    known["h2d"] = known["hbm"]
    [line] = unmeasured(CUDA, known, found, no_probe=False)
    assert line == "the SSD could not be probed in so little CPU memory: floor and roofline are not known"
    known["ssd"] = known["hbm"]
    assert list(unmeasured(CUDA, known, found, no_probe=False)) == []
    assert len(list(unmeasured(CPU, known, found, no_probe=False))) == 1
