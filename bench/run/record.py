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
import psutil
import torch

from bench.options.run_flags import RunOptions
from bench.result.fields import ByPhase, Mode
from bench.result.types import (
    MOST_TOKENS,
    SCHEMA_VERSION,
    Config,
    GpuPeak,
    Manager,
    Output,
    Result,
    Setting,
    SpecialTokens,
)
from bench.result.types_machine import (
    KV,
    BytesPerPass,
    Checks,
    KVTier,
    LoadSeconds,
    MatricesInFormat,
    Memory,
    Planned,
    Residency,
    Tier,
    Weights,
)
from bench.result.types_phases import Ceilings, DecodedWeights, Phase, Rate
from bench.run import warnings
from bench.run.conditions import Watch
from bench.run.measure import Round, checks_of, link_rates, load_rate, metrics_of, phases_of, repeats_of, tpot_of
from bench.run.provenance import collect
from bench.run.speculation import agreement_warnings, speculation_of
from llama.generation import Generation
from llama.llm import LLaMA
from llama.sampling import SAMPLER
from wsm.option import options_of
from wsm.plan.decoding import decoded_layouts
from wsm.plan.time import Ceiling, predicted_pass_ms
from wsm.settings import Settings, environment_echo
from wsm.store.description import DTYPE_FORMATS, DTYPE_NAMES


@dataclasses.dataclass(slots=True)
class Progress:
    """What a run's result is made of, as far as it has got, for an interrupted one too; round ``chosen`` counts."""

    argv: Sequence[str]
    user_set: Sequence[str]
    prompts: list[list[int]]
    warnings: list[str]
    ceilings: dict[str, Ceiling] = dataclasses.field(default_factory=dict)
    rounds: list[Round] = dataclasses.field(default_factory=list)
    stopped_by: int | None = None  # the signal's number
    failure: Exception | None = None  # what ended a round after others were finished
    chosen: int = 0
    watch: Watch = dataclasses.field(default_factory=lambda: Watch(torch.device("cpu"), ()))

    @property
    def interrupted(self) -> bool:
        return self.stopped_by is not None or self.failure is not None


def result_of(options: RunOptions, llm: LLaMA, got: Progress) -> Result:
    """The result of this process; of several ranks, :mod:`bench.run.ranks` makes it the job's."""
    chosen = got.rounds[got.chosen]
    generation = chosen.generation
    phases = phases_of(llm, chosen, got.prompts, got.ceilings, predicted_pass_ms(llm.plan, got.ceilings))
    speculation, kv = speculation_of(llm, chosen, got.prompts, phases.decode), _kv(options, llm)
    memory, store = _memory(llm), llm.inputs.description
    drive = Path(store.targets[0]) if store is not None else None
    provenance, missing = collect(llm.inputs.checkpoint, llm.inputs.device, options.seed, drive)
    return Result(
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        prompt_lens=[len(prompt) for prompt in got.prompts],
        prefill_tokens_total=generation.prefill_tokens,
        decode_tokens_total=generation.decode_tokens,
        **msgspec.structs.asdict(metrics_of(chosen)),
        io_bw_MBps=link_rates(phases),
        gpu_mem_GB=gpu_peak(memory.gpu_peak_allocated_bytes, memory.gpu_peak_reserved_bytes),
        mode=cast(Mode, llm.settings.mode),
        device=str(llm.inputs.device),
        wsm=_manager(llm),
        total_tok_s=chosen.total_tok_s,
        schema_version=SCHEMA_VERSION,
        interrupted=got.interrupted,
        decode_forward_passes=generation.decode_passes,
        special_tokens=_special_tokens(options, llm),
        tpot_ms=tpot_of(chosen.pass_ms),
        phases=phases,
        ceilings=Ceilings(**{name: Rate(**dataclasses.asdict(rate)) for name, rate in got.ceilings.items()}),
        weights=_weights(llm, phases.decode),
        residency=_residency(llm, chosen),
        plan=_planned(llm),
        memory=memory,
        load_s=_load_seconds(llm),
        load=load_rate(llm.telemetry.load_reads if llm.manager is not None else None, got.ceilings),
        checks=_checks(llm, chosen),
        kv=kv,
        speculation=speculation,
        config=_config(options, llm, got),
        provenance=provenance,
        conditions=got.watch.conditions,
        output=_output(options, llm, generation),
        repeats=repeats_of(got.rounds),
        parallel=None,
        warnings=[
            *_warnings(options, llm, got, phases, missing),
            *agreement_warnings(speculation, generation.decode_tokens),
            *warnings.blocks_left_out(kv),
        ],
    )


def _manager(llm: LLaMA) -> Manager:
    from_ssd, most = "SSD" in llm.plan.way, llm.settings.gpu_max_groups
    return Manager(enabled=llm.manager is not None, ssd_enabled=from_ssd, gpu_max_groups=most)


def _output(options: RunOptions, llm: LLaMA, generation: Generation) -> Output:
    tokens, keeps = generation.tokens, generation.decode_tokens <= MOST_TOKENS
    return Output(
        sha256=hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
        sampler=SAMPLER,
        texts=[llm.tokenizer.decode(row) for row in tokens] if options.print_text else None,
        tokens=tokens if keeps else None,
        margins=(generation.margins or None) if keeps else None,
    )


def _warnings(
    options: RunOptions, llm: LLaMA, got: Progress, phases: ByPhase[Phase], missing: Sequence[str]
) -> Iterator[str]:
    """What came up on the way, then what makes the figures doubtful; ``missing`` is of the provenance."""
    chosen, named = got.rounds[got.chosen], msgspec.structs.asdict(phases)
    yield from got.warnings
    yield from llm.warnings
    yield from warnings.early_ends(list(map(len, chosen.generation.tokens)), options.max_new_tokens)
    yield from warnings.plan_warnings(named, BytesPerPass(**llm.plan.bytes_per_pass))
    yield from warnings.beaten_floors(named)
    yield from warnings.disturbed_ceilings(named)
    if llm.inputs.device.type == "cuda":
        yield from warnings.prediction_warnings(named)
    yield from warnings.drive_warnings(chosen.stretches[1].read_rates)
    yield from warnings.steadiness_warnings([metrics_of(timed).e2e_ms for timed in got.rounds])
    yield from got.watch.warnings
    yield from missing
    yield from warnings.unmeasured(llm.inputs.device, got.ceilings, named, no_probe=options.no_probe)


def _special_tokens(options: RunOptions, llm: LLaMA) -> SpecialTokens:
    if options.prompt_len is not None or options.chat:
        return SpecialTokens(before=[], after=[])
    return SpecialTokens(before=list(llm.tokenizer.prefix), after=list(llm.tokenizer.suffix))


def gpu_peak(allocated_bytes: int | None, reserved_bytes: int | None) -> GpuPeak:
    """In GiB."""
    allocated, reserved = (None if n is None else n / 2**30 for n in (allocated_bytes, reserved_bytes))
    return GpuPeak(allocated_GB=allocated, reserved_GB=reserved)


def _weights(llm: LLaMA, decode: Phase) -> Weights:
    inputs, weight_format, decoded = llm.plan.inputs, llm.inputs.weight_format, decode.decoded_weights
    timed = decoded.ms if isinstance(decoded, DecodedWeights) else None
    return Weights(
        weight_format=llm.inputs.format_name,
        by_format=_by_format(llm),
        exact=weight_format is None or weight_format.exact,
        rest_bytes=inputs.layers_bytes(range(inputs.config.n_layers)),
        decoded_bytes=sum(layout.nbytes for group, layout in decoded_layouts(inputs).items() if group is not None),
        decode_ms=timed / decode.passes if timed is not None and decode.passes else None,
    )


def _by_format(llm: LLaMA) -> list[MatricesInFormat]:
    found: dict[str, list[int]] = {}
    for layout in (layout for group, layout in llm.plan.inputs.layouts.items() if group is not None):
        for tensor in layout.tensors:
            if len(tensor.shape) == 2:
                found.setdefault(tensor.format or DTYPE_FORMATS[tensor.dtype], []).append(tensor.nbytes)
    return [
        MatricesInFormat(weight_format=name, matrices=len(sizes), rest_bytes=sum(sizes))
        for name, sizes in sorted(found.items())
    ]


def _residency(llm: LLaMA, chosen: Round) -> Residency:
    placement, held = llm.plan.placement, llm.plan.inputs.layers_bytes
    layers = {tier: getattr(placement.residency, tier) for tier in ("gpu", "cpu", "ssd")}
    return Residency(
        **{tier: Tier(layers=len(named), bytes=held(named)) for tier, named in layers.items()},
        gpu_slots=placement.gpu_slots,
        cpu_slots=placement.cpu_slots,
        complete_at_start=chosen.complete_at_start,
    )


def _planned(llm: LLaMA) -> Planned:
    plan = llm.plan
    return Planned(
        bytes_per_pass=BytesPerPass(**plan.bytes_per_pass),
        weight_decode_bytes=plan.decoded_bytes["decode"],
        scratch_bytes=plan.decoding.scratch_bytes,
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
    device = llm.inputs.device
    on_gpu, process = device.type == "cuda", psutil.Process().memory_info()
    return Memory(
        gpu_peak_allocated_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        gpu_peak_reserved_bytes=torch.cuda.max_memory_reserved(device) if on_gpu else None,
        gpu_context_bytes=llm.plan.inputs.hardware.gpu_context_bytes if on_gpu else None,
        cpu_page_locked_bytes=llm.page_locked_bytes,
        cpu_page_locked_peak_bytes=llm.page_locked_peak_bytes,
        rss_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        rss_anon_bytes=process.rss - process.shared,
    )


def _load_seconds(llm: LLaMA) -> LoadSeconds:
    parts: dict[str, Any] = {name: llm.load_times.parts.get(name) for name in LoadSeconds.__struct_fields__}
    if llm.manager is not None:
        parts["residents_s"] = llm.manager.residents_s
    return LoadSeconds(**parts)


def _checks(llm: LLaMA, chosen: Round) -> Checks | None:
    checks = checks_of(llm)
    if checks is None:
        return None
    passes = sum(len(stretch.passes) for stretch in chosen.stretches)
    return Checks(
        rule=checks.rule,
        read_MBps=checks.read_MBps,
        check_MBps=checks.check_MBps,
        bytes_per_pass=chosen.checked.nbytes / passes,
        ms_per_pass=1e3 * chosen.checked.cpu_s / passes,
    )


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


def _config(options: RunOptions, llm: LLaMA, got: Progress) -> Config:
    """``resolved``: what was asked for, as far as there are layers, what ``--auto`` chose, and what was found."""
    chosen = {name: getattr(llm.settings, name) for name in options_of(Settings)}
    chosen.update(llm.plan.placement.clipped)
    found: dict[str, Setting] = {
        "dtype": DTYPE_NAMES[llm.inputs.dtype],
        "weight_format": llm.inputs.format_name,
        "device": str(llm.inputs.device),
        "model": llm.config.name,
        "tp": llm.inputs.world.shard.size,
    }
    return Config(
        argv=list(got.argv),
        resolved={**options.to_json(), **chosen, **found},
        environment=environment_echo(os.environ),
        environment_set_by_user=list(got.user_set),
    )
