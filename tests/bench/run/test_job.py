"""Signals are wishes that a command answers between two pieces of work; its end tells which signal it was."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench.run import signals
from bench.run.job import Job
from llama.parallel.watch import Ending
from wsm import stop
from wsm.settings import Ranks
from wsm.stop import Stopped


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in signals.ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.ENDING)
def test_a_signal_raises_where_somebody_looks_and_nowhere_else(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)  # not ignored, as under nohup
    with signals.heard():
        signal.raise_signal(number)
        with stop.held():
            stop.check()
        with pytest.raises(Stopped) as stopped:
            stop.check()
        stop.check()  # answered once
    assert signals.exit_code(stopped.value.number) == {1: 129, 2: 130, 15: 143}[number]


def test_a_wish_that_nobody_answered_does_not_end_the_next_command() -> None:
    with signals.heard():
        signal.raise_signal(signal.SIGTERM)
    stop.check()


def test_a_signal_that_was_ignored_at_the_start_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with signals.heard():
        signal.raise_signal(signal.SIGHUP)
        stop.check()


def ended(code: str) -> tuple[int, str]:
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return got.returncode, got.stderr


def test_while_modules_are_imported_a_signal_ends_the_process_at_once() -> None:
    code, err = ended(
        "import signal\nfrom bench.run import signals\nwith signals.heard(), signals.importing():\n"
        "    signal.raise_signal(signal.SIGINT)\n    print('went on')"
    )
    assert (code, err) == (130, "bench_infer.py: interrupted; nothing was begun\n")


def test_a_second_ctrl_c_after_a_while_ends_a_command_that_is_stuck() -> None:
    code, err = ended(
        "import signal\nfrom bench.run import signals\nsignals.PATIENCE_S = 0.05\nwith signals.heard():\n"
        "    signal.raise_signal(signal.SIGINT)\n    signal.raise_signal(signal.SIGINT)\n"
        "    import time; time.sleep(0.1)\n    print('stuck', flush=True)\n    signal.raise_signal(signal.SIGINT)\n"
    )
    assert (code, err) == (130, "bench_infer.py: ended at once, after the second signal\n")


def test_a_rank_whose_capture_failed_with_a_collective_waits_to_hear_who_is_to_blame() -> None:
    """torch says on the way out that the capture is invalid; the rank that failed may be heard of a second later."""
    from llama.parallel.ranks import CollectiveBroken

    late = Ending(1, "here", "out of memory", 3)
    job = Job(Ranks(rank=0, size=2))
    watch = SimpleNamespace(wait_for_failure=lambda seconds: late, failure=None)
    job._joined = cast(Any, SimpleNamespace(watch=watch))
    invalid = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    invalid.__context__ = CollectiveBroken("a collective failed: NCCL communicator was aborted")
    assert job._cause(invalid) == late
    assert job._cause(RuntimeError("a fault of our own")) is None
