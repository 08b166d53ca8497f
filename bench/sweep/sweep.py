"""The verb ``sweep``: every point in processes of its own, interleaved, kept as they end, gone on with after a stop."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from bench.options.verb_flags import SweepOptions
from bench.result.sweep_folder import DESCRIPTION, Failure, Outcome, Point, outcomes_in, read_description, write_json
from bench.result.types import Result
from bench.sweep.process import run_point
from wsm.errors import UnusableInput
from wsm.settings import ECHOED_ONLY, PRESETS

_LOCK = ".lock"
_DECIDING = frozenset((*PRESETS, *ECHOED_ONLY))


def run_sweep(options: SweepOptions, user_set: Sequence[str], check: Callable[[Sequence[str]], object]) -> int:
    """Run what has not been run yet; 0, or 1 if no process of the whole sweep gave a result.

    Args:
        user_set: variables that the user had set: the processes get those, and no presets of this one.
        check: parses a run's arguments; raises UnusableInput for those that no run takes, or whose files are missing.
    """
    for point in options.sweep.points:
        check([*point.argv, f"--repeats={options.inner_repeats}"])
    environment = {name: v for name, v in os.environ.items() if name not in PRESETS or name in user_set}
    folder, points = options.out_dir, options.sweep.points
    with _opened(options, _description(options, environment)):
        jobs = list(_jobs(points, options.repeats))
        ended = outcomes_in(folder, points)
        if options.retry_failed:
            ended = [o for o in ended if not isinstance(o.gave, Failure) or o.repeat > options.repeats]
        done = {(outcome.point, outcome.repeat) for outcome in ended}
        left = [(point, repeat) for point, repeat in jobs if (point.number, repeat) not in done]
        _say(f"[SWEEP] {len(points)} points x {options.repeats} processes, {len(left)} to run, in {folder}")
        outcomes = ended + _run(options, left, len(jobs), environment)
    return _closing(options, outcomes)


def _jobs(points: Sequence[Point], repeats: int) -> Iterator[tuple[Point, int]]:
    """All points once, then all in reverse, and so on: what drifts with time weighs on every point alike."""
    for repeat in range(1, repeats + 1):
        order = points if repeat % 2 else tuple(reversed(points))
        yield from ((point, repeat) for point in order)


def _run(
    options: SweepOptions, jobs: Sequence[tuple[Point, int]], total: int, environment: Mapping[str, str]
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    since = time.monotonic()
    with tqdm(total=total, initial=total - len(jobs), unit="run", desc="sweep", disable=None, leave=False) as bar:
        for point, repeat in jobs:
            bar.set_postfix_str(point.folder)
            outcomes.append(run_point(options.out_dir, point, repeat, options.inner_repeats, environment))
            bar.update()
            left = len(jobs) - len(outcomes)
            eta_s = (time.monotonic() - since) / len(outcomes) * left
            eta = f"{left} left, about {eta_s:.0f} s" if left else "all done"
            _say(f"[SWEEP] {total - left}/{total} {point.folder} r{repeat}: {_shown(outcomes[-1].gave)}, {eta}")
    return outcomes


def _shown(gave: Result | Failure) -> str:
    if isinstance(gave, Failure):
        return f"failed, exit {gave.exit_code}: {gave.reason}"
    return f"e2e_ms {gave.e2e_ms:.1f}"


def _closing(options: SweepOptions, outcomes: Sequence[Outcome]) -> int:
    failures = [outcome.gave for outcome in outcomes if isinstance(outcome.gave, Failure)]
    _say(f"[SWEEP] {len(outcomes) - len(failures)} results and {len(failures)} failures in {options.out_dir}")
    if outcomes and len(failures) == len(outcomes):
        reason = failures[0].reason
        print(f"bench_infer.py: every process of the sweep failed, the first with: {reason}", file=sys.stderr)
        return 1
    for verb in ("compare", "report"):
        _say(f"[SWEEP] next: bench_infer.py {verb} {options.out_dir}")
    return 0


def _say(line: str) -> None:
    """On stdout, above the progress bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


# -- the folder


@contextlib.contextmanager
def _opened(options: SweepOptions, wanted: Mapping[str, object]) -> Iterator[None]:
    """The folder with this sweep's description, for this process alone, rid of what a killed one left half-written.

    Raises:
        UnusableInput: if it holds another sweep or something else, or another process sweeps in it.
    """
    folder = options.out_dir
    if folder.exists() and not folder.is_dir():
        raise UnusableInput(f"--out-dir {folder} is no folder: name another")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnusableInput(
                f"another sweep is running in --out-dir {folder}: wait for it, or name another"
            ) from None
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
    chosen = {name: v for name, v in sorted(environment.items()) if name.startswith("WSM_") or name in _DECIDING}
    return {**options.sweep.as_json(), "inner_repeats": options.inner_repeats, "environment": chosen}


def _check_same(folder: Path, wanted: Mapping[str, object]) -> None:
    found = read_description(folder)
    found.setdefault("environment", {})  # of before it was kept: most likely nothing was set
    names = ("axes", "fixed", "inner_repeats", "points", "environment")
    differing = [name for name in names if found.get(name) != wanted[name]]
    if differing:
        name = differing[0]
        raise UnusableInput(
            f"--out-dir {folder} holds another sweep (its {name}: {found.get(name)}, not {wanted[name]}): "
            "repeat that sweep's flags and variables to go on with it, or name another folder"
        )
