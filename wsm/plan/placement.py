"""Which layer lives in which tier, and how many slots the rest passes through.

Keeping a fixed set and streaming the rest is what Belady's rule gives for a cyclic scan; residents are spread evenly
over the pass, which asks the SSD and the link for bytes at a steady rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from wsm.option import options_of
from wsm.settings import Settings

LOADING_SLOTS = 2
"""Staging slots per kind where there is no CPU pool, used only while GPU residents load: one fills, another is copied.
CPU residents' homes serve as such until they are read; what is missing then is memory for loading alone.
"""


@dataclass(frozen=True, slots=True)
class Residency:
    """The layers of each tier, ascending. ``ssd`` layers pass through CPU slots, ``cpu`` layers stay there."""

    gpu: tuple[int, ...]
    cpu: tuple[int, ...]
    ssd: tuple[int, ...]

    @property
    def n_layers(self) -> int:
        return len(self.gpu) + len(self.cpu) + len(self.ssd)

    @property
    def streamed_layers(self) -> int:
        """Layers that pass through GPU slots."""
        return len(self.cpu) + len(self.ssd)


@dataclass(frozen=True, slots=True)
class Placement:
    """Residency and pools of a run. Slots are counted per kind.

    ``clipped`` has the values in force of what was asked for beyond them, by setting; ``notes`` say so.
    """

    mode: str
    residency: Residency
    gpu_slots: int
    cpu_slots: int
    read_ahead_layers: int
    staged_layers: int
    clipped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def ssd_layers_a_pass(self) -> int:
        """Layers read from the SSD in a steady pass: none where the fifo window holds them all."""
        streamed = len(self.residency.ssd)
        return streamed if self.cpu_slots < streamed else 0

    @property
    def cpu_layers(self) -> int:
        """Layers of page-locked memory in all."""
        return len(self.residency.cpu) + self.cpu_slots

    @property
    def loading_slots(self) -> int:
        """Slots per kind of page-locked memory that only loading needs."""
        missing = max(0, LOADING_SLOTS - len(self.residency.cpu))
        return missing if self.residency.gpu and not self.cpu_slots else 0


def spread(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """``count`` of ``layers``, at distances over their cycle that differ by at most 1 (Bresenham's line)."""
    n = len(layers)
    return tuple(layers[(2 * i + 1) * n // (2 * count)] for i in range(count))


def place(n_layers: int, settings: Settings) -> Placement:
    """Residency and pools for a model of ``n_layers``.

    With L layers, G on the GPU, C layers of CPU memory and P read ahead: `belady` keeps C - P residents and P slots,
    `fifo` one window of C slots; neither needs the SSD where C >= L - G. GPU slots follow from the look-ahead in
    groups, capped by ``WSM_GPU_MAX_GROUPS`` and by what streams at all.
    """
    clips: list[_Clip] = []
    mode = settings.mode
    if mode in ("full", "preload"):
        everything = tuple(range(n_layers))
        return Placement(mode, Residency(everything, (), ()), 0, 0, 0, n_layers)
    gpu = spread(range(n_layers), _clip("gpu_cached_layers", settings, n_layers, clips))
    rest = sorted({*range(n_layers)} - {*gpu})
    cpu, slots, ahead = _cpu_tier(mode, rest, settings, clips)
    residency = Residency(gpu, cpu, tuple(sorted({*rest} - {*cpu})))
    depth = max(settings.group_prefetch_depth, settings.aggressive_gpu_prefetch)
    gpu_slots = min(depth // 2 + 1, settings.gpu_max_groups // 2, len(rest))
    staged = _staged(n_layers, residency, gpu_slots, settings, ahead, clips)
    in_force = {clip.setting: clip.value for clip in clips}
    asked_for = settings.warmup_layers != options_of(Settings)["warmup_layers"].default  # no default model has so many
    notes = tuple(clip.note for clip in clips if asked_for or clip.setting != "warmup_layers")
    return Placement(mode, residency, gpu_slots, slots, ahead, staged, in_force, notes)


class _Clip(NamedTuple):
    """A setting that was cut to ``value``."""

    setting: str
    value: int
    note: str


def _clip(name: str, settings: Settings, limit: int, clips: list[_Clip], what: str = "") -> int:
    asked: int = getattr(settings, name)
    if asked > limit:
        clips.append(_Clip(name, limit, f"--{name.replace('_', '-')} {asked} clipped to {limit}{what}"))
    return min(asked, limit)


def _cpu_tier(mode: str, rest: list[int], settings: Settings, clips: list[_Clip]) -> tuple[tuple[int, ...], int, int]:
    """CPU residents, CPU slots per kind, and layers read ahead."""
    if mode == "stream" or not rest:
        return tuple(rest), 0, 0
    cached = _clip("cpu_cache_layers", settings, len(rest), clips)
    if settings.cpu_evict == "belady" and cached >= len(rest):
        return tuple(rest), 0, 0
    ahead = _clip("prefetch_distance", settings, cached, clips, ", the layers of CPU memory")
    if settings.cpu_evict == "fifo":
        return (), cached, ahead
    return spread(rest, cached - ahead), ahead, ahead


def _staged(
    n_layers: int, residency: Residency, gpu_slots: int, settings: Settings, ahead: int, clips: list[_Clip]
) -> int:
    """How many first layers can be on the GPU before the first pass: at most ``warmup_layers``, bound by the slots."""
    # The read-ahead bounds them too, where a CPU slot is held until the compute enters its layer.
    wanted, staged = settings.warmup_layers, 0
    slots, reads = gpu_slots, ahead if settings.cpu_roll_sync else n_layers
    while staged < min(wanted, n_layers):
        slots -= staged not in residency.gpu
        reads -= staged in residency.ssd
        if slots < 0 or reads < 0:
            break
        staged += 1
    return _clip("warmup_layers", settings, staged, clips, ", what residents and slots hold")
