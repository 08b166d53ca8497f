"""The verb ``run``: plan, build, warm up, measure, write."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from bench import ceilings as ceilings_of
from bench.flags import RunOptions
from bench.measure import Round, Sampling, phases_of, run_round, warm_up
from bench.prompts import DEFAULT_FILE, fill_batch, random_prompts, read_prompts, tokenize
from bench.provenance import collect
from bench.results import (
    SCHEMA_VERSION,
    dump,
    io_part,
    median_round,
    phase_part,
    plan_warnings,
    repeats_part,
    round_metrics,
    tpot_part,
)
from bench.summary import ConsoleReporter, row, summary
from llama.build import BuildOptions, Inputs, LLaMA, open_inputs, plan_run
from llama.config import UnusableInput
from wsm.atomic import write_atomically
from wsm.manifest import DTYPE_NAMES
from wsm.plan import Plan, RunShape
from wsm.probe import Ceiling
from wsm.settings import Settings, environment_echo, read_settings


def build_options(options: RunOptions) -> tuple[BuildOptions, list[str]]:
    """What is to be built, and warnings about variables."""
    settings, warnings = read_settings(options.engine, os.environ)
    built = BuildOptions(
        settings=settings,
        checkpoints=options.checkpoints,
        synthetic=options.synthetic,
        raw_device=options.raw_device,
        manifest=options.manifest,
        cache_dir=options.cache_dir,
        device=options.device,
        dtype=options.dtype,
        seed=options.seed,
        prefill_chunk_tokens=options.prefill_chunk_tokens,
        micro_batch=options.micro_batch,
    )
    return built, warnings


def batch_prompts(options: RunOptions, inputs: Inputs) -> list[list[int]]:
    """The token ids of every row: at most ``max_seq_len - max_new_tokens``, the last ones, BOS counted in."""
    most = options.max_seq_len - options.max_new_tokens
    if options.prompt_len is not None:
        length = min(options.prompt_len, most)
        return random_prompts(inputs.checkpoint.config, length, options.batch_size, options.seed)
    texts = [options.prompt] if options.prompt is not None else read_prompts(options.prompts or DEFAULT_FILE)
    return fill_batch(tokenize(texts[: options.batch_size], inputs.tokenizer, most), options.batch_size)


def shape_of(prompts: Sequence[Sequence[int]], options: RunOptions) -> RunShape:
    lengths = [len(prompt) for prompt in prompts]
    return RunShape(len(prompts), max(lengths), options.max_new_tokens, sum(lengths))


@dataclass(slots=True)
class _Progress:
    """What a run has got so far, so that an interrupted one can still be written."""

    ceilings: dict[str, Ceiling]
    rounds: list[Round]
    interrupted: bool = False


def run(options: RunOptions, argv: Sequence[str]) -> int:
    """Measure, print, write the JSON; the exit code."""
    reporter = ConsoleReporter(quiet=options.output is not None, verbose=options.verbose)
    built, warnings = build_options(options)
    _check_writable(options.out_json)
    reporter.say("[INFO] Global state tracker initialized")
    inputs = open_inputs(built)
    prompts = batch_prompts(options, inputs)
    plan = plan_run(inputs, shape_of(prompts, options))
    _announce(reporter, built, inputs, plan)
    got = _Progress({}, [])

    def before_load(llm: LLaMA) -> None:
        with llm.load_times.timed("probe_s"):
            got.ceilings = ceilings_of.recall(llm) if options.no_probe else ceilings_of.probe(llm)
        if not options.no_probe:
            ceilings_of.remember(llm, got.ceilings)

    with LLaMA.assemble(inputs, plan, reporter, before_load=before_load) as llm:
        if built.settings.mode != "full":
            path = {"mixed": "SSD -> CPU(pinned) -> GPU", "stream": "CPU(pinned) -> GPU"}.get(
                plan.placement.mode, "GPU"
            )
            reporter.say(f"✅ Weight streaming enabled ({path} by layer)")
        try:
            _rounds(options, llm, prompts, reporter, got)
        except KeyboardInterrupt:
            got.interrupted = True
            if not got.rounds:
                raise
        llm.device.synchronize()
        result = _result(options, argv, llm, prompts, got, [*warnings, *llm.warnings, *plan.notes])
    _finish(options, reporter, result)
    return 130 if got.interrupted else 0


def _announce(reporter: ConsoleReporter, built: BuildOptions, inputs: Inputs, plan: Plan) -> None:
    mode = built.settings.mode
    reporter.say(f"[MODE-DECISION] called LLaMA.build(mode={mode}, load_model={mode in ('full', 'preload')})")
    if mode == "mixed":
        device = (
            ",".join(inputs.description.targets) if inputs.description is not None else "(packed file in the cache)"
        )
        reporter.say(f"[MODE-DECISION] use_raw_ssd={inputs.description is not None} raw_device={device}")
        reporter.say("[INFO] raw-ssd mode: large weights replaced with CPU stubs")
        reporter.say("[WSM] Initializing SSD backend...")
    for note in plan.notes:
        reporter.say(f"[INFO] {note}")
    if reporter.verbose:
        reporter.say(plan.budget_text())


def _rounds(
    options: RunOptions, llm: LLaMA, prompts: list[list[int]], reporter: ConsoleReporter, got: _Progress
) -> None:
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed, options.ignore_eos)
    with llm.load_times.timed("warmup_s"):
        for _ in range(options.warmup_rounds):
            warm_up(llm, prompts, sampling)
    if llm.manager is not None and options.warmup_rounds:
        llm.manager.wait_loaded()
    llm.load_times.parts["from_process_start_s"] = time.time() - psutil.Process().create_time()
    for number in range(options.repeats):
        with reporter.bar(options.max_new_tokens, "tok", f"round {number + 1}/{options.repeats}") as advance:
            got.rounds.append(run_round(llm, prompts, sampling, on_token=lambda: advance(1)))


def _check_writable(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UnusableInput(f"--out-json {path}: no file can be written there")


def _result(
    options: RunOptions,
    argv: Sequence[str],
    llm: LLaMA,
    prompts: list[list[int]],
    got: _Progress,
    warnings: list[str],
) -> dict[str, Any]:
    chosen = got.rounds[median_round(got.rounds)]
    stats = dict(zip(("prefill", "decode"), phases_of(llm, chosen, prompts), strict=True))
    store = Path(llm.inputs.description.targets[0]) if llm.inputs.description is not None else None
    provenance, missing = collect(llm.inputs.checkpoint, llm.inputs.device, options.seed, store)
    if not got.ceilings:
        missing.append(
            "no ceilings (--no-probe, and none of this hardware in the cache): floor and roofline are not known"
        )
    elif "ssd" not in got.ceilings and stats["decode"].bytes_moved["ssd_read"]:
        missing.append("the SSD could not be probed in so little CPU memory: floor and roofline are not known")
    settings = llm.settings
    tokens = chosen.generation.tokens
    return {
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
        "prompt_lens": [len(prompt) for prompt in prompts],
        **round_metrics(chosen),
        "io_bw_MBps": io_part(list(stats.values())),
        "gpu_mem_GB": _gpu_mem(llm.inputs.device),
        "mode": settings.mode,
        "device": str(llm.inputs.device),
        "wsm": {
            "enabled": llm.manager is not None,
            "ssd_enabled": bool(llm.plan.placement.residency.ssd),
            "gpu_max_groups": settings.gpu_max_groups,
        },
        "schema_version": SCHEMA_VERSION,
        "interrupted": got.interrupted,
        "decode_forward_passes": chosen.generation.decode_passes,
        "tpot_ms": tpot_part(chosen.pass_ms),
        "phases": {name: phase_part(phase, got.ceilings) for name, phase in stats.items()},
        "ceilings": {name: dataclasses.asdict(ceiling) for name, ceiling in got.ceilings.items()},
        "residency": _residency(llm, chosen),
        "plan": {
            "bytes_per_pass": dict(llm.plan.bytes_per_pass),
            "chunk_tokens": llm.plan.chunk_tokens,
            **_planned(llm),
        },
        "memory": _memory(llm),
        "load_s": _load(llm),
        "kv": {"device": str(llm.inputs.device), "topk_blk": options.topk_blk, "fraction_fetched": 1.0, "exact": True},
        "config": {
            "argv": list(argv),
            "resolved": _resolved(options, settings, llm),
            "environment": environment_echo(os.environ),
        },
        "provenance": provenance,
        "output": {
            "sha256": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
            "texts": [llm.tokenizer.decode(row) for row in tokens] if options.print_text else None,
        },
        "repeats": repeats_part(got.rounds),
        "warnings": [*warnings, *plan_warnings(stats, llm.plan.bytes_per_pass), *missing],
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


def _planned(llm: LLaMA) -> dict[str, Any]:
    return {
        "wave_rows": llm.plan.wave_rows,
        "gpu_bytes": llm.plan.gpu_bytes,
        "gpu_budget_bytes": llm.plan.gpu_budget_bytes,
        "cpu_page_locked_bytes": sum(line.nbytes for line in llm.plan.cpu_lines),
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
        "cpu_page_locked_bytes": llm.manager.page_locked_bytes if llm.manager is not None else 0,
        "cpu_page_locked_peak_bytes": llm.manager.page_locked_peak_bytes if llm.manager is not None else 0,
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
    "residents_s",
    "warmup_s",
)


def _load(llm: LLaMA) -> dict[str, float | None]:
    return {
        **{name: llm.load_times.parts.get(name) for name in _LOAD_PARTS},
        "from_process_start_s": llm.load_times.parts["from_process_start_s"],
    }


def _resolved(options: RunOptions, settings: Settings, llm: LLaMA) -> dict[str, Any]:
    values = {**dataclasses.asdict(options), **dataclasses.asdict(settings)}
    values.pop("engine")
    values["dtype"], values["device"] = DTYPE_NAMES[llm.inputs.dtype], str(llm.inputs.device)
    values["model"] = llm.config.name
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _finish(options: RunOptions, reporter: ConsoleReporter, result: dict[str, Any]) -> None:
    write_atomically(options.out_json, dump(result))
    if options.output is not None:
        print(row(result, options.output))
        return
    if options.print_text:
        for number, text in enumerate(result["output"]["texts"]):
            reporter.say(f"[TEXT {number:04d}] {text}")
    reporter.say(summary(result))
    reporter.say(f"\n详细 JSON 已保存到: {options.out_json}")
