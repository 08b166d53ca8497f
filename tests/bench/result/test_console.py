"""Progress: one line on a terminal, a line every 30 s in a log, and no part in what is timed."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.result import console
from bench.result.console import ConsoleReporter
from bench_infer import command_line as main
from wsm.stop import Stopped


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """stderr, drawn to often; called by each test itself, since pytest sets stderr anew after the fixtures."""
    made = Terminal()
    monkeypatch.setattr("sys.stderr", made)
    monkeypatch.setattr(console, "DRAWN_S", 0.01)
    monkeypatch.setenv("COLUMNS", "120")
    return made


def wait_for(text: str, shown: Callable[[], str]) -> str:
    """What is shown, once ``text`` is in it."""
    deadline, found = time.monotonic() + 20, shown()
    while text not in found and time.monotonic() < deadline:
        time.sleep(0.005)
        found += shown()
    assert text in found
    return found


def reporter(*, bars: bool = True) -> ConsoleReporter:
    return ConsoleReporter(quiet=False, verbose=False, bars=bars)


def prefill_of(tokens: int) -> str:
    return "" if tokens else "prefill, layer 2 of 4"


def test_a_terminal_shows_the_innermost_of_what_is_being_done(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    shown = reporter()
    with shown.bar(4, "layer", "loading") as advance:
        advance(1)
        wait_for("loading:  25%", terminal.getvalue)
        with shown.doing("probing"):
            wait_for("probing [00:00]", terminal.getvalue)
        advance(1)
        wait_for("loading:  50%", terminal.getvalue)
    assert terminal.getvalue().endswith("\r\033[K")  # and the line is gone
    assert "\n" not in terminal.getvalue()


def test_a_round_shows_its_prefill_and_then_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    with reporter().bar(8, "tok", "round 1/2", prefill_of) as advance:
        wait_for("round 1/2: prefill, layer 2 of 4 [00:00]", terminal.getvalue)
        advance(1)
        wait_for("round 1/2:  12%", terminal.getvalue)
        wait_for("1/8 [00:00<?", terminal.getvalue)


def test_a_log_gets_a_line_at_most_every_so_often(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "LOGGED_S", 0.2)
    since, shown = time.monotonic(), reporter()
    with shown.bar(8, "tok", "round 1/1", prefill_of) as advance:
        found = wait_for("[PROGRESS] round 1/1: prefill, layer 2 of 4 [00:00]\n", lambda: capsys.readouterr().err)
        advance(2)
        found += wait_for("[PROGRESS] round 1/1:  25% 2/8 [", lambda: capsys.readouterr().err)
    for _ in range(20):  # however many things are begun and ended meanwhile
        with shown.doing("something short"):
            pass
    found += capsys.readouterr().err
    assert found.count("[PROGRESS]") <= (time.monotonic() - since) / 0.2


def test_thirty_seconds_lie_between_two_lines_of_a_log() -> None:
    assert console.LOGGED_S == 30


def test_a_run_that_is_stopped_says_how_long_each_thing_had_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    shown = ConsoleReporter(quiet=False, verbose=False, bars=False)
    for seconds in (2, 0.5):
        with shown.doing("planning"):
            clock[0] += seconds
    for number in (1, 2):
        with shown.bar(1, "tok", f"round {number}/2"):
            clock[0] += 3
    assert capsys.readouterr().out == ""

    def take_memory() -> None:
        clock[0] += 4
        raise Stopped(2)

    with pytest.raises(Stopped), shown.bar(1, "layer", "loading"), shown.doing("taking memory"):
        take_memory()
    times = "planning 2.5 s; round 6.0 s; loading 4.0 s (of these taking memory 4.0 s)"
    assert capsys.readouterr().out == f"[INFO] stopped; times so far: {times}\n"


def test_a_run_that_fails_or_ends_well_says_nothing_of_its_times(capsys: pytest.CaptureFixture[str]) -> None:
    shown = ConsoleReporter(quiet=False, verbose=False, bars=False)
    with pytest.raises(ValueError, match="bad"), shown.doing("planning"):
        raise ValueError("bad")
    assert capsys.readouterr().out == ""


def test_the_time_left_is_that_of_decode_passes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    task = console._Task("round 1/1", 32, "tok", lambda done: "")
    now += 60  # the prefill
    task.advance(1)
    assert task.meter(0) == "round 1/1:   3% 1/32 [01:00<?, ?tok/s]"
    now += 20
    task.advance(10)
    assert task.meter(0) == "round 1/1:  34% 11/32 [01:20<00:42,  2.00s/tok]"


def test_bytes_are_told_with_a_prefix() -> None:
    task = console._Task("packing", 2_000_000_000, "B", lambda done: "")
    task.advance(500_000_000)
    assert task.meter(0).startswith("packing:  25% 500M/2.00G [00:00<")


def test_nothing_is_drawn_by_the_thread_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    drawn_by = set[int]()
    write = terminal.write
    terminal.write = lambda text: (drawn_by.add(threading.get_ident()), write(text))[1]  # type: ignore[method-assign]
    with reporter().bar(10_000, "tok", "round 1/1") as advance:
        for _ in range(10_000):
            advance(1)
        wait_for("10000/10000", terminal.getvalue)
    assert drawn_by
    assert threading.get_ident() not in drawn_by


def test_without_a_thread_or_a_stream_the_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)

    def full(text: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(terminal, "write", full)
    with reporter().bar(2, "tok", "round 1/1") as advance:
        advance(1)
        time.sleep(0.05)

    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    with reporter().bar(2, "tok", "round 1/1") as advance:
        advance(1)
    monkeypatch.setattr("sys.stderr", None)
    with reporter().bar(2, "tok", "round 1/1") as advance:
        advance(1)


def test_a_line_of_the_log_takes_the_place_of_the_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal, shown = terminal_of(monkeypatch), reporter()
    with shown.bar(2, "tok", "round 1/1"):
        wait_for("round 1/1", terminal.getvalue)
        monkeypatch.setattr(shown, "_clear", lambda: print("(cleared)"))
        shown.say("[INFO] a line")
    assert "(cleared)\n[INFO] a line\n" in capsys.readouterr().out


def test_quiet_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    with reporter(bars=False).bar(8, "tok", "round 1/1") as advance:
        advance(1)
        time.sleep(0.05)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("quiet", [False, True])
def test_a_run_shows_what_it_does_unless_it_is_told_not_to(
    quiet: bool, monkeypatch: pytest.MonkeyPatch, measured_files: tuple[Path, Path], tmp_path: Path
) -> None:
    terminal = terminal_of(monkeypatch)
    flags = ["--device", "cpu", "--cache-dir", str(measured_files[0].parent / "cache"), "-p", "64", "-n", "4"]
    argv = [*flags, "--no-probe", "--out-json", str(tmp_path / "r.json"), *["--quiet"] * quiet]
    assert main(argv) == 0
    shown = terminal.getvalue()
    assert shown == "" if quiet else all(part in shown for part in ("warm-up 1/1", "round 1/1"))
