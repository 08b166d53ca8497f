"""The verbs on a model's weights, which need torch: plan, and pack and verify of a packed store."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench.cli.confirm import confirmed
from bench.cli.plan_json import plan_json
from bench.options.flags import kept_command
from bench.options.run_flags import NOWHERE, PlanOptions
from bench.options.verb_flags import PackOptions, VerifyOptions
from bench.result.console import ConsoleReporter
from bench.result.results import held_result, significant
from bench.run.calibrate import calibrated
from bench.run.ceilings import recall_near
from bench.run.job import BAD_STORE, DONE
from bench.run.outputs import check_writable, write_figures
from bench.run.prompts import batch_prompts, shape_of
from llama.checkpoint import Checkpoint, WeightlessCheckpoint, has_weights, open_checkpoint
from llama.drafting import planned_shape
from llama.inputs import Inputs, read_manifest
from llama.opening import open_inputs
from llama.options import BuildOptions, planned_alike
from llama.parallel.world import World
from llama.plans import hardware_here, plan_run, plans_by_format
from wsm.errors import UnusableInput
from wsm.layout.model import Shard
from wsm.plan.advice import check_fits, describe, nothing_streams, unused_memory
from wsm.plan.by_format import by_format, shown_by_format
from wsm.plan.hardware import GIB, Hardware
from wsm.plan.levers import auto_flags
from wsm.plan.machines import Machine, hardware_elsewhere, machine_named, rates_elsewhere
from wsm.plan.missing import missing_rates
from wsm.plan.plan import Plan
from wsm.plan.speculated import Speculated, speculated, tokens_a_pass
from wsm.plan.time import KV_DEVICE, Ceiling
from wsm.settings import Settings, unknown_variables
from wsm.store.layout import plan_store
from wsm.store.match import compare_heads
from wsm.store.pack import PackRequest, pack
from wsm.store.packed_store import PackedStore, verify


def run_plan(options: PlanOptions, argv: Sequence[str]) -> int:
    """Print what would be where, and what each flag would buy; exit code 3 if it does not fit."""
    if options.output not in (None, "json"):
        raise UnusableInput(f"plan -o {options.output} is not known: leave it out for text, or give json")
    place = _place_of(options)
    ranks = options.tp or 1
    machine = machine_named(options.machine) if options.machine is not None else None
    elsewhere = machine is not None or (options.gpu_mem_gb is not None and options.device != "cpu")
    device = "cpu" if elsewhere and not torch.cuda.is_available() else options.device
    inputs = _opened(replace(options, device=device), World(Shard(0, ranks), Shard(0, ranks)))
    hardware = _hardware(options, inputs, machine, elsewhere)
    prompts, cut = batch_prompts(options, inputs)
    plan = plan_run(options, inputs, shape_of(prompts, options), hardware)
    for line in cut:
        print(f"[INFO] {line}", file=sys.stderr if options.output else sys.stdout)
    ceilings = _rates(options, inputs, machine, plan)
    drafting = partial(_drafted, options, inputs)
    drafted = drafting(plan, ceilings)
    if drafted is not None and options.tokens_a_pass is not None:
        _check_assumed(options.tokens_a_pass, drafted)
    formats = by_format(plans_by_format(options, inputs, plan), ceilings, inputs.format_name, drafting)
    text = json.dumps(significant(plan_json(plan, ceilings, formats, drafted)))
    if place is not None:
        write_figures(place, text)
    if options.output:
        print(text)
        check_fits(plan, ceilings, told=True)
        return 0
    for line in _said_of_rates(machine, plan, ceilings):
        print(f"[INFO] {line}")
    for line in nothing_streams(plan):
        print(f"[INFO] {line}")
    print(describe(plan, ceilings, drafted=drafted is not None))
    print(shown_by_format(formats))
    if drafted is not None:
        print(f"with --draft {options.draft}, {_assumed(options, drafted)}: {drafted.shown()}")
    if options.auto and plan.fits:  # else it is no command that runs
        print(f"[INFO] to keep this choice: {kept_command(argv, [*_budget_of(machine, plan), *auto_flags(plan)])}")
    elif plan.fits and (unused := unused_memory(plan)):
        print(f"[INFO] {unused}")
    for warning in (*inputs.warnings, *_of_no_real_model(options), *_of_a_cpu(plan), *unknown_variables(os.environ)):
        print(f"[WARNING] {warning}")
    check_fits(plan, ceilings, told=True)
    return 0


def _budget_of(machine: Machine | None, plan: Plan) -> list[str]:
    """The card's memory as a flag where a machine gave it: on a larger card, the choice is for that much."""
    if machine is None or plan.gpu_budget_bytes is None:
        return []
    return [f"--gpu-mem-gb {plan.gpu_budget_bytes / GIB:g}"]


def _opened(options: PlanOptions, world: World) -> Inputs:
    try:
        return open_inputs(options, world)
    except UnusableInput as error:
        if options.checkpoints is None or options.checkpoints.exists():
            raise
        hint = "--synthetic NAME plans a model's shape without its files"
        if options.checkpoints.suffix == ".gguf":
            found = re.search(r"q([456])_k", options.checkpoints.name, re.IGNORECASE)
            hint = planned_alike(found[1] if found else "4")
        raise UnusableInput(f"{error}; {hint}") from error


def _of_no_real_model(options: PlanOptions) -> Iterator[str]:
    if options.machine is not None and options.checkpoints is None and options.synthetic is None:
        yield "this plans the small built-in model: --synthetic NAME, such as Llama-3.1-70B, plans a real one's shape"


def _of_a_cpu(plan: Plan) -> Iterator[str]:
    if not plan.inputs.hardware.has_gpu:
        yield (
            "the compute device is the CPU: floors and predictions are informative only; they count bytes and "
            "operations at their best rates, and a pass takes longer, of a small model many times as long"
        )


def _place_of(options: PlanOptions) -> Path | None:
    """Where the plan is to be written; None where nowhere, or where a run's result is: the command may be the run's.

    One of any version: what cannot be read here is not ours to take away.
    """
    path = options.out_json
    if path == NOWHERE:
        return None
    check_writable({"--out-json": path}, (options.manifest, options.prompts), options.checkpoints)
    if held_result(path) is None:
        return path
    print(
        f"[WARNING] {path} holds the result of a run and stays: --out-json names another file for the plan",
        file=sys.stderr,
    )
    return None


def _hardware(options: PlanOptions, inputs: Inputs, machine: Machine | None, elsewhere: bool) -> Hardware:
    """What is planned for. ``--device cpu`` plans for the CPU as the compute device, its tiers as large as given."""
    here = hardware_here(inputs)
    settings: Settings = options if elsewhere or here.has_gpu else replace(options, gpu_mem_gb=None)
    return hardware_elsewhere(here, machine, settings, inputs.world.local.size)


def _rates(options: PlanOptions, inputs: Inputs, machine: Machine | None, plan: Plan) -> dict[str, Ceiling]:
    """Given, of the named machine, or measured here; of a GPU that is not here only the drive's was."""
    here = recall_near(options, inputs)
    if plan.inputs.hardware.has_gpu and inputs.device.type == "cpu":
        here = {name: ceiling for name, ceiling in here.items() if name in ("ssd", *KV_DEVICE)}
    given = {"h2d": options.link_gbps, "ssd": options.ssd_gbps, "hbm": options.hbm_gbps}
    given |= dict.fromkeys(KV_DEVICE, options.kv_gbps)
    rates = rates_elsewhere(here, machine, given, options.matmul_tflops)
    if machine is not None and inputs.dtype.itemsize > 2 and options.matmul_tflops is None:
        rates.pop("matmul")  # the table's is of bf16
    return rates


def _drafted(options: PlanOptions, inputs: Inputs, plan: Plan, ceilings: Mapping[str, Ceiling]) -> Speculated | None:
    """The decode at the acceptance that is asked for, of at most what a draft so deep gives; None where none is."""
    asked = options.acceptance if options.acceptance is not None else options.tokens_a_pass
    if asked is None or inputs.draft is None:
        return None
    shape = planned_shape(inputs.draft.speculating, plan, ceilings)
    tokens = tokens_a_pass(asked, shape.depth) if options.acceptance is not None else asked
    return speculated(plan, ceilings, shape.depth, shape.width, min(tokens, shape.depth + 1))


def _check_assumed(tokens: float, drafted: Speculated) -> None:
    """Raises UnusableInput where ``--tokens-a-pass`` are more than that draft can give."""
    if tokens > drafted.depth + 1:
        raise UnusableInput(
            f"--tokens-a-pass {tokens:g}: a draft of depth {drafted.depth} gives at most {drafted.depth + 1}; raise "
            "--draft-depth, or lower it"
        )


def _assumed(options: PlanOptions, drafted: Speculated) -> str:
    """What is believed of the draft, in words."""
    if options.tokens_a_pass is not None:
        return f"assumed to give {options.tokens_a_pass:g} tokens a pass"
    tree = ", a tree's second choices not counted (a run's --tokens-a-pass has them)" if drafted.width > 1 else ""
    return f"a level's token assumed right {options.acceptance:g} of the time{tree}"


def _said_of_rates(machine: Machine | None, plan: Plan, ceilings: Mapping[str, Ceiling]) -> Iterator[str]:
    if machine is not None:
        yield f"planned for {machine.name}: {', '.join(_rate(name, ceiling) for name, ceiling in ceilings.items())}"
        if plan.inputs.settings.cpu_mem_gb is None:
            yield "its CPU memory is taken to be what is free here: --cpu-mem-gb says another machine's"
    missing = missing_rates(ceilings, plan)
    flags = " and ".join(dict.fromkeys(missing.values()))
    if missing and not plan.inputs.hardware.elsewhere:
        yield (
            f"no time is predicted: rates of {' and '.join(missing)} are missing; what measures them here stands "
            f"beside what each flag would buy, or give {flags}"
        )
    elif missing.keys() - {"the drive", "--kv-device"}:
        yield (
            "there is no GPU here, and nothing is known of the one that is planned for: give --machine, or its rates "
            f"({flags}), or plan for what is here with --device cpu"
        )
    for what in ("the drive", "--kv-device"):
        if plan.inputs.hardware.elsewhere and what in missing:
            yield f"nothing is known of {what}, which this plan reads: give {missing[what]}"


def _rate(name: str, ceiling: Ceiling) -> str:
    value = f"{ceiling.value / 1e3:g} GB/s" if ceiling.unit == "MBps" else f"{ceiling.value:g} TFLOPs"
    return f"{name} {value} ({ceiling.how})"


def run_pack(options: PackOptions) -> int:
    """Pack a checkpoint."""
    reporter = ConsoleReporter(quiet=False, verbose=options.verbose, bars=not options.quiet)
    named = ("checkpoints", "synthetic", "cache_dir", "dtype", "weight_format")
    inputs = open_inputs(BuildOptions(mode="full", device="cpu", **{name: getattr(options, name) for name in named}))
    tp, config, targets = options.tp or 1, inputs.checkpoint.config, len(options.to)
    plan = plan_store(config, inputs.dtype, targets, tp, inputs.weight_format)
    size, ranks = plan.target_bytes, f" for {tp} ranks" if tp > 1 else ""
    form = f" in {inputs.weight_format.name}" if inputs.weight_format is not None else ""
    most = "at most " if plan.is_bound else ""
    each = "one target" if targets == 1 else f"each of {targets} targets"
    for warning in inputs.warnings:
        reporter.say(f"[WARNING] {warning}")
    reporter.say(f"[INFO] packing {config.name}{ranks}{form}: {most}{size / 1e9:.3f} GB on {each}")

    with calibrated(options, reporter) as calibration, reporter.bar(size * targets, "B", "packing") as advance:
        target = options.to, options.manifest, inputs.dtype, options.force, tp
        request = PackRequest(*target, inputs.weight_format, calibration)
        pack(inputs.checkpoint, request, confirm=partial(confirmed, yes=options.yes), progress=advance)
    reporter.say(f"[INFO] packed; the manifest is {options.manifest}")
    return 0


def run_verify(options: VerifyOptions) -> int:
    """Read a store back; exit code 4 if any group is bad."""
    reporter = ConsoleReporter(quiet=False, verbose=options.verbose, bars=not options.quiet)
    checkpoint: Checkpoint | None = None
    if options.checkpoints is not None:
        weightless = options.checkpoints.is_dir() and not has_weights(options.checkpoints)
        checkpoint = WeightlessCheckpoint(options.checkpoints) if weightless else open_checkpoint(options.checkpoints)
    read = partial(read_manifest, options.manifest, checkpoint=checkpoint)
    shares = [read(raw_device=options.raw_device, rank=rank) for rank in range(read().shard.size)]
    nbytes, groups = sum(share.nbytes for share in shares), sum(len(share.groups) for share in shares)
    bad, warnings = list[str](), dict[str, None]()
    with reporter.bar(nbytes, "B", "verifying") as advance:
        for share in shares:
            with closing(PackedStore(share, staging_bytes=options.staging_mb * 10**6, verify="always")) as store:
                if checkpoint is not None:
                    compare_heads(store, checkpoint.share(share.shard))
                bad += verify(store, progress=advance)
            warnings |= dict.fromkeys(store.warnings)
    for warning in warnings:
        reporter.say(f"[WARNING] {warning}")
    for sentence in bad:
        print(sentence, file=sys.stderr)
    what = "read back" if shares[0].version == 1 else "sound"
    reporter.say(f"[INFO] {groups - len(bad)} of {groups} groups {what}, {nbytes / 1e9:.3f} GB")
    return BAD_STORE if bad else DONE
