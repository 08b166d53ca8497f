"""A sweep's folder: what it holds, and how it is read back.

    sweep.json                     what is swept: axes, fixed flags, points
    p01-mode=mixed/r1.json         the result of point 1, repeat 1
    p01-mode=mixed/r1.failed.json  what is there instead when the process failed
    p01-mode=mixed/r1.log          what the process printed

Files appear whole or not at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from bench.result.results import read_result
from bench.result.types import Result
from wsm.disk.atomic import write_atomically
from wsm.disk.files import read_json
from wsm.errors import UnusableInput

DESCRIPTION = "sweep.json"
FORMAT, VERSION = "bench_infer sweep", 1


@dataclass(frozen=True, slots=True)
class Point:
    """One combination of the swept flags' values; ``number`` counts from 1."""

    number: Annotated[int, Meta(ge=1, lt=1 << 32)]
    values: Mapping[str, str]
    argv: tuple[str, ...] = ()

    def spoken(self, between: str) -> str:
        return between.join(f"{flag.lstrip('-')}={value}" for flag, value in self.values.items())

    @property
    def folder(self) -> str:
        """A name that a person can read and every file system takes."""
        return f"p{self.number:02d}-{re.sub(r'[^A-Za-z0-9._,=-]', '_', self.spoken(','))[:80]}".rstrip("-")


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

    def __str__(self) -> str:
        return f"exit {self.exit_code}: {self.reason}"


Outcomes: TypeAlias = dict[tuple[int, int], Result | Failure]
"""What each process gave that has ended, by its repeat and its point's number."""


def outcomes_in(folder: Path, points: Sequence[Point]) -> Outcomes:
    """Every process that has ended, of earlier calls with more repeats too, repeat by repeat.

    Raises UnusableInput if a file is damaged.
    """
    ended: Outcomes = {}
    for point in points:
        for path in sorted((folder / point.folder).glob("r*.json")):  # r1.failed.json, then r1.json, which counts
            if named := re.fullmatch(r"r(\d+)(\.failed)?\.json", path.name):
                ended[int(named[1]), point.number] = read_failure(path) if named[2] else read_result(path)
    return {key: ended[key] for key in sorted(ended)}


def read_failure(path: Path) -> Failure:
    """Why a process failed, from its file."""
    mend = "delete it, and the sweep runs this one again"
    try:
        return msgspec.convert(read_json(path, str(path), mend), Failure)
    except msgspec.ValidationError as error:
        raise UnusableInput(f"{path} tells no failure ({error}): {mend}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write sweep.json, or a failure."""
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def read_description(folder: Path) -> dict[str, Any]:
    """sweep.json; raises UnusableInput if it is damaged, or from a newer program."""
    path = folder / DESCRIPTION
    found = read_json(path, str(path), "is this a sweep's folder?")
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UnusableInput(f"{path} describes no sweep of bench_infer.py")
    if found.get("version") != VERSION:
        raise UnusableInput(f"{path} is of version {found.get('version')}; this bench_infer.py reads {VERSION}")
    return found


def read_points(folder: Path) -> list[Point]:
    """The points that a sweep's folder is of (their command lines are not kept there)."""
    try:
        return msgspec.convert(read_description(folder).get("points"), list[Point])
    except msgspec.ValidationError as error:
        raise UnusableInput(f"{folder / DESCRIPTION} was changed by hand: it lacks what a sweep needs") from error
