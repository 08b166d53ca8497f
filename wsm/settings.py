"""The engine's settings: flags and ``WSM_*`` variables, read and validated once. Imports no torch."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from wsm.errors import UnusableInput

MODES = ("mixed", "stream", "preload", "full")
CHOSEN_BY_AUTO = frozenset(
    {"gpu_cached_layers", "group_prefetch_depth", "cpu_cache_layers", "prefetch_distance", "embedding"}
)
"""The settings that ``--auto`` decides."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Flags (the guide's command line as defaults), then variables; DESIGN sections 8 and 9 say what each does.

    Raises:
        UnusableInput: for a value that is not allowed, naming the flag or variable, the value and what is allowed.
    """

    mode: str = "mixed"
    prefetch_distance: int = 6
    group_prefetch_depth: int = 4
    gpu_cached_layers: int = 4
    cpu_cache_layers: int = 40
    warmup_layers: int = 4
    staging_mb: int = 64
    verify_weights: bool = False
    embedding: Literal["gpu", "cpu"] = "gpu"
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

    def __post_init__(self) -> None:
        for field in fields(self):
            kind, value = KINDS_OF_VALUE[field.name], getattr(self, field.name)
            if not kind.allowed(value):
                raise UnusableInput(f"{spelled(field.name)} must be {kind.says}, not {value!r}")


class KindOfValue(NamedTuple):
    """What a setting takes: in words, as a test of a value, and how a variable's text is read (ValueError if not)."""

    says: str
    allowed: Callable[[Any], bool]
    read: Callable[[str], Any]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(least: int) -> KindOfValue:
    def allowed(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    return KindOfValue(f"a whole number of at least {least}", allowed, int)


def _one_of(*words: str) -> KindOfValue:
    return KindOfValue(f"{', '.join(words[:-1])} or {words[-1]}", lambda value: value in words, str)


def _read_switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(text)
    return text == "1"


_SWITCH = KindOfValue("0 or 1", lambda value: isinstance(value, bool), _read_switch)
_MILLISECONDS = KindOfValue("milliseconds, 0 or more", lambda value: _is_number(value) and value >= 0, float)
_GIBIBYTES = KindOfValue(
    "a number of GiB above 0", lambda value: value is None or (_is_number(value) and value > 0), float
)

KINDS_OF_VALUE: Mapping[str, KindOfValue] = {
    "mode": _one_of(*MODES),
    "prefetch_distance": _whole(0),
    "group_prefetch_depth": _whole(0),
    "gpu_cached_layers": _whole(0),
    "cpu_cache_layers": _whole(0),
    "warmup_layers": _whole(0),
    "staging_mb": _whole(1),
    "verify_weights": _SWITCH,
    "embedding": _one_of("gpu", "cpu"),
    "gpu_mem_gb": _GIBIBYTES,
    "cpu_mem_gb": _GIBIBYTES,
    "cpu_rolling_mode": _SWITCH,
    "cpu_evict": _one_of("belady", "fifo"),
    "cpu_wrap_around": _SWITCH,
    "cpu_roll_sync": _SWITCH,
    "aggressive_gpu_prefetch": _whole(0),
    "gpu_max_groups": _whole(2),
    "skip_preload_wait": _SWITCH,
    "evict_finished": _SWITCH,
    "kv_throttle_threshold": _whole(1),
    "kv_throttle_ms": _MILLISECONDS,
    "balance_prefetch": _SWITCH,
    "balance_tol": _whole(0),
    "pair_ahead": _whole(0),
    "kind_ahead_cap": _whole(0),
}
"""By field of :class:`Settings`."""

WSM_PRESETS: Mapping[str, str] = {
    "WSM_CPU_ROLLING_MODE": "1",
    "WSM_CPU_EVICT": "belady",
    "WSM_CPU_WRAP_AROUND": "1",
    "WSM_CPU_ROLL_SYNC": "1",
    "WSM_AGGRESSIVE_GPU_PREFETCH": "2",
    "WSM_GPU_MAX_GROUPS": "10",
    "WSM_SKIP_PRELOAD_WAIT": "1",
    "WSM_EVICT_FINISHED": "1",
    "WSM_KV_THROTTLE_THRESHOLD": "8",
    "WSM_KV_THROTTLE_MS": "16",
    "WSM_BALANCE_PREFETCH": "1",
    "WSM_BALANCE_TOL": "1",
    "WSM_PAIR_AHEAD": "2",
    "WSM_KIND_AHEAD_CAP": "2",
}
PRESETS: Mapping[str, str] = {
    "OMP_NUM_THREADS": str(min(8, len(os.sched_getaffinity(0)))),
    "MALLOC_ARENA_MAX": "2",
    **WSM_PRESETS,
}
"""What the script sets where the user has not: DESIGN section 9."""


class Ranks(NamedTuple):
    """Where torchrun put this process: which of all ranks it is, which of its host's, and where all of them meet.

    ``attempt`` counts how often torchrun has started them again; ``keeps_store``: whether rank 0 keeps the job's store,
    no agent of torchrun's doing so.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    attempt: int = 0
    address: str = ""
    port: int = 0
    keeps_store: bool = False


def read_ranks(environ: Mapping[str, str]) -> Ranks:
    """From torchrun's variables; one rank without them.

    Raises:
        UnusableInput: for variables that are missing or contradict each other.
    """
    if environ.get("WORLD_SIZE", "1") == "1":
        return Ranks()
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT"):
        text = environ.get(name, "0" if name == "TORCHELASTIC_RESTART_COUNT" else "")
        if not (text.isascii() and text.isdecimal()):
            raise UnusableInput(f"{name}={text} cannot be used: start several ranks with torchrun, which sets it")
        numbers[name] = int(text)
    rank, size, local_rank, local_size, attempt, port = numbers.values()
    if not (rank < size and local_rank < local_size <= size and environ.get("MASTER_ADDR")):
        raise UnusableInput(
            f"rank {rank} of {size}, {local_rank} of {local_size} here, meeting at {environ.get('MASTER_ADDR')!r}: "
            "these variables are not torchrun's; start several ranks with it"
        )
    agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Ranks(
        rank, size, local_rank, local_size, attempt, environ["MASTER_ADDR"], port, keeps_store=rank == 0 and not agent
    )


def field_of(variable: str) -> str:
    """The field of :class:`Settings` that a ``WSM_*`` variable sets."""
    return variable.removeprefix("WSM_").lower()


def spelled(field: str) -> str:
    """How the user spells a field: as the variable or the flag that sets it."""
    variable = f"WSM_{field.upper()}"
    return variable if variable in WSM_PRESETS else f"--{field.replace('_', '-')}"


def preset_environment(environ: MutableMapping[str, str]) -> None:
    """Set what the user has not set. Must run before torch is imported, since OpenMP reads its variable once."""
    for name, preset in PRESETS.items():
        environ.setdefault(name, preset)
    if environ.get("WORLD_SIZE", "1") != "1":
        # The watch ends a job that lost a rank, with a sentence; NCCL's own watchdog would kill it without.
        environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")


def set_by_user(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The presets' names that are in ``environ`` already; ask before :func:`preset_environment`."""
    return tuple(name for name in PRESETS if name in environ)


ECHOED_ONLY = ("CUDA_VISIBLE_DEVICES",)
"""Read by CUDA and not here; told because it renumbers the devices."""


def environment_echo(environ: Mapping[str, str]) -> dict[str, str | None]:
    """The variables in force, for the JSON; None for one that is not set and has no preset."""
    preset = {name: environ.get(name, preset) for name, preset in PRESETS.items()}
    return {**preset, **{name: environ.get(name) for name in ECHOED_ONLY}}


def read_settings(flags: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[Settings, list[str]]:
    """Settings from flags (by field name; None counts as not given, other names are passed over) and variables.

    Returns:
        The settings, and warnings about ``WSM_*`` names that nothing reads.

    Raises:
        UnusableInput: for a flag or variable with a value that it does not allow.
    """
    for name in ("OMP_NUM_THREADS", "MALLOC_ARENA_MAX"):
        _read(name, environ.get(name, PRESETS[name]), _whole(1))
    values: dict[str, Any] = {}
    for name, preset in WSM_PRESETS.items():
        values[field_of(name)] = _read(name, environ.get(name, preset), KINDS_OF_VALUE[field_of(name)])
    given = {name: value for name, value in flags.items() if name in KINDS_OF_VALUE and value is not None}
    return Settings(**{**values, **given}), _unknown_variables(environ)


def _read(name: str, text: str, kind: KindOfValue) -> Any:
    try:
        value = kind.read(text)
        if kind.allowed(value):
            return value
    except ValueError:
        pass
    raise UnusableInput(f"{name}={text} cannot be used: it must be {kind.says}")


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    warnings = []
    for name in sorted(environ):
        if name.startswith("WSM_") and name not in WSM_PRESETS:
            close = difflib.get_close_matches(name, WSM_PRESETS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            warnings.append(f"the variable {name} is not known and has no effect{hint}")
    return warnings
