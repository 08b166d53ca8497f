"""The engine's settings: flags and ``WSM_*`` variables, declared and read once. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

from wsm.errors import UnusableInput
from wsm.option import SWITCH, Kind, meant, number, one_of, option, options_of, whole

MODES = ("mixed", "stream", "preload", "full")
VerifyWhen = Literal["auto", "first", "always"]
_GIB = number(0, 1e6, above=True, says="a number of GiB above 0, at most 1e+06", metavar="GIB")
_flag, _variable = partial(option, group="paging"), partial(option, by_variable=True)


@dataclass(frozen=True, slots=True)
class Settings:
    """How a model is paged: flags (the guide's command line as defaults), then variables.

    Raises UnusableInput for a value that is not allowed, naming the flag or variable, the value and what is allowed.
    """

    mode: str = _flag("mixed", one_of(*MODES), "the tiers that layers pass through")
    prefetch_distance: int = _flag(6, whole(1), "SSD layers read ahead: sizes the CPU pools")
    group_prefetch_depth: int = _flag(4, whole(1), "groups of CPU to GPU look-ahead: sizes the GPU pools")
    gpu_cached_layers: int = _flag(4, whole(0), "layers resident on the GPU")
    cpu_cache_layers: int = _flag(40, whole(1), "layers of page-locked memory in all: pools first, the rest resident")
    warmup_layers: int = _flag(4, whole(0), "layers staged on the GPU before the first pass")
    staging_mb: int = _flag(64, whole(1), "SSD bytes in flight, in MB, used up to 134; takes no GPU memory")
    verify_weights: VerifyWhen = _flag(
        "auto",
        one_of(*get_args(VerifyWhen)),
        "check what comes from the SSD tier at every read, or at the first; auto: at every one where the drive is "
        "slower than the checks",
        alone="always",
    )
    embedding: Literal["gpu", "cpu"] = _flag(
        "gpu", one_of("gpu", "cpu"), "where the token embedding is; not for `full`, nor where it is the head too"
    )
    gpu_mem_gb: float | None = _flag(None, _GIB, "GPU memory to use, the CUDA context included", shown="all free")
    cpu_mem_gb: float | None = _flag(None, _GIB, "CPU memory to use, in GiB", shown="all free")

    cpu_rolling_mode: bool = _variable(True, SWITCH, "0: the SSD is read on demand, for comparison")
    cpu_evict: Literal["belady", "fifo"] = _variable(
        "belady", one_of("belady", "fifo"), "fixed residents, or one window over all CPU layers, for comparison"
    )
    cpu_wrap_around: bool = _variable(True, SWITCH, "1: after the last layer, reading goes on with the next pass")
    cpu_roll_sync: bool = _variable(
        True, SWITCH, "a CPU slot is read into again when, 1: the compute enters its layer, 0: it is copied out"
    )
    aggressive_gpu_prefetch: int = _variable(2, whole(0), "least number of groups kept ahead on the GPU")
    gpu_max_groups: int = _variable(10, whole(2), "most groups in the GPU pools")
    skip_preload_wait: bool = _variable(True, SWITCH, "1: the warm-up starts while residents are still loading")
    evict_finished: bool = _variable(True, SWITCH, "0: a finished group stays until its slot is needed")
    kv_throttle_threshold: int = _variable(8, whole(1), "wanted groups from which on a KV write-back pauses first")
    kv_throttle_ms: float = _variable(16.0, number(0, 1e3, says="0 to 1000 milliseconds"), "how long it pauses")
    balance_prefetch: bool = _variable(True, SWITCH, "1: a later group of the other kind may overtake a held-up one")
    balance_tol: int = _variable(1, whole(0), "by how many groups it may")
    pair_ahead: int = _variable(2, whole(0), "how many layers on such a group may be")
    kind_ahead_cap: int = _variable(2, whole(0), "with balance off: the most layers that one kind may run ahead")

    def __post_init__(self) -> None:
        for name, declared in options_of(type(self)).items():
            declared.check(getattr(self, name))


CHOSEN = frozenset({"gpu_cached_layers", "group_prefetch_depth", "cpu_cache_layers", "prefetch_distance", "embedding"})
"""The settings that ``--auto`` decides."""

_VARIABLES = {declared.spelled: declared for declared in options_of(Settings).values() if declared.by_variable}
WSM_PRESETS: Mapping[str, str] = {name: declared.default_text for name, declared in _VARIABLES.items()}


def threads_of(cores: int, ranks: int = 1) -> int:
    """Torch's CPU threads in each of a host's ``ranks``: 8, at most its share of the cores, at least 1."""
    return max(1, min(8, cores // ranks))


_CORES = len(os.sched_getaffinity(0))
THREADS: Mapping[str, tuple[str, str, str]] = {
    "OMP_NUM_THREADS": (str(threads_of(_CORES)), "8, at most a rank's share of the cores", "CPU threads of torch"),
    "MALLOC_ARENA_MAX": ("2", "2", "fewer malloc arenas"),
}
"""Variables of libraries: the preset, in words, and what it is for."""
PRESETS: Mapping[str, str] = {**{name: preset for name, (preset, _, _) in THREADS.items()}, **WSM_PRESETS}
"""What the script sets where the user has not."""


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
    """From torchrun's variables, else one rank; raises UnusableInput if any is missing or contradicts others."""
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
    keeps_store = rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return Ranks(rank, size, local_rank, local_size, attempt, environ["MASTER_ADDR"], port, keeps_store)


def preset_environment(environ: MutableMapping[str, str]) -> tuple[str, ...]:
    """Set what the user has not set; the presets' names that were. Before torch: OpenMP reads its variable once."""
    several = environ.get("WORLD_SIZE", "1") != "1"
    if several and _torchrun_set_threads(environ):
        del environ["OMP_NUM_THREADS"]
    set_by_user = tuple(name for name in PRESETS if name in environ)
    local_size = environ.get("LOCAL_WORLD_SIZE", "1")  # what is no number of ranks is refused later, with a sentence
    if several and local_size.isascii() and local_size.isdecimal() and len(local_size) < 9:
        environ.setdefault("OMP_NUM_THREADS", str(threads_of(_CORES, max(1, int(local_size)))))
    for name, preset in PRESETS.items():
        environ.setdefault(name, preset)
    if several:
        # The watch ends a job that lost a rank, with a sentence; NCCL's own watchdog would kill it without.
        environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    return set_by_user


def _torchrun_set_threads(environ: Mapping[str, str]) -> bool:
    """Whether OMP_NUM_THREADS is torchrun's own 1 for several ranks of a host, and no value of the user's.

    The user's was there when torchrun began: the system still knows with what. Its ranks, and scripts that it started
    and that start them, have the name of its run. Where the system does not tell, the value is taken for the user's.
    """
    run = "TORCHELASTIC_RUN_ID"
    if run not in environ or environ.get("OMP_NUM_THREADS") != "1":
        return False
    import psutil

    try:
        began_with = (process.environ() for process in psutil.Process().parents())
        launcher = next((variables for variables in began_with if run not in variables), None)
    except (psutil.Error, OSError, RuntimeError):
        return False
    if not launcher:  # none, or one that has just ended and has no variables at all
        return False
    return "OMP_NUM_THREADS" not in launcher


ECHOED_ONLY = ("CUDA_VISIBLE_DEVICES",)
"""Read by CUDA and not here; in the JSON because it renumbers the devices."""


def environment_echo(environ: Mapping[str, str]) -> dict[str, str | None]:
    """The variables in force, for the JSON; None for one that is not set and has no preset."""
    return {name: environ.get(name, PRESETS.get(name)) for name in (*PRESETS, *ECHOED_ONLY)}


def read_variables(environ: Mapping[str, str]) -> dict[str, Any]:
    """The fields of :class:`Settings` that variables set; raises UnusableInput for a value that is not allowed."""
    for name in THREADS:
        _read(name, environ.get(name, PRESETS[name]), whole(1))
    given = {name: declared for name, declared in _VARIABLES.items() if name in environ}
    return {declared.name: _read(name, environ[name], declared.kind) for name, declared in given.items()}


def _read(name: str, text: str, kind: Kind) -> Any:
    return kind.parse(
        text, lambda: UnusableInput(f"{name}={text} cannot be used: it must be {kind.says}{meant(text, kind.words)}")
    )


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A warning for each ``WSM_*`` name that nothing reads."""
    warnings = []
    for name in sorted(environ):
        if name.startswith("WSM_") and name not in WSM_PRESETS:
            warnings.append(f"the variable {name} is not known and has no effect{meant(name, WSM_PRESETS)}")
    return warnings
