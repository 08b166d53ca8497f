"""The engine's settings: flags and ``WSM_*`` variables, read and validated once. Imports no torch."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from llama.config import UnusableInput


@dataclass(frozen=True, slots=True)
class Settings:
    """Flags (the guide's command line as defaults), then variables; DESIGN sections 8 and 9 say what each does."""

    mode: str = "mixed"
    prefetch_distance: int = 6
    group_prefetch_depth: int = 4
    gpu_cached_layers: int = 4
    cpu_cache_layers: int = 40
    warmup_layers: int = 4
    staging_mb: int = 64
    verify_weights: bool = False
    gpu_mem_gb: float | None = None
    cpu_mem_gb: float | None = None

    cpu_rolling_mode: bool = True
    cpu_evict: Literal["belady", "fifo"] = "belady"
    cpu_wrap_around: bool = True
    cpu_roll_sync: bool = True
    aggressive_gpu_prefetch: int = 2
    gpu_max_groups: int = 10
    skip_preload_wait: bool = True
    evict_finished: bool = True
    kv_throttle_threshold: int = 8
    kv_throttle_ms: float = 16.0
    balance_prefetch: bool = True
    balance_tol: int = 1
    pair_ahead: int = 2
    kind_ahead_cap: int = 2


@dataclass(frozen=True, slots=True)
class Variable:
    """An environment variable: its preset, the text of what it allows, and how it is read (ValueError if it cannot)."""

    preset: str
    allows: str
    read: Callable[[str], Any]


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise ValueError(text)
        return value

    return read


def _switch(text: str) -> bool:
    return {"0": False, "1": True}[text]


def _milliseconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError(text)
    return value


def _policy(text: str) -> str:
    return {"belady": "belady", "fifo": "fifo"}[text]


def _flag(preset: str) -> Variable:
    return Variable(preset, "0 or 1", _switch)


def _count(preset: str, least: int) -> Variable:
    return Variable(preset, f"a whole number of at least {least}", _whole(least))


VARIABLES: Mapping[str, Variable] = {
    "WSM_CPU_ROLLING_MODE": _flag("1"),
    "WSM_CPU_EVICT": Variable("belady", "belady or fifo", _policy),
    "WSM_CPU_WRAP_AROUND": _flag("1"),
    "WSM_CPU_ROLL_SYNC": _flag("1"),
    "WSM_AGGRESSIVE_GPU_PREFETCH": _count("2", 0),
    "WSM_GPU_MAX_GROUPS": _count("10", 2),
    "WSM_SKIP_PRELOAD_WAIT": _flag("1"),
    "WSM_EVICT_FINISHED": _flag("1"),
    "WSM_KV_THROTTLE_THRESHOLD": _count("8", 1),
    "WSM_KV_THROTTLE_MS": Variable("16", "milliseconds, 0 or more", _milliseconds),
    "WSM_BALANCE_PREFETCH": _flag("1"),
    "WSM_BALANCE_TOL": _count("1", 0),
    "WSM_PAIR_AHEAD": _count("2", 0),
    "WSM_KIND_AHEAD_CAP": _count("2", 0),
}
PRESETS: Mapping[str, str] = {
    "OMP_NUM_THREADS": str(min(8, os.cpu_count() or 1)),
    "MALLOC_ARENA_MAX": "2",
    **{name: variable.preset for name, variable in VARIABLES.items()},
}


def preset_environment(environ: MutableMapping[str, str]) -> None:
    """Set what the user has not set. Must run before torch is imported, since OpenMP reads its variable once."""
    for name, preset in PRESETS.items():
        environ.setdefault(name, preset)


def read_settings(flags: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[Settings, list[str]]:
    """Settings from flags (by field name; None counts as not given) and variables; and warnings.

    Raises:
        UnusableInput: for a variable with a value that it does not allow.
    """
    values: dict[str, Any] = {}
    for name, variable in VARIABLES.items():
        text = environ.get(name, variable.preset)
        try:
            values[name.removeprefix("WSM_").lower()] = variable.read(text)
        except (ValueError, KeyError):
            raise UnusableInput(f"{name}={text} cannot be used: it takes {variable.allows}") from None
    known = {field.name for field in fields(Settings)}
    values.update({name: value for name, value in flags.items() if name in known and value is not None})
    return Settings(**values), _unknown_variables(environ)


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    warnings = []
    for name in sorted(environ):
        if name.startswith("WSM_") and name not in VARIABLES:
            close = difflib.get_close_matches(name, VARIABLES, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            warnings.append(f"the variable {name} is not known and has no effect{hint}")
    return warnings


def environment_echo(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables in force, for the JSON."""
    return {name: environ.get(name, preset) for name, preset in PRESETS.items()}
