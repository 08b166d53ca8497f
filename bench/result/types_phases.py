"""The parts of a result about time and bytes: phases, ceilings, and what several ranks measured."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta

from bench.result.fields import Above0, Amount, Bound, ByPhase, Count, Later, Part, says


class Traffic(Part, frozen=True, kw_only=True):
    """bytes between the tiers"""

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
    compute: Annotated[
        Amount | None, "ms in which a layer was computed, waits for KV not counted; null without a manager (full)"
    ]


class Stall(Part, frozen=True, kw_only=True):
    """ms that the next tier waited for this one; null where it was not measured"""

    ssd: Annotated[Amount | None, says("ms in which the link could have copied, had the SSD's bytes been there")]
    h2d: Annotated[Amount | None, says("ms in which the computation waited for weights to be copied")]
    kv: Annotated[
        Amount | None, "ms in which the computation waited for KV from below the GPU; null where all of it is there"
    ] = None


class Idle(Part, frozen=True, kw_only=True):
    """ms in which a tier did nothing, waited for or not: wall_ms less busy_ms (compute: less its stall too); null where
    it was not measured
    """

    ssd: Annotated[Amount | None, says("ms in which no SSD read was under way")]
    h2d: Annotated[Amount | None, says("ms in which neither weights nor KV were copied to the GPU")]
    compute: Annotated[
        Amount | None,
        says(
            "ms in which no layer waited or was computed: embedding, head, sampling, read-back; with busy_ms.compute, "
            "stall_ms.h2d and stall_ms.kv it makes up wall_ms"
        ),
    ]


class Phase(Part, frozen=True, kw_only=True):
    """one phase of the round of median e2e_ms"""

    wall_ms: Annotated[Amount, says("ms that the phase took")]
    passes: Annotated[Count, says("forward passes: times every layer was run")]
    bytes: Annotated[
        Traffic, says("bytes that the phase's passes used, whenever they were fetched; compared with the plan")
    ]
    bytes_moved: Annotated[
        Traffic,
        says(
            "bytes that moved between the phase's first and last moment; the floor comes from these, without what was "
            "staged before the clock started"
        ),
    ]
    busy_ms: Busy
    stall_ms: Stall
    idle_ms: Idle
    flops: Annotated[Count, says("floating-point operations of the phase, counted from the model's shape")]
    hbm_bytes: Annotated[
        Count,
        says("fewest bytes read from the device's memory: every weight once per pass, and in the decode all KV so far"),
    ]
    floor_ms: Annotated[
        Amount | None,
        says(
            "ms below which these bytes and operations cannot get at the ceilings; null where a ceiling that is needed "
            "is not known; of several ranks, the slowest one's"
        ),
    ]
    predicted_ms: Annotated[
        Above0 | None,
        says(
            "ms that the planner expects, from the probe's medians, of streamed passes that a link or drive bounds; "
            "else null"
        ),
    ] = None
    bound_by: Annotated[Bound | None, says("the resource that sets floor_ms; null with it")]
    roofline_pct: Annotated[Above0 | None, says("percent: 100 * floor_ms / wall_ms; null without a floor")]
    ceiling_spread_pct: Annotated[
        Annotated[float, Meta(gt=5)] | None,
        says("percent: spread of the ceiling behind floor_ms, if above 5; null otherwise"),
    ]


class Ceiling(Part, frozen=True, kw_only=True):
    """the best rate of one resource"""

    value: Annotated[Above0, says("best rate of the samples, in `unit`: a floor may not be beaten")]
    median: Annotated[Later[Above0], says("their median, in `unit`")] = UNSET
    unit: Annotated[
        Literal["MBps", "TFLOPs"], says("MBps is 10^6 bytes per second, TFLOPs is 10^12 operations per second")
    ]
    spread_pct: Annotated[Amount, says("percent: (highest - lowest sample) / median")]
    how: Annotated[str, says("what was timed, and from when if it is of an earlier run")]


class Ceilings(Part, frozen=True, kw_only=True, omit_defaults=True):
    """best rates of this machine, measured in the run's own memory; what the mode does not use is left out"""

    hbm: Annotated[Later[Ceiling], says("reading the device's memory")] = UNSET
    matmul: Annotated[Later[Ceiling], says("matrix products on the device")] = UNSET
    h2d: Annotated[Later[Ceiling], says("copies from CPU to GPU memory")] = UNSET
    d2h: Annotated[Later[Ceiling], says("copies from GPU to CPU memory")] = UNSET
    h2d_d2h: Annotated[Later[Ceiling], says("copies both ways at once, their sum")] = UNSET
    ssd: Annotated[Later[Ceiling], says("SSD reads as the run makes them")] = UNSET
    h2d_with_ssd: Annotated[Later[Ceiling], says("copies from CPU to GPU memory while the SSD is read")] = UNSET


# -- several ranks


class RankPhase(Part, frozen=True, kw_only=True):
    """one phase on one rank"""

    wall_ms: Annotated[Amount, says("ms that the phase took on this rank")]
    bytes: Annotated[Traffic, says("bytes that this rank's passes used")]
    bytes_moved: Annotated[Traffic, says("bytes that moved on this rank between the phase's first and last moment")]
    busy_ms: Annotated[Busy, says("ms in which each of this rank's tiers worked, as in `phases`")]
    stall_ms: Annotated[Stall, says("ms that the next tier waited for this one, as in `phases`")]
    idle_ms: Annotated[Idle, says("ms in which a tier did nothing, as in `phases`")]
    floor_ms: Annotated[
        Amount | None,
        says(
            "ms below which this rank's bytes and operations cannot get at its own ceilings; null where one is not "
            "known"
        ),
    ]
    bound_by: Annotated[Bound | None, says("the resource that sets this rank's floor_ms")]
    collectives_ms: Annotated[
        Amount, says("ms in sums and gathers over the ranks, waiting for the slowest rank included")
    ]
    collectives: Annotated[Count, says("sums and gathers in the phase")]


class JobPhase(Part, frozen=True, kw_only=True):
    """one phase of all ranks together"""

    bytes: Annotated[Traffic, says("bytes that the passes of all ranks used, together")]
    floor_ms: Annotated[
        Amount | None,
        says(
            "ms: the floor of the slowest rank, each over its own links, whose ceilings were measured at the same "
            "time; null where one is not known"
        ),
    ]
    bound_by: Annotated[Bound | None, says("the resource that sets floor_ms")]
    bound_rank: Annotated[Count | None, says("the rank that sets floor_ms")]
    roofline_pct: Annotated[Above0 | None, says("percent: 100 * floor_ms / rank 0's wall_ms; null without a floor")]
    collectives: Annotated[Count, says("sums and gathers of a rank")]
    collectives_ms: Annotated[
        Amount, "ms in sums and gathers on the rank that waits least in them: what they take themselves"
    ]
    collectives_pct: Annotated[Amount | None, says("percent of rank 0's wall_ms: 100 * collectives_ms / wall_ms")]


class Rank(Part, frozen=True, kw_only=True):
    """a rank; null for one that was gone after Ctrl-C"""

    rank: Annotated[Count, says("its number")]
    host: Annotated[str, says("its host's name")]
    device: Annotated[str, says("its compute device")]
    gpu: Annotated[str | None, says("its GPU's name; null on the CPU")]
    numa_node: Annotated[
        Count | None, "the NUMA node that it was bound to, its GPU's; null where there is one node or it is not known"
    ]
    gpu_peak_allocated_bytes: Annotated[
        Count | None, "peak bytes of GPU memory that torch had given out on it; null on the CPU"
    ]
    gpu_peak_reserved_bytes: Annotated[
        Count | None, "peak bytes of GPU memory that torch had taken on it; null on the CPU"
    ]
    cpu_page_locked_bytes: Annotated[Count, says("bytes of page-locked CPU memory that it holds")]
    ceilings_MBps: Annotated[
        dict[str, float], "its rates, in 10^6 bytes per second, all ranks measuring at the same time"
    ]
    phases: Annotated[ByPhase[RankPhase], says("what it moved and waited for in each phase")]
    warnings: Annotated[list[Annotated[str, says("a sentence")]], says("what it warns of")]


class Parallel(Part, frozen=True, kw_only=True):
    """several ranks (tensor parallel); null for one process. Beside it, the guide's keys and the floors in `phases` are
    the whole job's, everything else is rank 0's
    """

    world_size: Annotated[int, Meta(ge=2), says("ranks")]
    hosts: Annotated[list[Annotated[str, says("a host's name")]], Meta(min_length=1), says("the names of the hosts")]
    cpu_page_locked_bytes: Annotated[
        dict[str, int],
        says("bytes of page-locked CPU memory of all ranks of a host, by the host's name: one copy of the CPU tier"),
    ]
    phases: Annotated[ByPhase[JobPhase], says("the phases of the whole job")]
    ranks: Annotated[list[Rank | None], Meta(min_length=2), says("every rank, in order")]
