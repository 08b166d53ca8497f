"""A run's result, assembled from what was planned, measured and seen."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import torch

from bench.options.run_flags import RunOptions
from bench.result.fields import ByPhase, Mode
from bench.result.types import SCHEMA_VERSION, Config, GpuPeak, Manager, Output, Result, Setting
from bench.result.types_machine import (
    KV,
    BytesPerPass,
    Drive,
    KVTier,
    LoadSeconds,
    Memory,
    Planned,
    Provenance,
    Residency,
    Tier,
)
from bench.result.types_phases import Ceilings, Phase, Rate
from bench.run.conditions import Watch
from bench.run.measure import Round, link_rates, load_rate, metrics_of, phases_of, repeats_of, tpot_of
from bench.run.provenance import collect
from bench.run.warnings import (
    beaten_floors,
    drive_warnings,
    plan_warnings,
    prediction_warnings,
    steadiness_warnings,
    unmeasured,
)
from llama.llm import LLaMA
from wsm.option import options_of
from wsm.plan.time import Ceiling, predicted_pass_ms
from wsm.settings import Settings, environment_echo
from wsm.store.description import DTYPE_NAMES


@dataclasses.dataclass(slots=True)
class Progress:
    """What a run has got so far, for the result of an interrupted one too; round ``chosen`` counts."""

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
) -> Result:
    """The result of this process; of several ranks, :mod:`bench.run.ranks` makes it the job's."""
    chosen = got.rounds[got.chosen]
    phases = phases_of(llm, chosen, prompts, got.ceilings, predicted_pass_ms(llm.plan, got.ceilings))
    memory, (provenance, missing) = _memory(llm), _provenance(options, llm)
    return Result(
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        prompt_lens=[len(prompt) for prompt in prompts],
        prefill_tokens_total=chosen.generation.prefill_tokens,
        decode_tokens_total=chosen.generation.decode_tokens,
        **msgspec.structs.asdict(metrics_of(chosen)),
        io_bw_MBps=link_rates(phases),
        gpu_mem_GB=gpu_peak(memory.gpu_peak_allocated_bytes, memory.gpu_peak_reserved_bytes),
        mode=cast(Mode, llm.settings.mode),
        device=str(llm.inputs.device),
        wsm=_manager(llm),
        total_tok_s=chosen.total_tok_s,
        schema_version=SCHEMA_VERSION,
        interrupted=got.interrupted,
        decode_forward_passes=chosen.generation.decode_passes,
        tpot_ms=tpot_of(chosen.pass_ms),
        phases=phases,
        ceilings=Ceilings(**{name: Rate(**dataclasses.asdict(rate)) for name, rate in got.ceilings.items()}),
        residency=_residency(llm, chosen),
        plan=_planned(llm),
        memory=memory,
        load_s=_load_seconds(llm),
        load=load_rate(llm.telemetry.reads if llm.manager is not None else None, got.ceilings),
        kv=_kv(options, llm),
        config=_config(options, argv, user_set, llm),
        provenance=provenance,
        conditions=got.watch.conditions,
        output=_output(options, llm, chosen.generation.tokens),
        repeats=repeats_of(got.rounds),
        parallel=None,
        warnings=[*warnings, *_warnings(llm, got, phases, missing)],
    )


def _warnings(llm: LLaMA, got: Progress, phases: ByPhase[Phase], missing: Sequence[str]) -> Iterator[str]:
    """What makes the figures doubtful; ``missing`` is of the provenance."""
    chosen, named = got.rounds[got.chosen], msgspec.structs.asdict(phases)
    yield from plan_warnings(named, BytesPerPass(**llm.plan.bytes_per_pass))
    yield from beaten_floors(named)
    if llm.inputs.device.type == "cuda":
        yield from prediction_warnings(named)
    yield from drive_warnings(llm.telemetry.reads, (chosen.prefill_done, chosen.done))
    yield from steadiness_warnings([timed.e2e_ms for timed in got.rounds])
    yield from got.watch.warnings
    yield from missing
    yield from unmeasured(llm.inputs.device, got.ceilings, phases.decode)


def gpu_peak(allocated_bytes: int | None, reserved_bytes: int | None) -> GpuPeak:
    """In GiB."""
    return GpuPeak(
        allocated_GB=None if allocated_bytes is None else allocated_bytes / 2**30,
        reserved_GB=None if reserved_bytes is None else reserved_bytes / 2**30,
    )


def _manager(llm: LLaMA) -> Manager:
    return Manager(
        enabled=llm.manager is not None,
        ssd_enabled=bool(llm.plan.placement.residency.ssd),
        gpu_max_groups=llm.settings.gpu_max_groups,
    )


def _residency(llm: LLaMA, chosen: Round) -> Residency:
    placement, layer = llm.plan.placement, llm.plan.inputs.slot_bytes()

    def tier(layers: Sequence[int]) -> Tier:
        return Tier(layers=len(layers), bytes=len(layers) * layer)

    return Residency(
        gpu=tier(placement.residency.gpu),
        cpu=tier(placement.residency.cpu),
        ssd=tier(placement.residency.ssd),
        gpu_slots=placement.gpu_slots,
        cpu_slots=placement.cpu_slots,
        complete_at_start=chosen.complete_at_start,
    )


def _planned(llm: LLaMA) -> Planned:
    plan = llm.plan
    return Planned(
        bytes_per_pass=BytesPerPass(**plan.bytes_per_pass),
        chunk_tokens=plan.chunk_tokens,
        wave_rows=plan.wave_rows,
        stretch_rows=plan.kv.layout.stretch_rows,
        notes=list(plan.notes),
        gpu_bytes=plan.gpu_bytes,
        gpu_budget_bytes=plan.gpu_budget_bytes,
        cpu_page_locked_bytes=plan.page_locked_bytes,
        cpu_budget_bytes=plan.cpu_budget_bytes,
    )


def _memory(llm: LLaMA) -> Memory:
    device, (locked, locked_peak) = llm.inputs.device, llm.page_locked_bytes
    on_gpu = device.type == "cuda"
    return Memory(
        gpu_peak_allocated_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        gpu_peak_reserved_bytes=torch.cuda.max_memory_reserved(device) if on_gpu else None,
        gpu_context_bytes=llm.plan.inputs.hardware.gpu_context_bytes if on_gpu else None,
        cpu_page_locked_bytes=locked,
        cpu_page_locked_peak_bytes=locked_peak,
        rss_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        rss_anon_bytes=_rss_anon(),
    )


def _rss_anon() -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _load_seconds(llm: LLaMA) -> LoadSeconds:
    parts: dict[str, Any] = {name: llm.load_times.parts.get(name) for name in LoadSeconds.__struct_fields__}
    if llm.manager is not None:
        parts["residents_s"] = llm.manager.residents_s
    return LoadSeconds(**parts)


def _kv(options: RunOptions, llm: LLaMA) -> KV:
    placed, tiers = llm.plan.kv, llm.kv_tiers
    fraction = tiers.fraction_fetched if tiers is not None else None
    places = {"gpu": placed.gpu, "cpu": placed.cpu, "disk": placed.disk}
    return KV(
        device=str(llm.inputs.device),
        dtype=DTYPE_NAMES[llm.inputs.dtype] if options.kv_dtype == "auto" else options.kv_dtype,
        topk_blk=options.topk_blk,
        fraction_fetched=1.0 if fraction is None else fraction,
        exact=fraction is None or fraction == 1.0,
        stretch_rows=placed.layout.stretch_rows,
        **{name: KVTier(parts=len(parts), bytes=placed.bytes_of(parts)) for name, parts in places.items()},
        throttle_pauses=tiers.pauses if tiers is not None else 0,
    )


def _config(options: RunOptions, argv: Sequence[str], user_set: Sequence[str], llm: LLaMA) -> Config:
    """``resolved``: what was asked for, what ``--auto`` chose, and what was found."""
    chosen = {name: getattr(llm.settings, name) for name in options_of(Settings)}
    found: dict[str, Setting] = {
        "dtype": DTYPE_NAMES[llm.inputs.dtype],
        "device": str(llm.inputs.device),
        "model": llm.config.name,
        "tp": llm.inputs.world.shard.size,
    }
    return Config(
        argv=list(argv),
        resolved={**options.to_json(), **chosen, **found},
        environment=environment_echo(os.environ),
        environment_set_by_user=list(user_set),
    )


def _provenance(options: RunOptions, llm: LLaMA) -> tuple[Provenance, list[str]]:
    """And a warning for each thing that could not be had."""
    store = Path(llm.inputs.description.targets[0]) if llm.inputs.description is not None else None
    found, missing = collect(llm.inputs.checkpoint, llm.inputs.device, options.seed, store)
    drive = Drive(**found["drive"]) if found["drive"] is not None else None
    return Provenance(**{**found, "drive": drive}), missing


def _output(options: RunOptions, llm: LLaMA, tokens: Sequence[Sequence[int]]) -> Output:
    return Output(
        sha256=hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
        texts=[llm.tokenizer.decode(row) for row in tokens] if options.print_text else None,
    )
