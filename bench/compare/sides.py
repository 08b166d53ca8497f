"""What is compared: a side is one result, or several of the same settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from bench.result.results import checked, read_lines, read_result
from bench.result.sweep_folder import DESCRIPTION, Failure, Point, read_failure, read_points
from bench.result.types import Result
from wsm.errors import UnusableInput
from wsm.settings import CHOSEN
from wsm.words import counted

TRACE_SUFFIX = ".trace.json"
"""A timeline beside its result, ``mixed.trace.json`` beside ``mixed.json``; no result itself."""
PLACES = frozenset({"out_json", "trace", "output", "print_text", "quiet", "verbose"})
"""Settings that say where or how a run reports; two runs that differ in them alone are of the same settings."""


@dataclass(frozen=True, slots=True)
class Side:
    """Results of the same settings, and processes of a sweep that gave none."""

    name: str
    results: tuple[Result, ...]
    source: Path  # where it was read from, for messages and for traces beside it
    failures: tuple[Failure, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)  # the swept flags', of a point of a sweep
    copies: int = 0  # files or lines that held one of the results once more

    def samples(self, metric: str) -> list[float]:
        """What a test may take as independent: the rounds of a single result, or each result's own figure."""
        if len(self.results) == 1:
            return self.results[0].rounds(metric)
        return [figure for result in self.results if (figure := result.whole(metric)) is not None]

    @property
    def sampled(self) -> str:
        """How many samples there are, and of what."""
        count = len(self.samples("e2e_ms"))
        return counted(count, "round") if len(self.results) == 1 else counted(count, "process", "processes")

    @property
    def typical(self) -> Result | None:
        """The result of median ``e2e_ms`` (of two, the faster); None if every process failed."""
        ordered = sorted(self.results, key=lambda result: result.e2e_ms)
        return ordered[(len(ordered) - 1) // 2] if ordered else None


def read_sides(paths: Sequence[Path]) -> list[Side]:
    """A side for each result file, folder of results and JSONL of whole results, and each point of a sweep's folder.

    Raises UnusableInput for what cannot be read, holds no result, or mixes runs of different settings.
    """
    sides = [_each_once(side) for path in paths for side in _read(path)]
    for side in sides:
        _check_same_settings(side)
    return list(_named_apart(sides))


def _read(path: Path) -> list[Side]:
    if path.is_dir() and (path / DESCRIPTION).exists():
        points = [point for point in read_points(path) if (path / point.folder).is_dir()]
        sides = [_folder(path / point.folder, point.spoken(" "), point.values) for point in points]
        why = " yet: no process of the sweep has ended"
    elif path.is_dir():
        sides, why = [_folder(path, path.absolute().name, {})], ": no .json file is in it"
    elif path.suffix == ".jsonl":
        sides, why = _lines(path), ": it is empty"
    else:
        sides, why = [Side(path.stem, (read_result(path),), path)], ""
    ended = [side for side in sides if side.results or side.failures]
    if not ended:
        raise UnusableInput(f"{path} holds no result{why}")
    return ended


def _folder(folder: Path, name: str, values: Mapping[str, str]) -> Side:
    try:
        files = [path for path in folder.iterdir() if path.suffix == ".json" and path.name[0] != "."]
    except OSError as error:
        raise UnusableInput(f"{folder} cannot be read: {error.strerror}") from error
    files.sort(key=lambda path: (len(path.name), path.name))  # r2 before r10
    failures = tuple(read_failure(path) for path in files if path.name.endswith(".failed.json"))
    results = tuple(read_result(path) for path in files if not path.name.endswith((".failed.json", TRACE_SUFFIX)))
    return Side(name or folder.name, results, folder, failures, values)


def once(results: Iterable[Result]) -> dict[bytes, Result]:
    """The results by their content: five copies of a file are one sample, not five that agree to the last digit.

    Start, timings and memory are part of it, so no two processes have the same.
    """
    return {msgspec.json.encode(result): result for result in results}


def _each_once(side: Side) -> Side:
    found = tuple(once(side.results).values())
    return replace(side, results=found, copies=len(side.results) - len(found))


class _SweepLine(msgspec.Struct):
    """A line of the ``results.jsonl`` that sweeps wrote beside their results until November 2026."""

    point: int
    values: dict[str, str]
    exit_code: int
    reason: str | None
    result: Any


def _lines(path: Path) -> list[Side]:
    """One side of a file that has a whole result on each line; of an earlier sweep's file, a side for each point."""
    sides: dict[int, Side] = {}
    for where, found in read_lines(path):
        if isinstance(found, dict) and "point" in found:
            try:
                line = msgspec.convert(found, _SweepLine)
            except msgspec.ValidationError as error:
                raise UnusableInput(f"{where} is no line of a sweep: {error}") from error
        else:
            line = _SweepLine(0, {}, 0, None, found)
        side = sides.get(line.point) or Side(Point(0, line.values).spoken(" ") or path.stem, (), path, (), line.values)
        if line.result is None and line.point:
            side = replace(side, failures=(*side.failures, Failure(line.exit_code, line.reason or "")))
        else:
            side = replace(side, results=(*side.results, checked(line.result, where)))
        sides[line.point] = side
    return list(sides.values())


# -- settings and provenance


def _check_same_settings(side: Side) -> None:
    kept = [{k: v for k, v in settings_of(r).items() if k not in PLACES | _chosen(r)} for r in side.results]
    if mixed := differing(kept):
        shown = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in list(mixed.items())[:4])
        raise UnusableInput(
            f"{side.source} mixes runs of different settings ({shown}): "
            "name the files one by one, or put those of the same settings in a folder each"
        )


def _chosen(result: Result) -> frozenset[str]:
    """``--auto`` chooses by the memory that is free, which varies from process to process of the same command."""
    return CHOSEN if result.config.resolved.get("auto") else frozenset()


def device_of(result: Result) -> str:
    return str(result.provenance.gpu or result.provenance.cpu)


def mixed_within(side: Side) -> dict[str, list[Any]]:
    """What the results of a side differ in that may explain a difference of their times, with its values."""
    explaining = [  # provenance that changes on a machine while results are gathered, and what --auto chose
        {name: getattr(result.provenance, name) for name in ("git_commit", "torch", "driver")}
        | {name: result.config.resolved.get(name) for name in sorted(_chosen(result))}
        for result in side.results
    ]
    return {name: list(dict.fromkeys(values)) for name, values in differing(explaining).items()}


def settings_of(result: Result) -> dict[str, Any]:
    """Resolved flags and variables of a run, less the paths that it writes to."""
    named = {
        name: value for name, value in result.config.resolved.items() if name not in ("out_json", "trace", "quiet")
    }
    return {**named, **result.config.environment}


def provenance_of(result: Result) -> dict[str, Any]:
    """Code, libraries and machine, less the moment, which each run has its own of; flat: ``drive.model``."""
    flat: dict[str, Any] = {}
    for name, value in msgspec.to_builtins(result.provenance).items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat.items() if name != "utc"}


def differing(many: Sequence[Mapping[str, Any] | None]) -> dict[str, list[Any]]:
    """The names whose values are not all equal, with each one's value; a name that one lacks counts as None.

    One that is None itself is left out of that, and has None for each value.
    """
    known = [one for one in many if one is not None]
    names = dict.fromkeys(name for one in known for name in one if any(one.get(name) != o.get(name) for o in known))
    return {name: [one and one.get(name) for one in many] for name in names}


def _named_apart(sides: Sequence[Side]) -> Iterator[Side]:
    """Names that several sides share become their paths, then get numbers; bytes that are no text become escapes."""
    shared, seen = Counter(side.name for side in sides), Counter[str]()
    for side in sides:
        name = side.name if shared[side.name] == 1 else str(side.source)
        seen[name] += 1
        shown = name.encode("utf-8", errors="backslashreplace").decode("utf-8")
        yield replace(side, name=shown if seen[name] == 1 else f"{shown} ({seen[name]})")
