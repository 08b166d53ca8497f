"""The campaign in its short form, and that its judge finds what it is there to find."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.families import FAMILIES
from tests.faults.runner import Fault, Ran, Step, Worker, judged, run_campaign

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
    ("ran", "wrong"),
    [
        (Ran(0, "fine", ""), None),
        (Ran(2, "", "bench_infer.py: a sentence\n"), None),
        (Ran(2, "", ""), "0 sentences"),
        (Ran(4, "", "one\ntwo\n"), "2 sentences"),
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
