"""What is compared: a side is one result, or several of the same settings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from bench.result.results import checked, read_result
from bench.result.sweep_folder import DESCRIPTION, Failure, read_failure, read_points
from bench.result.types import Result
from wsm.errors import UnusableInput
from wsm.settings import CHOSEN

TRACE_SUFFIX = ".trace.json"
"""A timeline beside its result, ``mixed.trace.json`` beside ``mixed.json``; no result itself."""
_PLACES = frozenset({"out_json", "trace", "output", "print_text", "verbose"})
"""Settings that say where or how a run reports; two runs that differ in them alone are of the same settings."""

_MAY_EXPLAIN = ("git_commit", "torch", "driver")
"""Provenance that a time may depend on, and that a machine changes while results are gathered."""


@dataclass(frozen=True, slots=True)
class Side:
    """Results of the same settings, and processes of a sweep that gave none.

    Attributes:
        values: the swept flags' values, of a point of a sweep.
        source: where it was read from, for messages and for traces beside it.
    """

    name: str
    results: tuple[Result, ...]
    source: Path
    failures: tuple[Failure, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)

    def samples(self, metric: str) -> list[float]:
        """What a test may take as independent: the rounds of a single result, or each result's own figure."""
        if len(self.results) == 1:
            return [getattr(raw, metric) for raw in self.results[0].repeats.raw]
        return [getattr(result, metric) for result in self.results]

    @property
    def sampled(self) -> str:
        """What the samples are."""
        return "rounds" if len(self.results) == 1 else "processes"

    @property
    def typical(self) -> Result | None:
        """The result of median ``e2e_ms`` (of two, the faster); None if every process failed."""
        ordered = sorted(self.results, key=lambda result: result.e2e_ms)
        return ordered[(len(ordered) - 1) // 2] if ordered else None


def read_sides(paths: Sequence[Path]) -> list[Side]:
    """A side for each result file and folder of results, and for each point of a sweep's folder or JSONL.

    Raises:
        UnusableInput: for what cannot be read, holds no result, or mixes runs of different settings.
    """
    sides = [side for path in paths for side in _read(path)]
    for side in sides:
        _check_same_settings(side)
    return _named_apart(sides)


def _read(path: Path) -> list[Side]:
    if path.is_dir() and (path / DESCRIPTION).exists():
        return _points(path)
    if path.is_dir():
        return [_folder(path, path.name or str(path.resolve().name), {})]
    if path.suffix == ".jsonl":
        return _lines(path)
    return [Side(path.stem, (read_result(path),), path)]


def _points(folder: Path) -> list[Side]:
    points = [point for point in read_points(folder) if (folder / point.folder).is_dir()]
    sides = [_folder(folder / p.folder, _spoken(p.values) or p.folder, p.values, empty=True) for p in points]
    return _with_any(sides, folder)


def _folder(folder: Path, name: str, values: Mapping[str, str], *, empty: bool = False) -> Side:
    try:
        files = sorted((p for p in folder.iterdir() if p.suffix == ".json" and p.name[0] != "."), key=_in_order)
    except OSError as error:
        raise UnusableInput(f"{folder} cannot be read: {error.strerror}") from error
    files = [path for path in files if not path.name.endswith(TRACE_SUFFIX)]
    failed = [path for path in files if path.name.endswith(".failed.json")]
    results = tuple(read_result(path) for path in files if path not in failed)
    if not results and not failed and not empty:
        raise UnusableInput(f"{folder} holds no result: no .json file is in it")
    return Side(name, results, folder, tuple(read_failure(path) for path in failed), values)


def _in_order(path: Path) -> list[tuple[int, str]]:
    """r2 before r10."""
    return [(int(part or 0), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]


def _lines(path: Path) -> list[Side]:
    """Whole results, a line each, all one side; or a results.jsonl as sweeps once wrote, a side for each point."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UnusableInput(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not lines:
        raise UnusableInput(f"{path} holds no result: it is empty")
    sides: dict[int, Side] = {}
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number},"
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UnusableInput(f"{where} is no JSON ({error}): was the sweep broken off? Run it again") from error
        entry = _entry_of(found, where)
        side = sides.get(entry.point) or Side(_spoken(entry.values) or path.stem, (), path, (), entry.values)
        if entry.result is not None:
            side = replace(side, results=(*side.results, checked(entry.result, where)))
        else:
            side = replace(side, failures=(*side.failures, Failure(entry.exit_code, str(entry.reason))))
        sides[entry.point] = side
    return _with_any(list(sides.values()), path)


class _Entry(msgspec.Struct):
    """A line: a process of a sweep, with its result or why there is none."""

    point: int
    values: dict[str, str]
    result: dict[str, Any] | None
    exit_code: int
    reason: str | None


def _entry_of(found: Any, where: str) -> _Entry:
    if not isinstance(found, dict) or "point" not in found:
        return _Entry(0, {}, {} if found is None else found, 0, None)
    try:
        return msgspec.convert(found, _Entry)
    except msgspec.ValidationError as error:
        raise UnusableInput(f"{where} is no line of a sweep: {error}") from error


def _with_any(sides: list[Side], path: Path) -> list[Side]:
    if not any(side.results or side.failures for side in sides):
        raise UnusableInput(f"{path} holds no result yet: no process of the sweep has ended")
    return [side for side in sides if side.results or side.failures]


def _spoken(values: Mapping[str, str]) -> str:
    return " ".join(f"{flag.lstrip('-')}={value}" for flag, value in values.items())


# -- settings and provenance


def _check_same_settings(side: Side) -> None:
    kept = [{k: v for k, v in settings_of(r).items() if k not in _not_asked(r)} for r in side.results]
    mixed = differing(kept)
    if mixed:
        shown = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in list(mixed.items())[:4])
        raise UnusableInput(
            f"{side.source} mixes runs of different settings ({shown}): "
            "name the files one by one, or put those of the same settings in a folder each"
        )


def _not_asked(result: Result) -> frozenset[str]:
    """``--auto`` chooses by the memory that is free, which varies from process to process of the same command."""
    return _PLACES | CHOSEN if result.config.resolved.get("auto") else _PLACES


def mixed_devices(side: Side) -> list[str]:
    """The compute devices of a side that has more than one."""
    found = list(dict.fromkeys(device_of(result) for result in side.results))
    return found if len(found) > 1 else []


def device_of(result: Result) -> str:
    return str(result.provenance.gpu or result.provenance.cpu)


def mixed_within(side: Side) -> dict[str, list[Any]]:
    """What the results of a side differ in that may explain a difference of their times, with its values."""
    found = differing([_explaining(result) for result in side.results])
    return {name: list(dict.fromkeys(values)) for name, values in found.items()}


def _explaining(result: Result) -> dict[str, Any]:
    settings = result.config.resolved
    chosen = {name: settings.get(name) for name in sorted(CHOSEN)} if settings.get("auto") else {}
    return {**{name: getattr(result.provenance, name) for name in _MAY_EXPLAIN}, **chosen}


def settings_of(result: Result) -> dict[str, Any]:
    """Resolved flags and variables of a run, less the paths that it writes to."""
    named = {name: value for name, value in result.config.resolved.items() if name not in ("out_json", "trace")}
    return {**named, **result.config.environment}


def provenance_of(result: Result) -> dict[str, Any]:
    """Code, libraries and machine, less the moment, which each run has its own of; flat: ``drive.model``."""
    flat: dict[str, Any] = {}
    for name, value in msgspec.to_builtins(result.provenance).items():
        inside = value if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{key}".rstrip("."): inner for key, inner in inside.items()}
    return {name: value for name, value in flat.items() if name != "utc"}


def differing(many: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The names whose values are not all equal, with each one's value; a name that one lacks counts as None."""
    names = dict.fromkeys(name for one in many for name in one)
    values = {name: [one.get(name) for one in many] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def _named_apart(sides: Iterable[Side]) -> list[Side]:
    """Names that several sides share become their paths, then get numbers."""
    sides = list(sides)
    names = [side.name for side in sides]
    long = [s if names.count(s.name) == 1 else replace(s, name=str(s.source)) for s in sides]
    seen: dict[str, int] = {}
    named = []
    for side in long:
        seen[side.name] = seen.get(side.name, 0) + 1
        named.append(side if seen[side.name] == 1 else replace(side, name=f"{side.name} ({seen[side.name]})"))
    return named
