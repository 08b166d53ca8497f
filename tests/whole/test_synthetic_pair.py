"""A run with a draft of known agreement: its figures, and the same tokens without the draft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench_infer import command_line as main
from llama.config import PRESETS, ModelConfig

TARGET = ModelConfig("tiny", 64, 2, 4, 2, 16, 176, 1000)
DRAFT = ModelConfig("draft", 512, 1, 8, 2, 64, 512, 1000)
WORK = ["--synthetic", "tiny:cycle", "--dtype", "float32", "--prompt-len", "8", "--max-new-tokens", "256", "--no-probe"]
WORK += [
    "--device",
    "cpu",
    "--mode",
    "stream",
    "--gpu-cached-layers",
    "1",
    "--temperature",
    "0",
    "--warmup-rounds",
    "0",
]
CHAIN = ["--draft-depth", "4", "--draft-width", "1", "--verify-rows", "5"]

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The result of a run with these flags, which are kept as ``name.json``."""
    for config in (TARGET, DRAFT):
        monkeypatch.setitem(PRESETS, config.name, config)

    def run(name: str, *argv: str) -> dict[str, Any]:
        out = tmp_path / f"{name}.json"
        assert main([*WORK, *argv, "--cache-dir", str(tmp_path / "c"), "--out-json", str(out)]) == 0
        return dict(json.loads(out.read_text(encoding="utf-8")))

    return run


def test_a_pair_takes_the_tokens_a_pass_that_its_agreement_gives(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drafted = run("drafted", "--draft", "synthetic:draft:agree=0.8,second=0.1", *CHAIN)
    said = capsys.readouterr().out
    found = drafted["speculation"]
    assert found["tokens_a_pass"] == pytest.approx(sum(0.8**level for level in range(5)), rel=0.1)
    assert sum(n * times for n, times in enumerate(found["row_passes"], 1)) == 255
    assert sum(found["row_passes"]) == found["passes"] == drafted["decode_forward_passes"]
    pair = found["synthetic_agreement"]
    assert (pair["realised_agree"], pair["realised_second"]) == pytest.approx((0.8, 0.1), abs=0.03)
    assert f"synthetic agreement: {pair['realised_agree']:.3f}" in said
    passes_ms = drafted["tpot_ms"]["mean"] * drafted["tpot_ms"]["n"]
    assert drafted["decode_tok_s"] == pytest.approx(255e3 / passes_ms, rel=1e-4)
    assert any("no figure here is a model's acceptance" in line for line in drafted["warnings"])

    alone = run("alone", "--verify-rows", "5")
    assert alone["speculation"] is None
    assert alone["output"]["sha256"] == drafted["output"]["sha256"]
    assert main(["compare", "--equal-outputs", *(str(tmp_path / f"{name}.json") for name in ("alone", "drafted"))]) == 0
    assert "equal: all 2 sides generated the same tokens" in capsys.readouterr().out


def test_a_tree_goes_on_where_the_second_choice_is_right(run: Run) -> None:
    tree = ["--draft-depth", "4", "--verify-rows", "16"]
    found = run("tree", "--draft", "synthetic:draft:agree=0.6,second=0.4", *tree)["speculation"]
    assert found["tokens_a_pass"] > 1.2 * sum(0.6**level for level in range(5))


def test_a_draft_that_is_never_right_gives_a_token_a_pass(run: Run) -> None:
    found = run("never", "--draft", "synthetic:draft:agree=0,second=0", *CHAIN, "--max-new-tokens", "12")["speculation"]
    assert (found["tokens_a_pass"], found["row_passes"]) == (1.0, [11])


def test_a_pair_without_the_target_s_vocabulary_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "other", ModelConfig("other", 64, 1, 4, 2, 16, 176, 999))
    assert main([*WORK, "--draft", "synthetic:other:agree=1"]) == 2
    assert "999" in capsys.readouterr().err
