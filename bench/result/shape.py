"""Whether a result read from a file can be worked with: what is there is of its kind, what is needed is there.

More lenient than schema.json in one thing: a key that only newer programs write may be missing, so that runs of two
commits can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from bench.result.results import METRICS, SCHEMA_FILE
from wsm.errors import UnusableInput

_PHASE = ("wall_ms", "passes", "bytes_moved", "busy_ms", "stall_ms", "idle_ms", "floor_ms", "bound_by", "roofline_pct")
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "": ("phases", "repeats", "config", "provenance", "output", "warnings", "memory", "residency", "plan"),
    "phases": ("prefill", "decode"),
    "phases.prefill": _PHASE,
    "phases.decode": _PHASE,
    "repeats": ("raw",),
    "repeats.raw[]": METRICS,
    "config": ("argv", "resolved", "environment"),
    "config.resolved": ("model",),
    "provenance": ("gpu", "cpu", "model_digest", "git_commit", "utc"),
    "output": ("sha256",),
    "memory": ("cpu_page_locked_bytes",),
    "plan": ("bytes_per_pass",),
}
"""What comparing and reporting read, by the path of the object that holds it."""
_KINDS: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


BEYOND = 1e24
"""No figure of a run is as large: the operations of the longest are some 1e21. Sums and squares below it are finite."""


@cache
def _schema() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return schema


def check_shape(result: Mapping[str, Any], where: str) -> None:
    """Nothing, if the result can be compared and reported.

    Raises:
        UnusableInput: naming the first key that is missing or of another kind than schema.json says.
    """
    fault = next(_faults(result, _schema(), ""), None)
    if fault is None and not all(raw["e2e_ms"] > 0 for raw in (result, *result["repeats"]["raw"])):
        fault = "e2e_ms must be above 0"
    if fault is not None:
        raise UnusableInput(f"{where}: {fault}: was it changed by hand?")


def _faults(value: Any, part: Mapping[str, Any], path: str) -> Iterator[str]:
    if "$ref" in part:
        part = {**_schema()["$defs"][part["$ref"].rpartition("/")[2]], **part}
    if not _is_of(value, part):
        yield f"{path} is {_shown(value)}, which it cannot be"
    elif isinstance(value, dict):
        for key in _NEEDED.get(path, ()):
            if key not in value:
                yield f"{f'{path}.{key}'.lstrip('.')} is missing"
        known = part.get("properties", {})
        for key, inner in value.items():
            yield from _faults(inner, known.get(key, {}), f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        if len(value) < part.get("minItems", 0):
            yield f"{path} has too few items"
        for item in value:
            yield from _faults(item, part.get("items", {}), f"{path}[]")


def _is_of(value: Any, part: Mapping[str, Any]) -> bool:
    if "enum" in part or "const" in part:
        return value in part.get("enum", [part.get("const")])
    kinds = part.get("type", list(_KINDS))
    if isinstance(value, int | float) and not abs(value) < BEYOND:  # nor NaN
        return False
    named = [kinds] if isinstance(kinds, str) else kinds
    if isinstance(value, bool):
        return "boolean" in named
    if not any(isinstance(value, _KINDS[kind]) for kind in named):
        return False
    return not isinstance(value, int | float) or value >= part.get("minimum", value)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
