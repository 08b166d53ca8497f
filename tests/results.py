"""Results made of a measured one, with other times and settings."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.result.results import checked
from bench.result.types import Result


def varied(measured: Mapping[str, Any], rounds_ms: Sequence[float] = (), **changes: Any) -> dict[str, Any]:
    """A copy with these rounds; ``config__resolved__mode="stream"`` sets what lies at that path."""
    result: dict[str, Any] = copy.deepcopy(dict(measured))
    if rounds_ms:
        raw = result["repeats"]["raw"][0]
        result["repeats"]["raw"] = [{**raw, "e2e_ms": float(sample)} for sample in rounds_ms]
        result["repeats"]["n"] = len(rounds_ms)
        result["e2e_ms"] = sorted(map(float, rounds_ms))[(len(rounds_ms) - 1) // 2]
    for path, value in changes.items():
        *way, last = path.split("__")
        place = result
        for key in way:
            place = place[key]
        place[last] = value
    return result


def stored(path: Path, result: Mapping[str, Any]) -> Path:
    """``result`` as a file, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(result)), encoding="utf-8")
    return path


def typed(result: Mapping[str, Any]) -> Result:
    """``result`` as it is read from a file."""
    return checked(dict(result), "a test's result")
