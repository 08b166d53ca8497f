"""A drive that does not answer any more: the run ends in limited time, with every round that was finished."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.run import job, measure
from bench_infer import command_line
from wsm import stop, threads
from wsm.store.packed_store import PackedStore

RUN = ["--device", "cpu", "--no-probe", "--ignore-eos", "--temperature", "0", "--prompt-len", "8"]


class EndedAtOnce(Exception):
    """In place of the process's end."""


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Answers while it is set."""
    answers, real = threading.Event(), PackedStore._read
    answers.set()

    def read(*args: Any) -> None:
        answers.wait()
        real(*args)

    monkeypatch.setattr(PackedStore, "_read", read)
    monkeypatch.setattr(threads, "JOIN_S", 0.2)
    yield answers
    answers.set()
    for thread in threading.enumerate():
        if thread.name.startswith(("wsm-io-", "wsm-wait")):
            thread.join(5)


def test_finished_rounds_are_kept_where_a_thread_is_stuck_on_the_drive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, drive: threading.Event
) -> None:
    real, rounds, ended = measure.run_round, list[object](), list[tuple[int, str | None]]()

    def run_round(*args: Any, **named: Any) -> Any:
        if len(rounds) == 1 + 2:  # behind the warm-up
            drive.clear()
            threading.Timer(0.3, stop.ask, [signal.SIGTERM]).start()
        rounds.append(real(*args, **named))
        return rounds[-1]

    def end_at_once(code: int, sentence: str | None) -> None:
        ended.append((code, sentence))
        raise EndedAtOnce

    monkeypatch.setattr(measure, "run_round", run_round)
    monkeypatch.setattr(job, "_end_at_once", end_at_once)
    out = tmp_path / "r.json"
    with pytest.raises(EndedAtOnce):
        command_line(
            [*RUN, "--max-new-tokens", "2", "--repeats", "9", "--out-json", str(out), "--cache-dir", str(tmp_path)]
        )
    assert "did not end within 0.2 s" in str(ended[0][1])
    result = json.loads(out.read_text())
    assert (result["interrupted"], result["repeats"]["n"]) == (True, 2)
    assert any("did not end within" in warning for warning in result["warnings"])
