"""The campaign in its short form, and that its judge finds what it is there to find."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.faults.families import FAMILIES
from tests.faults.quantised import another_model
from tests.faults.runner import Fault, Ran, Step, Worker, judged, run_campaign
from tests.gguf_files import CONFIG, random_tensors, write_gguf

QUIET = Step(["run"])


def test_no_fault_gives_wrong_tokens_a_hang_a_traceback_or_another_exit_code(tmp_path: Path) -> None:
    families = {}
    for name, make in FAMILIES.items():
        (tmp_path / name).mkdir()
        families[name] = make(tmp_path / name)
    report = run_campaign(families, 60, 20261127, tmp_path)
    assert not report.findings, "\n\n".join(report.findings)
    assert all(sum(counts.values()) == 10 for counts in report.outcomes.values())
    assert "| all | 60 |" in report.table()


@pytest.mark.parametrize(
    ("file", "key", "value", "another"),
    [
        ("config.json", "architectures", ["Other"], False),
        ("config.json", "rms_norm_eps", 0.1, True),
        ("quantised", "checkpoint_format", "gptq_v2", True),
        ("quantised", "damp_percent", 0.2, False),
    ],
)
def test_the_judge_knows_which_field_makes_another_model_of_quantised_files(
    file: str, key: str, value: object, another: bool, tmp_path: Path
) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"rms_norm_eps": 1, "quantization_config": {}}')
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    (config if file == "config.json" else config["quantization_config"])[key] = value
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    assert another_model(tmp_path / "one", tmp_path / "other") == another


def test_the_judge_knows_a_weight_that_was_hit_from_a_name_that_was(tmp_path: Path) -> None:
    for name in ("one", "same", "other"):
        (tmp_path / name).mkdir()
        write_gguf(tmp_path / name / "m.gguf", random_tensors(), CONFIG, fields={"general.name": "abc"})
    content = (tmp_path / "one" / "m.gguf").read_bytes()
    (tmp_path / "same" / "m.gguf").write_bytes(content.replace(b"abc", b"abd"))
    (tmp_path / "other" / "m.gguf").write_bytes(content[:-99] + bytes([content[-99] ^ 1]) + content[-98:])
    assert not another_model(tmp_path / "one", tmp_path / "same")
    assert another_model(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize(
    ("ran", "wrong"),
    [
        (Ran(0, "fine", ""), None),
        (Ran(2, "", "bench_infer.py: a sentence\n"), None),
        (Ran(2, "", ""), "0 sentences"),
        (Ran(4, "", "one\ntwo\n"), "2 sentences"),
        (Ran(2, "", "a" * 1001), "a long sentence"),
        (Ran(1, "", "bench_infer.py: it failed\n"), "exit 1"),
        (Ran(-11, "", ""), "exit -11"),
        (Ran(2, "", "Traceback (most recent call last):\n"), "traceback"),
        (Ran(None, "", "hang"), "hang"),
    ],
)
def test_the_judge_lets_pass_only_what_is_documented(ran: Ran, wrong: str | None) -> None:
    assert judged(QUIET, ran) == wrong


class WrongTokens:
    """A family whose second command is judged wrong, whatever it does."""

    def fault(self, rng: random.Random, place: Path) -> Fault:
        return Fault(
            "nothing", [Step(["--version-of-nothing"]), Step(["compare", "/none"], lambda ran: "wrong tokens")]
        )


def test_a_finding_says_what_repeats_it(tmp_path: Path) -> None:
    report = run_campaign({"wrong": WrongTokens()}, 1, 7, tmp_path, first=5)
    assert report.outcomes["wrong"] == {"findings": 1}
    assert report.findings[0].startswith("wrong 5 (seed 7): nothing\n  wrong tokens: compare /none")


def test_a_command_that_hangs_is_ended_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = Worker()
    assert worker.run(["compare", "/none"]).code == 2
    monkeypatch.setattr("tests.faults.runner.LIMIT_S", 0.0)
    assert worker.run(["compare", "/none"]) == Ran(None, "", "hang")
    monkeypatch.undo()
    assert worker.run(["compare", "/none"]).code == 2
    worker.close()
