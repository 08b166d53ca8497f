"""The verb ``sweep``: every point in processes of its own, interleaved, kept as they end, gone on with after a stop."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from bench.options.program import called
from bench.options.verb_flags import SweepOptions
from bench.result.console import ConsoleReporter
from bench.result.results import read_result
from bench.result.sweep_folder import DESCRIPTION, Failure, Outcomes, Point, outcomes_in, read_description, write_json
from bench.result.types import PASS_FIGURES, Result
from wsm import stop
from wsm.disk.atomic import check_folder, locked, nearest
from wsm.errors import UnusableInput
from wsm.settings import ECHOED_ONLY, PRESETS
from wsm.stop import Stopped
from wsm.words import counted

SCRIPT = Path(__file__).resolve().parents[2] / "bench_infer.py"
PATIENCE_S = 30.0
"""How long an interrupted process may take to join its threads."""
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
_PREFIX = "bench_infer.py: "


def run_sweep(options: SweepOptions, user_set: Sequence[str], check: Callable[[Sequence[str]], object]) -> int:
    """Run what has not been run yet; 0, or 1 if no process of the whole sweep gave a result.

    Args:
        user_set: variables that the user had set: the processes get those, and no presets of this one.
        check: parses a run's arguments; raises UnusableInput for those that no run takes, or whose files are missing.
    """
    folder, points = options.out_dir, options.sweep.points
    for point in points:
        check([*point.argv, f"--repeats={options.inner_repeats}"])
    environment = {name: v for name, v in os.environ.items() if name not in PRESETS or name in user_set}
    # All points once, then all in reverse, and so on: what drifts with time weighs on every point alike.
    rounds = [(repeat, points if repeat % 2 else points[::-1]) for repeat in range(1, options.repeats + 1)]
    jobs = [(repeat, point) for repeat, order in rounds for point in order]
    with _opened(options, _description(options, environment)):
        outcomes = outcomes_in(folder, points)
        if options.retry_failed:
            outcomes = {
                at: gave for at, gave in outcomes.items() if isinstance(gave, Result) or at[0] > options.repeats
            }
        left = [(repeat, point) for repeat, point in jobs if (repeat, point.number) not in outcomes]
        reporter = ConsoleReporter(quiet=False, verbose=options.verbose, bars=not options.quiet)
        asked = f"{counted(len(points), 'point')} x {counted(options.repeats, 'process', 'processes')}"
        reporter.say(f"[SWEEP] {asked}, {len(left)} to run, in {folder}")
        outcomes |= _run(options, left, len(jobs), environment, reporter)
    return _closing(folder, list(outcomes.values()), reporter)


def _run(
    options: SweepOptions,
    jobs: Sequence[tuple[int, Point]],
    total: int,
    environment: Mapping[str, str],
    reporter: ConsoleReporter,
) -> Outcomes:
    outcomes: Outcomes = {}
    since = time.monotonic()
    with reporter.bar(total, "run", "sweep", lambda done: jobs[len(outcomes) % len(jobs)][1].folder) as advance:
        advance(total - len(jobs))
        for repeat, point in jobs:
            stop.check()
            gave = run_point(options.out_dir, point, repeat, options.inner_repeats, environment)
            outcomes[repeat, point.number] = gave
            advance(1)
            left = len(jobs) - len(outcomes)
            eta_s = (time.monotonic() - since) / len(outcomes) * left
            eta = f"{left} left, about {eta_s:.0f} s" if left else "all done"
            shown = f"failed, {gave}" if isinstance(gave, Failure) else _figures(gave)
            reporter.say(f"[SWEEP] {total - left}/{total} {point.folder} r{repeat}: {shown}, {eta}")
    return outcomes


def _figures(result: Result) -> str:
    found = {name: result.whole(name) for name in (*PASS_FIGURES, "e2e_ms")}
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items() if value is not None)


def _closing(folder: Path, gave: Sequence[Result | Failure], reporter: ConsoleReporter) -> int:
    failures = [failure for failure in gave if isinstance(failure, Failure)]
    results = counted(len(gave) - len(failures), "result")
    reporter.say(f"[SWEEP] {results} and {counted(len(failures), 'failure')} in {folder}")
    if failures and len(failures) == len(gave):
        reason = failures[0].reason
        print(f"{_PREFIX}every process of the sweep failed, the first with: {reason}", file=sys.stderr)
        return 1
    for verb in ("compare", "report"):
        reporter.say(f"[SWEEP] next: {shlex.join([*called(), verb, str(folder)])}")
    return 0


# -- the folder


@contextlib.contextmanager
def _opened(options: SweepOptions, wanted: Mapping[str, object]) -> Iterator[None]:
    """The folder with this sweep's description, for this process alone, rid of what a killed one left half-written.

    Raises UnusableInput if it holds another sweep or something else, or another process sweeps in it.
    """
    folder = options.out_dir
    if folder.exists() and not folder.is_dir():
        raise UnusableInput(f"--out-dir {folder} is no folder: name another")
    check_folder(nearest(folder), f"--out-dir {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"another sweep is running in --out-dir {folder}: wait for it, or name another"
    with locked(folder / ".lock", f"--out-dir {folder}", busy=busy):
        if (folder / DESCRIPTION).exists():
            _check_same(folder, wanted)
        elif strangers := sorted(path.name for path in folder.iterdir() if path.name[0] != "."):
            raise UnusableInput(f"--out-dir {folder} holds {strangers[0]} and no sweep: name an empty or a new folder")
        else:
            write_json(folder / DESCRIPTION, wanted)
        for leftover in folder.glob("*/.r*"):
            leftover.unlink()
        for point in options.sweep.points:
            (folder / point.folder).mkdir(exist_ok=True)
        yield


def _description(options: SweepOptions, environment: Mapping[str, str]) -> dict[str, object]:
    """What has to stay the same: flags, and the variables that the user set of those that decide how a run goes."""
    deciding = (*PRESETS, *ECHOED_ONLY)
    chosen = {name: v for name, v in sorted(environment.items()) if name.startswith("WSM_") or name in deciding}
    return {**options.sweep.as_json(), "inner_repeats": options.inner_repeats, "environment": chosen}


def _check_same(folder: Path, wanted: Mapping[str, object]) -> None:
    found = {"environment": {}, **read_description(folder)}  # of before it was kept: most likely nothing was set
    for name in ("axes", "fixed", "inner_repeats", "points", "environment"):
        if found.get(name) != wanted[name]:
            raise UnusableInput(
                f"--out-dir {folder} holds another sweep (its {_NAMES[name]}: {_typed(found.get(name))}; asked for: "
                f"{_typed(wanted[name])}): repeat that sweep's flags and variables to go on with it, or name another "
                "folder"
            )


_NAMES = {
    "axes": "lists",
    "fixed": "other flags",
    "inner_repeats": "--inner-repeats",
    "points": "points",
    "environment": "variables",
}


def _typed(value: object) -> str:
    """What a description holds, as one types it: ``--mode mixed,stream``, ``WSM_PAIR_AHEAD=3``."""
    if isinstance(value, Mapping):
        pairs = [f"{key} {','.join(x)}" if isinstance(x, list | tuple) else f"{key}={x}" for key, x in value.items()]
        return " ".join(pairs) or "none"
    if isinstance(value, list | tuple):
        return (
            " ".join(str(x["folder"]) if isinstance(x, Mapping) and "folder" in x else str(x) for x in value) or "none"
        )
    return str(value)


# -- one process: ended when the sweep is, its result kept whole or not at all


def run_point(
    folder: Path, point: Point, repeat: int, inner_repeats: int, environment: Mapping[str, str]
) -> Result | Failure:
    """Run it to its end, and keep its result or why it failed.

    Raises Stopped after the process, to which the signal was passed on, has ended; it then counts as not run.
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
            return result
        failure = Failure(code, _reason(code, log))
    except UnusableInput as error:
        failure = Failure(0, str(error))
    finally:
        running.unlink(missing_ok=True)
    write_json(failed, asdict(failure))
    return failure


def _wait(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """The exit code; what the process printed is in ``log``."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # signals come to the sweep alone, which hands them on
            # In the new process: be killed when the sweep is; an orphan would disturb the sweep that goes on.
            preexec_fn=lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(stop.LOOK_S)
            stop.check()
    except Stopped as wish:
        process.send_signal(wish.number)
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(PATIENCE_S)
        raise


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
