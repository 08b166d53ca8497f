"""The result's file: written from the type, read back into it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from bench.result.types import SCHEMA_VERSION, Result
from wsm.disk.files import begins_with, parse_json, read_file
from wsm.errors import UnusableInput

BEYOND = 1e24
"""No figure of a run is as large: the operations of the longest are some 1e21. Sums and squares below it are finite."""
MOST_BYTES = 64 << 20
_KEYS_OF_OURS = {"schema_version", "batch_size", "traceEvents", "perplexity"}
"""Each of a result, a plan, a timeline and a quality, in any version, has one of them."""
_NUMBERS = re.compile(r"\[\n\s+([-+.\w,\s]+?)\s+\]")
"""A list of numbers, one on each line: no text of the JSON has a line's end in it."""
_TAKES = "name what a run's --out-json wrote"
_BROKEN = f"was the run broken off? {_TAKES}"
_MISSING = re.compile(r"Object missing required field `(\w+)`")


def significant(value: Any) -> Any:
    """Floats anywhere in ``value`` rounded to six significant digits; what is not finite becomes None."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): significant(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [significant(item) for item in value]
    return value


def plain(result: Result) -> dict[str, Any]:
    """A result as its JSON has it: fixed keys first, six significant digits."""
    return dict(significant(msgspec.to_builtins(result)))


def dump(result: Result) -> str:
    """The JSON text of a result, a list of numbers on one line."""
    text = json.dumps(plain(result), indent=2, ensure_ascii=False) + "\n"
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")  # arguments may hold bytes of no text


def read_result(path: Path) -> Result:
    """The result of a file; raises UnusableInput if it is missing, damaged, no result, or of another schema."""
    return checked(_parse(_content(path), str(path)), str(path))


def _content(path: Path) -> bytes:
    try:
        return read_file(path, most_bytes=MOST_BYTES, pipes=True)
    except UnusableInput as error:
        raise UnusableInput(f"{error}; {_TAKES}") from error


def held_result(path: Path) -> dict[str, Any] | None:
    """What a file holds, unchecked, that is a result of this program in any version; None for any other file."""
    try:
        found = parse_json(read_file(path, most_bytes=MOST_BYTES), str(path), "")
    except UnusableInput:
        return None
    return found if isinstance(found, dict) and "schema_version" in found else None


def may_be_replaced(path: Path) -> bool:
    """Whether a file has nothing in it, or what this program writes as JSON: a result, plan, quality or timeline."""
    if begins_with(path, b'{"traceEvents"'):
        return True
    try:
        found = parse_json(read_file(path, most_bytes=MOST_BYTES), str(path), "")
    except UnusableInput:
        return False
    return isinstance(found, dict) and not _KEYS_OF_OURS.isdisjoint(found)


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each line of a file of JSON lines is, and what it holds; raises UnusableInput as for a file of one."""
    for number, line in enumerate(_content(path).split(b"\n"), 1):
        if line.strip():
            yield (where := f"{path}, line {number},"), _parse(line, where)


def _parse(content: bytes, where: str) -> Any:
    """Raises UnusableInput: for another file, and for one that began as a result (or as nothing) it says so."""
    if content.lstrip(b"\xef\xbb\xbf \t\r\n\0")[:1] not in (b"{", b""):
        raise UnusableInput(f"{where} is no result of bench_infer.py (no JSON object); {_TAKES}")
    return parse_json(content, where, _BROKEN)


def checked(found: Any, where: str) -> Result:
    """The result that was ``found`` in ``where``. Keys that only newer programs write are passed over.

    Raises UnusableInput if it is no result, one of another schema, or one that no program wrote (by its key).
    """
    version = found.get("schema_version") if isinstance(found, dict) else None
    if type(version) is not int:
        raise UnusableInput(f"{where} is no result of bench_infer.py; {_TAKES}")
    if version != SCHEMA_VERSION:
        by = f"{'a newer' if version > SCHEMA_VERSION else 'an older'} bench_infer.py"
        raise UnusableInput(f"{where} is of schema {version}, from {by}; this one reads {SCHEMA_VERSION}")
    if fault := next(_beyond(found, ""), None):
        raise UnusableInput(f"{where}: {fault}, which it cannot be: was it changed by hand?")
    try:
        return msgspec.convert(found, Result)
    except msgspec.ValidationError as error:
        fault, _, path = str(error).partition(" - at `$")
        path = path.strip("`.")
        if missing := _MISSING.match(fault):
            key = f"{path}.{missing[1]}".lstrip(".")
            raise UnusableInput(f"{where} is no result of bench_infer.py: {key} is missing") from error
        raise UnusableInput(f"{where}: {path}: {fault[0].lower()}{fault[1:]}: was it changed by hand?") from error


def _beyond(value: Any, path: str) -> Iterator[str]:
    """The numbers that no run gives, wherever they are."""
    if isinstance(value, int | float) and not abs(value) < BEYOND:  # nor NaN
        text = json.dumps(value)
        yield f"{path} is {text if len(text) <= 40 else f'{text[:37]}...'}"
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _beyond(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _beyond(inner, f"{path}[]")
