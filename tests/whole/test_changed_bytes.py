"""Bytes that change under a run, after they were right once, end it: never tokens. And what lives does not grow."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.run import measure
from tests.stores import flip
from tests.whole.conftest import Run
from tests.whole.test_cli import sentence
from wsm.layout.groups import BLOCK
from wsm.store.packed_store import PackedStore

TINY = ["--device", "cpu", "--no-probe", "--ignore-eos", "--temperature", 0]
BUILT_IN = [*TINY, "--prompt-len", 8, "--max-new-tokens", 3]


def after_warm_up(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """Do it when every group was read and checked, before the first timed round."""
    real = measure.warm_up

    def then_change(*args: Any, **more: Any) -> None:
        real(*args, **more)
        change()

    monkeypatch.setattr(measure, "warm_up", then_change)


@pytest.mark.parametrize("rule", [(), ("--verify-weights",), ("--verify-weights", "always")])
def test_a_store_that_changes_after_its_first_right_read_is_exit_4(
    rule: tuple[str, ...], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change() -> None:
        (manifest,) = (tmp_path / "cache").glob("builtin*.json")
        for group in json.loads(manifest.read_text())["groups"]:
            flip(manifest.with_suffix(".wsm"), group["offset"] + 1000)

    after_warm_up(monkeypatch, change)
    code, out, err = run(*BUILT_IN, "--cache-dir", tmp_path / "cache", "--out-json", tmp_path / "r.json", *rule)
    assert code == 4
    assert "does not match its checksum" in sentence(err)
    assert "Summary" not in out
    assert not (tmp_path / "r.json").exists()


def test_a_round_that_fails_loses_none_of_those_before_it(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, rounds = measure.run_round, 0

    def then_change(*args: Any, **more: Any) -> Any:
        nonlocal rounds
        rounds += 1
        if rounds == 1 + 3:  # behind the warm-up
            (manifest,) = (tmp_path / "cache").glob("builtin*.json")
            for group in json.loads(manifest.read_text())["groups"]:
                flip(manifest.with_suffix(".wsm"), group["offset"] + 1000)
        return real(*args, **more)

    monkeypatch.setattr(measure, "run_round", then_change)
    out = tmp_path / "r.json"
    code, _, err = run(
        *BUILT_IN, "--cache-dir", tmp_path / "cache", "--out-json", out, "--repeats", 5, "--verify-weights", "always"
    )
    assert code == 4
    assert "does not match its checksum" in sentence(err)
    result = json.loads(out.read_text())
    assert (result["interrupted"], result["repeats"]["n"]) == (True, 2)
    assert any("round 3 failed" in warning for warning in result["warnings"])


def test_what_hangs_at_the_end_loses_no_finished_round(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PackedStore.close

    def hang(store: PackedStore) -> None:
        real(store)
        raise RuntimeError("wsm-io-0 did not end within 30 s")

    monkeypatch.setattr(PackedStore, "close", hang)
    out = tmp_path / "r.json"
    code, said, err = run(*BUILT_IN, "--cache-dir", tmp_path / "cache", "--out-json", out, "--repeats", 2)
    assert (code, sentence(err)) == (1, "bench_infer.py: wsm-io-0 did not end within 30 s\n")
    assert f"is in {out}" in said
    result = json.loads(out.read_text())
    assert result["repeats"]["n"] == 2
    assert result["phases"]["decode"]["bytes_moved"]["ssd_read"] > 0
    assert "the end of the run failed: wsm-io-0 did not end within 30 s" in result["warnings"]


def test_a_store_that_is_packed_anew_under_a_run_is_exit_4_also_where_only_first_reads_are_checked(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change() -> None:
        (store,) = (tmp_path / "cache").glob("*.wsm")
        with store.open("r+b") as file:
            file.write(bytes(BLOCK))  # what packing does first

    after_warm_up(monkeypatch, change)
    places = ["--cache-dir", tmp_path / "cache", "--out-json", tmp_path / "r.json"]
    code, _, err = run(*BUILT_IN, *places, "--verify-weights", "first")
    assert code == 4
    assert "bears no packed store" in sentence(err)
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(("rule", "checked"), [("first", False), ("always", True)])
def test_the_result_says_which_rule_was_in_force_and_what_it_cost(
    rule: str, checked: bool, tmp_path: Path, run: Run
) -> None:
    places = ["--cache-dir", tmp_path / "cache", "--out-json", tmp_path / "r.json"]
    assert run(*BUILT_IN, *places, "--verify-weights", rule)[0] == 0
    result = json.loads((tmp_path / "r.json").read_text())
    found, read = result["checks"], result["plan"]["bytes_per_pass"]["ssd_read"]
    assert found["rule"] == result["config"]["resolved"]["verify_weights"] == rule
    assert found["bytes_per_pass"] == pytest.approx(read if checked else 0, rel=0.5)
    assert (found["ms_per_pass"] > 0) is checked


def test_what_lives_after_30_rounds_is_what_lives_after_3(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records, events, futures, threads' locks: of all kinds of objects but the rounds' own figures."""
    real, counts = measure.run_round, list[Counter[str]]()  # the first is of the warm-up

    def counted(*args: Any, **more: Any) -> measure.Round:
        done = real(*args, **more)
        looked = len(counts) in (3, 30)
        if looked:
            gc.collect()
        counts.append(Counter(type(each).__name__ for each in gc.get_objects()) if looked else Counter())
        return done

    monkeypatch.setattr(measure, "run_round", counted)
    places = ["--cache-dir", tmp_path / "cache", "--out-json", tmp_path / "r.json"]
    assert run(*TINY, "--prompt-len", 8, "--max-new-tokens", 2, "--repeats", 31, *places)[0] == 0
    early, late = counts[3], counts[30]
    kinds = ("CpuEvent", "Event", "Transfer", "Use", "KVTransfer", "ChunkRead", "partial", "Future", "_Job", "Slot")
    assert {kind: late[kind] - early[kind] for kind in kinds if late[kind] > early[kind] + 50} == {}
    assert sum(late.values()) - sum(early.values()) < 27 * 100, "a round's own figures are a few dozen objects"
