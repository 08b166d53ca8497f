"""A sweep's folder: what it holds, and how it is read back.

    sweep.json                   what is swept: axes, fixed flags, points
    results.jsonl                a line each finished process: point, repeat, exit code, reason, the whole result
    p01-mode=mixed/r1.json       the result of point 1, repeat 1
    p01-mode=mixed/r1.failed.json  what stands there instead when the process failed
    p01-mode=mixed/r1.log        what the process printed

The files of single processes are the truth: they appear whole or not at all, and results.jsonl is made from them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.result.results import plain, read_result
from bench.result.types import Result
from wsm.disk.atomic import write_atomically
from wsm.errors import UnusableInput

DESCRIPTION, LINES, LOCK = "sweep.json", "results.jsonl", ".lock"
FORMAT, VERSION = "bench_infer sweep", 1


@dataclass(frozen=True, slots=True)
class Point:
    """One combination of the swept flags' values; ``number`` counts from 1."""

    number: int
    values: Mapping[str, str]
    argv: tuple[str, ...]

    @property
    def folder(self) -> str:
        """A name that a person can read and every file system takes."""
        text = ",".join(f"{flag.lstrip('-')}={value}" for flag, value in self.values.items())
        return f"p{self.number:02d}-{re.sub(r'[^A-Za-z0-9._,=-]', '_', text)[:80]}".rstrip("-")


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is swept: the same sweep may be gone on with, with more repeats."""

    axes: Mapping[str, tuple[str, ...]]
    fixed: tuple[str, ...]
    points: tuple[Point, ...]

    def as_json(self) -> dict[str, Any]:
        points = [{"number": p.number, "values": dict(p.values), "folder": p.folder} for p in self.points]
        axes = {flag: list(values) for flag, values in self.axes.items()}
        return {"format": FORMAT, "version": VERSION, "axes": axes, "fixed": list(self.fixed), "points": points}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a process gave no result."""

    exit_code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """One process that ended: its result, or why there is none."""

    point: int
    repeat: int
    values: Mapping[str, str]
    result: Result | None
    failure: Failure | None

    def line(self) -> str:
        """Its line in results.jsonl."""
        return json.dumps(
            {
                "point": self.point,
                "repeat": self.repeat,
                "values": dict(self.values),
                "exit_code": self.failure.exit_code if self.failure else 0,
                "reason": self.failure.reason if self.failure else None,
                "result": plain(self.result) if self.result is not None else None,
            }
        )


def result_file(folder: Path, point: Point, repeat: int) -> Path:
    return folder / point.folder / f"r{repeat}.json"


def failure_file(folder: Path, point: Point, repeat: int) -> Path:
    return folder / point.folder / f"r{repeat}.failed.json"


def outcome_of(folder: Path, point: Point, repeat: int) -> Outcome | None:
    """What is there of a point's repeat; None if it has not ended yet.

    Raises:
        UnusableInput: if its file is damaged.
    """
    good, bad = result_file(folder, point, repeat), failure_file(folder, point, repeat)
    if good.exists():
        return Outcome(point.number, repeat, point.values, read_result(good), None)
    if bad.exists():
        return Outcome(point.number, repeat, point.values, None, read_failure(bad))
    return None


def most_repeats(folder: Path, points: Sequence[Point]) -> int:
    """The highest repeat of any point that has ended; 0 if none has."""
    files = (path.name for point in points for path in (folder / point.folder).glob("r*.json"))
    return max(
        (int(named[1]) for file in files if (named := re.fullmatch(r"r(\d+)(\.failed)?\.json", file))), default=0
    )


def read_failure(path: Path) -> Failure:
    """Why a process failed, from its file."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        return Failure(int(entry["exit_code"]), str(entry["reason"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UnusableInput(f"{path} cannot be read ({error}): delete it, and the sweep runs this one again") from error


def write_failure(path: Path, failure: Failure) -> None:
    entry = {"exit_code": failure.exit_code, "reason": failure.reason}
    write_atomically(path, json.dumps(entry, ensure_ascii=False, indent=1) + "\n")


def write_lines(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """results.jsonl anew."""
    write_atomically(folder / LINES, "".join(f"{outcome.line()}\n" for outcome in outcomes))


def append_line(folder: Path, outcome: Outcome) -> None:
    """One more line; a line broken off by a kill is mended when the sweep goes on."""
    with (folder / LINES).open("a", encoding="utf-8") as file:
        file.write(f"{outcome.line()}\n")
        file.flush()
        os.fsync(file.fileno())


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """sweep.json."""
    write_atomically(folder / DESCRIPTION, json.dumps(description, ensure_ascii=False, indent=1) + "\n")


def read_description(folder: Path) -> dict[str, Any]:
    """sweep.json.

    Raises:
        UnusableInput: if it is damaged, or from a newer program.
    """
    path = folder / DESCRIPTION
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnusableInput(f"{path} cannot be read ({error}): is this a sweep's folder?") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UnusableInput(f"{path} describes no sweep of bench_infer.py")
    if found.get("version") != VERSION:
        raise UnusableInput(f"{path} is of version {found.get('version')}; this bench_infer.py reads {VERSION}")
    return found


def read_points(folder: Path) -> list[Point]:
    """The points that a sweep's folder is of (their command lines are not kept there)."""
    try:
        return [
            Point(int(entry["number"]), {str(k): str(v) for k, v in entry["values"].items()}, ())
            for entry in read_description(folder)["points"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnusableInput(f"{folder / DESCRIPTION} was changed by hand: it lacks what a sweep needs") from error
