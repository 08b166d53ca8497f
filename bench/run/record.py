"""Assembling the JSON of a run from what was measured."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.options.flags import RunOptions
from bench.result.results import SCHEMA_VERSION
from bench.result.spread import steadiness_warnings
from bench.run.conditions import Watch
from bench.run.measure import Round, phases_of
from bench.run.phases import (
    beaten_floors,
    drive_warnings,
    io_part,
    load_part,
    phase_part,
    plan_warnings,
    prediction_warnings,
    repeats_part,
    round_metrics,
    tpot_part,
)
from bench.run.provenance import collect
from llama.llm import LLaMA
from wsm.engine.telemetry import PhaseStats
from wsm.plan.time import Ceiling, predicted_pass_ms
from wsm.settings import Settings, environment_echo
from wsm.store.description import DTYPE_NAMES


@dataclasses.dataclass(slots=True)
class Progress:
    """What a run has got so far, so that an interrupted one can still be written; round ``chosen`` counts."""

    ceilings: dict[str, Ceiling]
    rounds: list[Round]
    interrupted: bool = False
    chosen: int = 0
    watch: Watch = dataclasses.field(default_factory=lambda: Watch(torch.device("cpu"), ()))


def result_of(
    options: RunOptions,
    argv: Sequence[str],
    user_set: Sequence[str],
    llm: LLaMA,
    prompts: list[list[int]],
    got: Progress,
    warnings: list[str],
) -> dict[str, Any]:
    chosen = got.rounds[got.chosen]
    stats = dict(zip(("prefill", "decode"), phases_of(llm, chosen, prompts), strict=True))
    store = Path(llm.inputs.description.targets[0]) if llm.inputs.description is not None else None
    provenance, missing = collect(llm.inputs.checkpoint, llm.inputs.device, options.seed, store)
    settings, predicted = llm.settings, predicted_pass_ms(llm.plan, got.ceilings)
    tokens = chosen.generation.tokens
    return {
        **_fixed(options, llm, prompts, chosen, list(stats.values())),
        "schema_version": SCHEMA_VERSION,
        "interrupted": got.interrupted,
        "decode_forward_passes": chosen.generation.decode_passes,
        "tpot_ms": tpot_part(chosen.pass_ms),
        "phases": {name: phase_part(phase, got.ceilings, predicted[name]) for name, phase in stats.items()},
        "ceilings": {name: dataclasses.asdict(ceiling) for name, ceiling in got.ceilings.items()},
        "residency": _residency(llm, chosen),
        "plan": _planned(llm),
        "memory": _memory(llm),
        "load_s": _load(llm),
        "load": load_part(llm.telemetry.reads if llm.manager is not None else None, got.ceilings),
        "kv": _kv(llm),
        "config": {
            "argv": list(argv),
            "resolved": _resolved(options, settings, llm),
            "environment": environment_echo(os.environ),
            "environment_set_by_user": list(user_set),
        },
        "provenance": provenance,
        "conditions": got.watch.conditions.as_json(),
        "output": {
            "sha256": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
            "texts": [llm.tokenizer.decode(row) for row in tokens] if options.print_text else None,
        },
        "repeats": repeats_part(got.rounds),
        "parallel": None,
        "warnings": [
            *warnings,
            *plan_warnings(stats, llm.plan.bytes_per_pass),
            *beaten_floors(stats, got.ceilings),
            *(prediction_warnings(stats, predicted) if llm.inputs.device.type == "cuda" else ()),
            *drive_warnings(llm.telemetry.reads, (chosen.prefill_done, chosen.done)),
            *steadiness_warnings([timed.prefill_ms + timed.decode_ms for timed in got.rounds]),
            *got.watch.warnings,
            *missing,
            *_unmeasured(llm.inputs.device, got.ceilings, stats["decode"]),
        ],
    }


def _unmeasured(device: torch.device, ceilings: Mapping[str, Ceiling], decode: PhaseStats) -> Iterator[str]:
    """Why figures are null or mean little."""
    if not ceilings:
        yield "no ceilings (--no-probe, and none of this hardware in the cache): floor and roofline are not known"
    elif "ssd" not in ceilings and decode.bytes_moved["ssd_read"]:
        yield "the SSD could not be probed in so little CPU memory: floor and roofline are not known"
    if device.type != "cuda":
        yield "the compute device is the CPU: GPU figures are null, and roofline_pct is informative only"


def _fixed(
    options: RunOptions, llm: LLaMA, prompts: list[list[int]], chosen: Round, stats: Sequence[PhaseStats]
) -> dict[str, Any]:
    """The keys that stay as they always were."""
    return {
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
        "prompt_lens": [len(prompt) for prompt in prompts],
        **round_metrics(chosen),
        "io_bw_MBps": io_part(stats),
        "gpu_mem_GB": _gpu_mem(llm.inputs.device),
        "mode": llm.settings.mode,
        "device": str(llm.inputs.device),
        "wsm": {
            "enabled": llm.manager is not None,
            "ssd_enabled": bool(llm.plan.placement.residency.ssd),
            "gpu_max_groups": llm.settings.gpu_max_groups,
        },
    }


def _gpu_mem(device: torch.device) -> dict[str, float | None]:
    if device.type != "cuda":
        return {"allocated_GB": None, "reserved_GB": None}
    return {
        "allocated_GB": torch.cuda.max_memory_allocated(device) / 2**30,
        "reserved_GB": torch.cuda.max_memory_reserved(device) / 2**30,
    }


def _residency(llm: LLaMA, chosen: Round) -> dict[str, Any]:
    residency, layer = llm.plan.placement.residency, llm.plan.inputs.slot_bytes()
    tiers = {"gpu": residency.gpu, "cpu": residency.cpu, "ssd": residency.ssd}
    return {
        **{tier: {"layers": len(layers), "bytes": len(layers) * layer} for tier, layers in tiers.items()},
        "gpu_slots": llm.plan.placement.gpu_slots,
        "cpu_slots": llm.plan.placement.cpu_slots,
        "complete_at_start": chosen.complete_at_start,
    }


def _kv(llm: LLaMA) -> dict[str, Any]:
    placed, tiers = llm.plan.kv, llm.kv_tiers
    fraction = tiers.fraction_fetched if tiers is not None else None
    units = {"gpu": placed.gpu, "cpu": placed.cpu, "disk": placed.disk}
    options = llm.inputs.options
    return {
        "device": str(llm.inputs.device),
        "dtype": DTYPE_NAMES[llm.inputs.dtype] if options.kv_dtype == "auto" else options.kv_dtype,
        "topk_blk": options.topk_blk,
        "fraction_fetched": 1.0 if fraction is None else fraction,
        "exact": fraction is None or fraction == 1.0,
        "stretch_rows": placed.layout.stretch_rows,
        **{tier: {"parts": len(parts), "bytes": placed.bytes_of(parts)} for tier, parts in units.items()},
        "throttle_pauses": tiers.pauses if tiers is not None else 0,
    }


def _planned(llm: LLaMA) -> dict[str, Any]:
    return {
        "bytes_per_pass": dict(llm.plan.bytes_per_pass),
        "chunk_tokens": llm.plan.chunk_tokens,
        "wave_rows": llm.plan.wave_rows,
        "stretch_rows": llm.plan.kv.layout.stretch_rows,
        "notes": list(llm.plan.notes),
        "gpu_bytes": llm.plan.gpu_bytes,
        "gpu_budget_bytes": llm.plan.gpu_budget_bytes,
        "cpu_page_locked_bytes": llm.plan.page_locked_bytes,
        "cpu_budget_bytes": llm.plan.cpu_budget_bytes,
    }


def _memory(llm: LLaMA) -> dict[str, Any]:
    device = llm.inputs.device
    on_gpu = device.type == "cuda"
    context = llm.plan.inputs.hardware.gpu_context_bytes
    return {
        "gpu_peak_allocated_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "gpu_peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if on_gpu else None,
        "gpu_context_bytes": context if on_gpu else None,
        "cpu_page_locked_bytes": llm.page_locked_bytes,
        "cpu_page_locked_peak_bytes": llm.page_locked_peak_bytes,
        "rss_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "rss_anon_bytes": _rss_anon(),
    }


def _rss_anon() -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


_LOAD_PARTS = (
    "kv_s",
    "open_store_s",
    "allocate_s",
    "populate_s",
    "page_lock_s",
    "probe_s",
    "globals_s",
    "stage_s",
    "warmup_s",
)


def _load(llm: LLaMA) -> dict[str, float | None]:
    return {
        **{name: llm.load_times.parts.get(name) for name in _LOAD_PARTS},
        "residents_s": llm.manager.residents_s if llm.manager is not None else llm.load_times.parts["residents_s"],
        "from_process_start_s": llm.load_times.parts["from_process_start_s"],
    }


def _resolved(options: RunOptions, settings: Settings, llm: LLaMA) -> dict[str, Any]:
    values = {**dataclasses.asdict(options), **dataclasses.asdict(settings)}
    values.pop("engine")
    values["dtype"], values["device"] = DTYPE_NAMES[llm.inputs.dtype], str(llm.inputs.device)
    values["model"], values["tp"] = llm.config.name, llm.inputs.world.shard.size
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
