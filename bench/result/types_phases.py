"""The parts of a result about time and bytes: phases, ceilings, and what several ranks measured."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta
from msgspec.structs import force_setattr

from bench.result.fields import (
    Above0,
    Amount,
    ByPhase,
    Count,
    Later,
    Part,
    Texts,
    believed,
    says,
)
from wsm.plan.time import Bound

_ROOFLINE = (
    "percent, at most 100: 100 * floor_ms / {}; null without a floor, and where the run or its tier beat it by over 5 %"
)
Range = Annotated[list[Annotated[Amount, says("an end, in ms")]], Meta(min_length=2, max_length=2)]
Over5 = Annotated[float, Meta(gt=5)]


class Traffic(Part, frozen=True, kw_only=True):
    ssd_read: Annotated[Count, says("bytes from the SSD to CPU memory")]
    weight_h2d: Annotated[Count, says("bytes of weights from CPU to GPU memory")]
    kv_h2d: Annotated[Count, says("bytes of KV from CPU to GPU memory")]
    kv_d2h: Annotated[Count, says("bytes of KV from GPU to CPU memory")]
    kv_read: Annotated[Count, says("bytes of KV from --kv-device to CPU memory")] = 0
    kv_write: Annotated[Count, says("bytes of KV from CPU memory to --kv-device")] = 0


class Busy(Part, frozen=True, kw_only=True):
    """ms in which each tier worked, overlaps counted once; null where it was not measured"""

    kv_h2d: Annotated[Amount | None, says("ms in which KV was copied to the GPU; null where none was")]
    kv_d2h: Annotated[Amount | None, says("ms in which KV was copied from the GPU; null where none was")]
    kv_read: Annotated[Amount | None, says("ms in which KV was read from --kv-device; null where none was")] = None
    kv_write: Annotated[Amount | None, says("ms in which KV was written to --kv-device; null where none was")] = None
    ssd: Annotated[Amount | None, says("ms in which at least one SSD read was under way; null where nothing was read")]
    h2d: Annotated[Amount | None, says("ms in which weights were copied to the GPU; null where none ever were")]
    compute: Annotated[Amount | None, says("ms in which a layer was computed, waits for KV not counted; null for full")]


class Stall(Part, frozen=True, kw_only=True):
    """ms that the next tier waited for this one; null where it was not measured"""

    ssd: Annotated[Amount | None, says("ms in which the link could have copied, had the SSD's bytes been there")]
    h2d: Annotated[Amount | None, says("ms in which the computation waited for weights to be copied")]
    kv: Annotated[Amount | None, says("ms in which it waited for KV from below the GPU; null if all is there")] = None


class Idle(Part, frozen=True, kw_only=True):
    """ms in which a tier did nothing, waited for or not: wall_ms less busy_ms; null where it was not measured"""

    ssd: Annotated[Amount | None, says("ms in which no SSD read was under way")]
    h2d: Annotated[Amount | None, says("ms in which neither weights nor KV were copied to the GPU")]
    compute: Annotated[
        Amount | None,
        says("ms between layers: embedding, head, sampling, read-back; wall_ms less busy_ms and its stalls"),
    ]


class DecodedWeights(Part, frozen=True, kw_only=True):
    """weights that were decoded on the GPU just before their products"""

    ms: Annotated[Amount | None, says("ms, part of busy_ms.compute; null where it was not measured (CUDA graphs)")]
    bytes: Annotated[Count, says("bytes that decoding made; 0 where products took packed weights, or none were left")]


class Phase(Part, frozen=True, kw_only=True):
    wall_ms: Annotated[Amount, says("ms that the phase took")]
    passes: Annotated[Count, says("forward passes: times every layer was run")]
    bytes: Annotated[Traffic, says("bytes that the passes used, whenever they were fetched; compared with the plan")]
    bytes_moved: Annotated[
        Traffic, says("bytes that moved in the phase, without what was staged before it: the floor comes from these")
    ]
    busy_ms: Busy
    stall_ms: Stall
    idle_ms: Idle
    flops: Annotated[Count, says("floating-point operations of the phase, counted from the model's shape")]
    hbm_bytes: Annotated[
        Count, says("fewest bytes read from device memory: every weight once per pass; in the decode all KV so far too")
    ]
    decoded_weights: Annotated[Later[DecodedWeights], says("weights decoded just before their products")] = UNSET
    floor_ms: Annotated[
        Amount | None,
        says(
            "ms that `bytes_moved` (of KV at most `bytes`) and operations need at the ceilings, of the slowest rank; "
            "null where not known"
        ),
    ]
    predicted_ms: Annotated[
        Above0 | None,
        says("ms expected from the probe's medians where a link or drive bounds streamed passes; else null"),
    ] = None
    predicted_range_ms: Annotated[
        Range | None, says("the same from the probe's best and slowest samples; alone where these vary by over 25 %")
    ] = None
    bound_by: Annotated[Bound | None, says("the resource that sets floor_ms; null with it")]
    roofline_pct: Annotated[Above0 | None, says(_ROOFLINE.format("wall_ms"))]
    ceiling_spread_pct: Annotated[
        Over5 | None, says("percent: spread of the ceiling behind floor_ms, if above 5; above 25 there is a warning")
    ]

    def __post_init__(self) -> None:
        force_setattr(self, "roofline_pct", believed(self.roofline_pct))

    @property
    def beats_floor(self) -> bool:
        """Whether it, or the tier behind its floor, took less by more than noise: so a ceiling was measured too low."""
        return self.floor_ms is not None and self.roofline_pct is None and self.wall_ms > 0

    @property
    def bound_busy_ms(self) -> float | None:
        """Time in which the link or drive behind the floor worked; None where that was not measured, or is none."""
        link = None if self.idle_ms.h2d is None else self.wall_ms - self.idle_ms.h2d
        busy = {"h2d": link, "d2h": self.busy_ms.kv_d2h}
        busy |= {tier: getattr(self.busy_ms, tier) for tier in ("ssd", "kv_read", "kv_write")}
        return busy.get(self.bound_by or "")


class Rate(Part, frozen=True, kw_only=True):
    value: Annotated[Above0, says("best rate of the samples, in `unit`: a floor may not be beaten")]
    median: Annotated[Later[Above0], says("their median, in `unit`")] = UNSET
    unit: Annotated[Literal["MBps", "TFLOPs"], says("10^6 bytes per second, or 10^12 operations per second")]
    spread_pct: Annotated[Amount, says("percent: (highest - lowest sample) / median")]
    how: Annotated[str, says("what was timed, and from when if it is of an earlier run")]


class Ceilings(Part, frozen=True, kw_only=True):
    """best rates of this machine, measured in the run's own memory; what the mode does not use is left out"""

    hbm: Annotated[Later[Rate], says("reading the device's memory")] = UNSET
    matmul: Annotated[Later[Rate], says("matrix products on the device; on a GPU back to back for seconds")] = UNSET
    matmul_burst: Annotated[
        Later[Rate], says("a few of them from rest: floors count the first half second of arithmetic at this rate")
    ] = UNSET
    h2d: Annotated[Later[Rate], says("copies from CPU to GPU memory")] = UNSET
    d2h: Annotated[Later[Rate], says("copies from GPU to CPU memory")] = UNSET
    h2d_d2h: Annotated[Later[Rate], says("copies both ways at once, their sum")] = UNSET
    weight_decode: Annotated[Later[Rate], says("decoding weights, in bytes of what it makes")] = UNSET
    ssd: Annotated[Later[Rate], says("SSD reads as the run makes them")] = UNSET
    h2d_with_ssd: Annotated[Later[Rate], says("copies from CPU to GPU memory while the SSD is read")] = UNSET
    kv_read: Annotated[Later[Rate], says("reads of --kv-device as the run makes them")] = UNSET
    kv_write: Annotated[Later[Rate], says("writes to --kv-device as the run makes them")] = UNSET
    h2d_with_kv: Annotated[Later[Rate], says("copies from CPU to GPU memory while --kv-device is read")] = UNSET


# -- several ranks


class RankPhase(Part, frozen=True, kw_only=True):
    wall_ms: Annotated[Amount, says("ms that the phase took on this rank")]
    bytes: Annotated[Traffic, says("bytes that this rank's passes used")]
    bytes_moved: Annotated[Traffic, says("bytes that moved on this rank between the phase's first and last moment")]
    busy_ms: Annotated[Busy, says("ms in which each of this rank's tiers worked, as in `phases`")]
    stall_ms: Annotated[Stall, says("ms that the next tier waited for this one, as in `phases`")]
    idle_ms: Annotated[Idle, says("ms in which a tier did nothing, as in `phases`")]
    floor_ms: Annotated[Amount | None, says("ms: as in `phases`, from this rank's own bytes and ceilings")]
    bound_by: Annotated[Bound | None, says("the resource that sets this rank's floor_ms")]
    roofline_pct: Annotated[Above0 | None, says(_ROOFLINE.format("this rank's wall_ms"))] = None
    collectives_ms: Annotated[
        Amount | None,
        says("ms in sums and gathers over the ranks, with waiting for the slowest rank; null in CUDA graphs"),
    ]
    collectives: Annotated[Count, says("sums and gathers in the phase, but for those in CUDA graphs")]


class JobPhase(Part, frozen=True, kw_only=True):
    bytes: Annotated[Traffic, says("bytes that the passes of all ranks used, together")]
    floor_ms: Annotated[
        Amount | None,
        says("ms: the floor of the slowest rank, each over its own links, all measured at once; null where not known"),
    ]
    bound_by: Annotated[Bound | None, says("the resource that sets floor_ms")]
    bound_rank: Annotated[Count | None, says("the rank that sets floor_ms")]
    roofline_pct: Annotated[Above0 | None, says(_ROOFLINE.format("rank 0's wall_ms"))]
    collectives: Annotated[Count, says("sums and gathers of a rank, but for those in CUDA graphs")]
    collectives_ms: Annotated[
        Amount | None,
        says("ms in them on the rank that waits least: what they take themselves; null in CUDA graphs"),
    ]
    collectives_pct: Annotated[Amount | None, says("percent of rank 0's wall_ms: 100 * collectives_ms / wall_ms")]

    def __post_init__(self) -> None:
        force_setattr(self, "roofline_pct", believed(self.roofline_pct))


class Rank(Part, frozen=True, kw_only=True):
    rank: Annotated[Count, says("its number")]
    host: Annotated[str, says("its host's name")]
    device: Annotated[str, says("its compute device")]
    gpu: Annotated[str | None, says("its GPU's name; null on the CPU")]
    numa_node: Annotated[Count | None, says("always null, as in `provenance`")]
    gpu_peak_allocated_bytes: Annotated[Count | None, says("most GPU memory that torch had given out; null on the CPU")]
    gpu_peak_reserved_bytes: Annotated[Count | None, says("most GPU memory that torch had taken; null on the CPU")]
    cpu_page_locked_bytes: Annotated[Count, says("bytes of page-locked CPU memory that it holds")]
    ceilings_MBps: Annotated[dict[str, float], says("its rates, 10^6 bytes per second, all ranks measuring at once")]
    phases: Annotated[ByPhase[RankPhase], says("what it moved and waited for in each phase")]
    warnings: Annotated[Texts, says("what it warns of")]


RankOrGone = Annotated[Rank | None, says("a rank; null for one that was gone after Ctrl-C")]


class Parallel(Part, frozen=True, kw_only=True):
    """several ranks (tensor parallel); null for one process. Beside it, the guide's keys and the floors in `phases` are
    the whole job's, everything else is rank 0's
    """

    world_size: Annotated[int, Meta(ge=2), says("ranks")]
    hosts: Annotated[Texts, Meta(min_length=1), says("the names of the hosts")]
    cpu_page_locked_bytes: Annotated[dict[str, int], says("by host, of all its ranks: one copy of the CPU tier")]
    phases: Annotated[ByPhase[JobPhase], says("the phases of the whole job")]
    ranks: Annotated[list[RankOrGone], Meta(min_length=2), says("every rank, in order")]
