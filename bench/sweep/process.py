"""One process of a sweep: ended when the sweep is, its result kept whole or not at all."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from bench.result.results import read_result
from bench.result.sweep_folder import Failure, Outcome, Point, write_json
from wsm.errors import UnusableInput

SCRIPT = Path(__file__).resolve().parents[2] / "bench_infer.py"
PATIENCE_S = 30.0
"""How long an interrupted process may take to join its threads."""
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
_PREFIX = "bench_infer.py: "


def run_point(folder: Path, point: Point, repeat: int, inner_repeats: int, environment: Mapping[str, str]) -> Outcome:
    """Run it to its end, and keep its result or why it failed.

    Raises:
        KeyboardInterrupt: after the process, interrupted as well, has ended; it then counts as not run.
    """
    place = folder / point.folder
    final, failed, log = (place / f"r{repeat}.{ending}" for ending in ("json", "failed.json", "log"))
    running = place / f".r{repeat}.running.json"
    command = [sys.executable, str(SCRIPT), "run", *point.argv, f"--repeats={inner_repeats}", f"--out-json={running}"]
    try:
        code = _wait(command, log, environment)
        if code == 0:
            result = read_result(running)
            os.replace(running, final)
            failed.unlink(missing_ok=True)
            return Outcome(point.number, repeat, result)
        failure = Failure(code, _reason(code, log))
    except UnusableInput as error:
        failure = Failure(0, str(error))
    finally:
        running.unlink(missing_ok=True)
    write_json(failed, asdict(failure))
    return Outcome(point.number, repeat, failure)


def _wait(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """The exit code; what the process printed is in ``log``."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,  # Ctrl-C comes to the sweep alone, which hands it on
            preexec_fn=_die_with_parent,
        )
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def _die_with_parent() -> None:
    """In the new process: be killed when the sweep is, so that no orphan disturbs the sweep that goes on."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _reason(code: int, log: Path) -> str:
    """The sentence that the process ended with."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    sentences = [line.removeprefix(_PREFIX) for line in lines if line.startswith(_PREFIX)]
    if sentences:
        return sentences[-1]
    if code < 0:
        hint = ": the kernel kills what takes too much memory" if -code == signal.SIGKILL else ""
        return f"killed by signal {signal.Signals(-code).name}{hint}"
    return next((line for line in reversed(lines) if line), "it said nothing")
