"""The parts of a result about memory and machine: plan, residency, loading, KV, provenance, conditions."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct

from bench.result.fields import Above0, Amount, Count, FromOne, Later, Part, Texts, says

Share = Annotated[float, Meta(ge=0, le=1)]
Percent = Annotated[float, Meta(ge=0, le=100)]
Moment = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]


class Tier(Part, frozen=True, kw_only=True):
    layers: Annotated[Count, says("layers that live there")]
    bytes: Annotated[Count, says("bytes of their weights")]


class Residency(Part, frozen=True, kw_only=True):
    """where the layers live"""

    gpu: Annotated[Tier, says("layers resident on the GPU")]
    cpu: Annotated[Tier, says("layers resident in CPU memory")]
    ssd: Annotated[Tier, says("layers read from the SSD every pass")]
    gpu_slots: Annotated[Count, says("layers that the GPU pools hold besides")]
    cpu_slots: Annotated[Count, says("layers that the CPU pools hold besides")]
    complete_at_start: Annotated[bool, says("whether every resident was in its tier when the clock started")]


class MatricesInFormat(Part, frozen=True, kw_only=True):
    """the layers' matrices that lie in one format"""

    weight_format: Annotated[str, says("the weight format, or the dtype where they are plain")]
    matrices: Annotated[Count, says("how many there are")]
    rest_bytes: Annotated[Count, says("bytes of them at rest")]


class Weights(Part, frozen=True, kw_only=True):
    """how the layers' weights lie on every tier"""

    weight_format: Annotated[
        str, says("the weight format, or the dtype where they are plain (docs/FORMATS.md); of a mix a+b")
    ]
    by_format: Later[
        Annotated[
            list[Annotated[MatricesInFormat, says("a format and its matrices")]],
            says("each format that matrices lie in"),
        ]
    ] = UNSET
    exact: Annotated[bool, says("whether they are the checkpoint's, converted to the dtype, bit for bit")]
    rest_bytes: Annotated[Count, says("bytes of all layers at rest")]
    decoded_bytes: Annotated[Count, says("bytes of the same in the dtype that is computed in")]
    decode_ms: Annotated[
        Amount | None,
        says("ms in which weights were decoded, of a mean decode pass; null where none were, or not timed"),
    ]


class BytesPerPass(Part, frozen=True, kw_only=True):
    """bytes that a pass was planned to take"""

    ssd_read: Annotated[Count, says("bytes from the SSD")]
    weight_h2d: Annotated[Count, says("bytes of weights to the GPU")]
    hbm_read: Annotated[Count, says("bytes of weights read from the device's memory")]
    kv_h2d: Annotated[Count, says("bytes of KV to the GPU, of a decode pass half-way")] = 0
    kv_read: Annotated[Later[Count], says("bytes of KV from --kv-device, of a decode pass half-way")] = UNSET


class Planned(Part, frozen=True, kw_only=True):
    """what was planned before anything large was allocated"""

    bytes_per_pass: BytesPerPass
    weight_decode_bytes: Annotated[Later[Count], says("bytes that decoding weights makes in a decode pass")] = UNSET
    scratch_bytes: Annotated[Later[Count], says("bytes of GPU memory for decoded weights, shared by all layers")] = (
        UNSET
    )
    chunk_tokens: Annotated[FromOne, says("tokens of a prompt computed at a time inside one load of a layer")]
    wave_rows: Annotated[FromOne, says("rows of the batch computed at a time in the prefill")]
    stretch_rows: Annotated[Later[FromOne], says("rows whose KV is moved and attended together")] = UNSET
    notes: Annotated[Texts, says("what was clipped or chosen otherwise than asked")]
    gpu_bytes: Annotated[Count, says("bytes of GPU memory planned")]
    gpu_budget_bytes: Annotated[Count | None, says("bytes of GPU memory allowed; null on the CPU")]
    cpu_page_locked_bytes: Annotated[Count, says("bytes of page-locked CPU memory planned, those of loading included")]
    cpu_budget_bytes: Annotated[Count, says("bytes of CPU memory allowed")]


class Memory(Part, frozen=True, kw_only=True):
    """what was taken"""

    gpu_peak_allocated_bytes: Annotated[Count | None, says("bytes, most that torch had allocated; null on the CPU")]
    gpu_peak_reserved_bytes: Annotated[Count | None, says("bytes, most that torch had reserved; null on the CPU")]
    gpu_context_bytes: Annotated[Count | None, says("bytes of the CUDA context; null on the CPU")]
    cpu_page_locked_bytes: Annotated[Count, says("page-locked bytes in the rounds (CPU device: the same, not locked)")]
    cpu_page_locked_peak_bytes: Annotated[Count, says("bytes, the most of it at any time, loading included")]
    rss_peak_bytes: Annotated[Count, says("bytes, most CPU memory of the process, mapped files included")]
    rss_anon_bytes: Annotated[Count | None, says("bytes of it at the end, without mapped files; null off Linux")]


class LoadSeconds(Part, frozen=True, kw_only=True):
    """seconds before the first timed round, and of what; null for what did not take place"""

    kv_s: Annotated[Amount | None, says("s: allocating the KV cache")]
    draft_s: Later[Annotated[Amount | None, says("s: loading the draft")]] = UNSET
    open_store_s: Annotated[Amount | None, says("s: opening the packed store or the checkpoint")]
    allocate_s: Annotated[Amount | None, says("s: taking pools and residents in CPU and GPU memory")]
    populate_s: Annotated[Amount | None, says("s: of that, touching the CPU pages")]
    page_lock_s: Annotated[Amount | None, says("s: of that, page-locking them (CUDA)")]
    probe_s: Annotated[Amount | None, says("s: measuring the ceilings, or reading them from the cache")]
    globals_s: Annotated[Amount | None, says("s: loading embeddings, the last norm and the head")]
    stage_s: Annotated[Amount | None, says("s: waiting for the layers staged before the first pass")] = None
    warmup_s: Annotated[Amount | None, says("s: warm-up rounds")]
    residents_s: Annotated[
        Amount | None, says("s until all residents were there (full: the model), warming up meanwhile")
    ]
    from_process_start_s: Annotated[Amount, says("s from the start of the process to the first timed round")]


class LoadRate(Part, frozen=True, kw_only=True):
    """how fast the residents came in, through the manager"""

    read_bytes: Annotated[Count | None, says("bytes of residents read from store or checkpoint; null for full")]
    read_MBps: Annotated[
        Above0 | None,
        says("10^6 bytes/s from the first of these reads to the last, groups streamed meanwhile included"),
    ]
    ssd_pct: Annotated[
        Above0 | None,
        says("percent of ceilings.ssd, at most 100; null without, or beyond 105"),
    ]


class Checks(Part, frozen=True, kw_only=True):
    """checksums of what comes from the SSD tier (--verify-weights); null where nothing was read from a packed store"""

    rule: Annotated[
        Literal["first", "always"] | None,
        says("what was in force: a check at a group's first read, or at every one; null: auto, before it had decided"),
    ]
    read_MBps: Annotated[Above0 | None, says("10^6 bytes/s that the drive gave while a group was read, from the start")]
    check_MBps: Annotated[Above0 | None, says("10^6 bytes/s that one thread checks, in CPU time")]
    bytes_per_pass: Annotated[Amount, says("bytes that were checked, a pass of this round")]
    ms_per_pass: Annotated[Amount, says("CPU ms of the checking threads, a pass of this round; beside the computation")]


class KVTier(Part, frozen=True, kw_only=True):
    parts: Annotated[Count, says("parts, a layer and a stretch of rows each")]
    bytes: Annotated[Count, says("their bytes, room for new tokens included")]


class KV(Part, frozen=True, kw_only=True):
    """the KV cache"""

    device: Annotated[str, says("the compute device")]
    dtype: Annotated[Later[str], says("how keys and values are stored: the model's dtype, or int8")] = UNSET
    topk_blk: Annotated[Count, says("--topk-blk, KV blocks per step from below the GPU; 0: all")]
    fraction_fetched: Annotated[Share, says("of the KV blocks below the GPU, what decode steps fetched; 1: none below")]
    exact: Annotated[bool, says("whether every step attended over the whole context")]
    stretch_rows: Annotated[
        Later[FromOne], says("rows whose KV is moved and attended together; a part is a layer's KV of so many rows")
    ] = UNSET
    gpu: Annotated[Later[KVTier], says("KV that stays on the GPU")] = UNSET
    cpu: Annotated[Later[KVTier], says("KV in page-locked CPU memory")] = UNSET
    disk: Annotated[Later[KVTier], says("KV on --kv-device")] = UNSET
    throttle_pauses: Annotated[Count, says("times a write-back let the weights go first (WSM_KV_THROTTLE_*)")] = 0


class Drive(Part, frozen=True, kw_only=True):
    """the drive of the packed store; null without one"""

    device: Annotated[str | None, says("block device; null where none is known behind the filesystem (tmpfs, overlay)")]
    model: Annotated[str | None, says("its model, if it says so")]
    rotational: Annotated[bool | None, says("whether it says that it rotates")]
    filesystem: Annotated[str | None, says("what the packed file is on; null for a device itself")] = None


class Provenance(Part, frozen=True, kw_only=True):
    """code, libraries and machine; what could not be had is null, with a line in warnings"""

    git_commit: Annotated[str | None, says("commit of this program; null outside a git checkout")]
    git_dirty: Annotated[bool | None, says("whether tracked files had been changed; null outside a git checkout")]
    torch: Annotated[str, says("torch version")]
    cuda: Annotated[str | None, says("CUDA version of torch; null for a CPU build")]
    python: Annotated[str, says("Python version")]
    gpu: Annotated[str | None, says("GPU's name; null on the CPU")]
    driver: Annotated[str | None, says("NVIDIA driver version; null on the CPU")]
    pcie_gen: Annotated[FromOne | None, says("PCIe generation now; null on the CPU")]
    pcie_gen_max: Annotated[FromOne | None, says("highest PCIe generation; null on the CPU")]
    pcie_width: Annotated[FromOne | None, says("PCIe lanes now; null on the CPU")]
    pcie_width_max: Annotated[FromOne | None, says("most PCIe lanes; null on the CPU")]
    cpu: Annotated[str | None, says("CPU's name")]
    cpu_cores: Annotated[FromOne, says("cores that the process may use")]
    ram_bytes: Annotated[FromOne, says("bytes of CPU memory in the machine")]
    numa_node: Annotated[
        Count | None, says("always null: nothing is bound to a NUMA node any more; older results have the GPU's")
    ] = None
    drive: Drive | None
    kernel: Annotated[str, says("Linux kernel")]
    seed: Annotated[Count, says("of random ids and sampling")]
    model_digest: Annotated[str | None, says("digest of the checkpoint's files")]
    utc: Annotated[Moment, says("when the result was made, ISO 8601 in UTC")]


class Conditions(Struct, kw_only=True):
    """what else went on in the timed rounds; null where it does not apply or, with a warning, could not be had"""

    clock_samples: Annotated[FromOne | None, says("how often the GPU's clocks were looked at, every 500 ms")] = None
    throttled_samples: Annotated[Count | None, says("how often they were throttled; above a tenth: a warning")] = None
    throttle_reasons: Annotated[Texts | None, says("power cap, hardware slowdown, power brake, or heat")] = None
    gpu_other_processes: Annotated[Count | None, says("other processes on the GPU before or after, the larger")] = None
    drive_other_bytes: Annotated[
        Count | None, says("bytes that others read and wrote on the store's drives; null where no layer is on the SSD")
    ] = None
    cpu_other_pct: Annotated[Percent | None, says("of all cores' time, what others and the hypervisor took")] = None
