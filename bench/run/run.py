"""The verb ``run``: plan, build, warm up, measure, write."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.options.command import kept_command
from bench.options.flags import RunOptions
from bench.result.results import dump
from bench.result.summary import ConsoleReporter, row, summary
from bench.run import ceilings as ceilings_of
from bench.run.conditions import Watch
from bench.run.job import SOLO, Job
from bench.run.measure import Sampling, run_round, warm_up
from bench.run.prompts import DEFAULT_FILE, fill_batch, keep_last, random_prompts, read_prompts, tokenize
from bench.run.ranks import agreed_round, collect, rank_report, with_ranks
from bench.run.record import Progress, result_of
from bench.run.trace import chrome_trace
from llama.inputs import BuildOptions, Inputs, open_inputs, plan_run
from llama.llm import LLaMA
from llama.parallel.world import ALONE, World
from wsm.disk.atomic import write_atomically
from wsm.errors import KVDeviceError, StoreError, UnusableInput
from wsm.plan.advice import check_fits, ran_out
from wsm.plan.inputs import RunShape
from wsm.plan.levers import auto_flags
from wsm.plan.plan import Plan
from wsm.plan.text import budget_text
from wsm.plan.time import Ceiling
from wsm.settings import read_settings

MOST_RANDOM_PROMPTS = 512
"""As many as the guide's prompt file has; a larger batch repeats them."""


def build_options(options: RunOptions, world: World = ALONE) -> tuple[BuildOptions, list[str]]:
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
        prefill_chunk_tokens=options.prefill_chunk_tokens,
        micro_batch=options.micro_batch,
        topk_blk=options.topk_blk,
        kv_dtype=options.kv_dtype,
        kv_device=options.kv_device,
        auto=options.auto,
        world=world,
    )
    return built, warnings


def batch_prompts(options: RunOptions, inputs: Inputs, say: Callable[[str], None]) -> list[list[int]]:
    """The token ids of the prompts that fill the batch: at most ``max_seq_len - max_new_tokens``, the last ones, BOS
    counted in.

    They are repeated to fill it only when it is known to fit: a batch may be asked for that no memory holds.
    ``say`` is told what was cut.
    """
    most = options.max_seq_len - options.max_new_tokens
    if options.prompt_len is not None:
        count = min(options.batch_size, MOST_RANDOM_PROMPTS)
        whole = random_prompts(inputs.checkpoint.config, options.prompt_len, count, options.seed)
    else:
        texts = [options.prompt] if options.prompt is not None else read_prompts(options.prompts or DEFAULT_FILE)
        whole = tokenize(texts[: options.batch_size], inputs.tokenizer)
    if long := [len(prompt) for prompt in whole if len(prompt) > most]:
        say(f"[INFO] {len(long)} of {len(whole)} prompts cut to their last {most} tokens (the longest had {max(long)})")
    return [keep_last(prompt, most) for prompt in whole]


def shape_of(prompts: Sequence[Sequence[int]], options: RunOptions) -> RunShape:
    """The shape of a run whose batch ``prompts`` fill, repeated."""
    lengths = [len(prompt) for prompt in prompts]
    times, rest = divmod(options.batch_size, len(lengths))
    return RunShape(
        options.batch_size, max(lengths), options.max_new_tokens, times * sum(lengths) + sum(lengths[:rest])
    )


def run(options: RunOptions, argv: Sequence[str], user_set: Sequence[str] = (), job: Job = SOLO) -> int:
    """Measure, print, write the JSON; the exit code.

    Args:
        user_set: names of the variables that the user had set.
        job: this process's part where several ranks run; the one that speaks prints and writes.
    """
    job.check_tp(options.tp, argv)
    job.join()
    quiet = options.output is not None or not job.speaks
    reporter = ConsoleReporter(quiet=quiet, verbose=options.verbose, bars=job.speaks)
    built, warnings = build_options(options, job.world)
    if job.speaks:
        _check_outputs(options)
    reporter.say("[INFO] Global state tracker initialized")
    inputs = open_inputs(built)
    distinct = batch_prompts(options, inputs, reporter.say)
    job.world.agree(_facts(options, distinct))
    plan = plan_run(inputs, shape_of(distinct, options))
    if options.auto:
        _say_choice(reporter, plan, argv)
    known = ceilings_of.recall_near(inputs)
    _announce(reporter, built, inputs, plan)
    check_fits(plan, known)
    prompts = fill_batch(distinct, options.batch_size)
    without_effect = sorted(name for name in user_set if name.startswith("WSM_KV_THROTTLE"))
    if without_effect and not plan.kv.below:
        warnings.append(
            f"{', '.join(without_effect)}: no effect, since all KV is on the compute device: nothing is written back"
        )
    got = Progress({}, [])

    def before_load(llm: LLaMA) -> None:
        with llm.load_times.timed("probe_s"):
            got.ceilings = ceilings_of.recall_for(inputs) if options.no_probe else ceilings_of.probe(llm)
        if not options.no_probe:
            ceilings_of.remember(inputs, got.ceilings)

    with (
        _cache_kept_sound(inputs),
        _advised(plan, known),
        LLaMA.assemble(inputs, plan, reporter, before_load=before_load) as llm,
    ):
        if built.settings.mode != "full":
            way = {"mixed": "SSD -> CPU(pinned) -> GPU", "stream": "CPU(pinned) -> GPU"}.get(plan.placement.mode, "GPU")
            reporter.say(f"✅ Weight streaming enabled ({way} by layer)")
        _measure(options, llm, prompts, reporter, got)
        with _finishing():
            result = _result(options, argv, user_set, llm, prompts, got, [*warnings, *llm.warnings])
            if job.speaks:
                _write(options, llm, got, result)
    if job.speaks:
        _print_result(options, reporter, result)
    return 130 if got.interrupted else 0


def _facts(options: RunOptions, prompts: Sequence[Sequence[int]]) -> dict[str, str]:
    """What has to be the same on every rank, besides what is built."""
    shared = "batch_size max_new_tokens max_seq_len temperature top_p seed ignore_eos topk_blk warmup_rounds repeats"
    names = (*shared.split(), "no_probe")
    flags = {f"--{name.replace('_', '-')}": str(getattr(options, name)) for name in names}
    digest = hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest()[:16]
    return {**flags, "prompts of digest": digest}


def _result(
    options: RunOptions,
    argv: Sequence[str],
    user_set: Sequence[str],
    llm: LLaMA,
    prompts: list[list[int]],
    got: Progress,
    warnings: list[str],
) -> dict[str, Any]:
    """The JSON's content, once all is still; of several ranks, each brings its report and rank 0's is the job's."""
    if got.interrupted:
        llm.inputs.world.abandon()
    llm.stop()
    got.chosen = agreed_round(llm, got.rounds, interrupted=got.interrupted)
    result = result_of(options, argv, user_set, llm, prompts, got, warnings)
    if llm.inputs.world.shard.size == 1:
        return result
    mine = rank_report(llm, got.rounds[got.chosen], prompts, got.ceilings, result["warnings"])
    return with_ranks(result, collect(llm, mine, interrupted=got.interrupted))


def _say_choice(reporter: ConsoleReporter, plan: Plan, argv: Sequence[str]) -> None:
    chosen = auto_flags(plan)
    reporter.say(f"[INFO] --auto chose {' '.join(chosen) or 'nothing: the mode has no layers to place'}")
    reporter.say(f"[INFO] to keep this choice: {kept_command(argv, chosen)}")


def _announce(reporter: ConsoleReporter, built: BuildOptions, inputs: Inputs, plan: Plan) -> None:
    mode = built.settings.mode
    reporter.say(f"[MODE-DECISION] called LLaMA.build(mode={mode}, load_model={mode in ('full', 'preload')})")
    if mode == "full" and built.manifest is not None:
        reporter.say("[INFO] --manifest and --raw-device are not used: mode full reads the checkpoint")
    if plan.placement.residency.ssd:
        device = (
            ",".join(inputs.description.targets) if inputs.description is not None else "(packed file in the cache)"
        )
        reporter.say(f"[MODE-DECISION] use_raw_ssd=True raw_device={device}")
        reporter.say("[INFO] raw-ssd mode: large weights replaced with CPU stubs")
        reporter.say("[WSM] Initializing SSD backend...")
    for note in plan.notes:
        reporter.say(f"[INFO] {note}")
    if reporter.verbose:
        reporter.say(budget_text(plan))


def _measure(
    options: RunOptions, llm: LLaMA, prompts: list[list[int]], reporter: ConsoleReporter, got: Progress
) -> None:
    """All rounds; after Ctrl-C those that were finished, if any was."""
    try:
        _rounds(options, llm, prompts, reporter, got)
    except KeyboardInterrupt:
        got.interrupted = True
        if not got.rounds:
            raise


def _rounds(
    options: RunOptions, llm: LLaMA, prompts: list[list[int]], reporter: ConsoleReporter, got: Progress
) -> None:
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed, options.ignore_eos)
    with llm.load_times.timed("warmup_s"):
        for _ in range(options.warmup_rounds):
            llm.inputs.world.barrier()
            warm_up(llm, prompts, sampling)
    if llm.manager is not None and options.warmup_rounds:
        llm.manager.wait_loaded()
    llm.load_times.parts["from_process_start_s"] = time.time() - psutil.Process().create_time()
    got.watch = Watch(llm.inputs.device, _read_in_rounds(llm))
    with got.watch:
        for number in range(options.repeats):
            with reporter.bar(options.max_new_tokens, "tok", f"round {number + 1}/{options.repeats}") as advance:
                llm.inputs.world.barrier()
                got.rounds.append(run_round(llm, prompts, sampling, on_token=lambda: advance(1)))


def _read_in_rounds(llm: LLaMA) -> Sequence[str]:
    """The files or devices of the SSD tier, if passes read them."""
    description = llm.inputs.description
    return description.targets if description is not None and llm.plan.placement.residency.ssd else ()


def _check_outputs(options: RunOptions) -> None:
    """Every file that will be written can be, and is none that is read or written for another purpose."""
    outputs = [path for path in (options.out_json, options.trace) if path is not None]
    read = [path for path in (options.manifest, options.prompts) if path is not None and path.exists()]
    if options.checkpoints is not None and options.checkpoints.is_dir():
        read += [path for path in options.checkpoints.iterdir() if path.is_file()]
    for path in outputs:
        _check_writable(path)
        if path.exists() and any(path.samefile(other) for other in read):
            raise UnusableInput(f"{path} is read by this run: name another file to write")
    if len({os.path.realpath(path) for path in outputs}) < len(outputs):
        raise UnusableInput(f"--out-json and --trace both name {options.out_json}: name two files")


def _check_writable(path: Path) -> None:
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is no regular file")
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise UnusableInput(
            f"{path} cannot be written ({error.strerror}); name another --out-json or --trace"
        ) from error


def _write(options: RunOptions, llm: LLaMA, got: Progress, result: dict[str, Any]) -> None:
    if options.trace is not None:
        _write_trace(options.trace, llm, got)
    write_atomically(options.out_json, dump(result))


def _write_trace(path: Path, llm: LLaMA, got: Progress) -> None:
    chosen = got.rounds[got.chosen]
    phases = {"prefill": (chosen.start, chosen.prefill_done), "decode": (chosen.prefill_done, chosen.done)}
    write_atomically(path, chrome_trace(llm.telemetry, phases) + "\n")


@contextlib.contextmanager
def _cache_kept_sound(inputs: Inputs) -> Iterator[None]:
    """A packed file in the cache that turns out damaged is dropped, so that the next run packs it anew."""
    try:
        yield
    except StoreError as error:
        of_cache = inputs.options.manifest is None and not isinstance(error, KVDeviceError)
        if of_cache and inputs.description is not None:
            inputs.description.path.unlink(missing_ok=True)
            raise StoreError(f"{error} (a packed file in the cache: the next run packs it anew by itself)") from error
        raise


@contextlib.contextmanager
def _advised(plan: Plan, ceilings: Mapping[str, Ceiling]) -> Iterator[None]:
    """A device that runs out all the same is told of with the budget and the next smaller run."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ran_out(plan, str(error).splitlines()[0].rstrip(". "), ceilings) from error


@contextlib.contextmanager
def _finishing() -> Iterator[None]:
    """Ctrl-C or SIGTERM comes too late to lose finished rounds: what takes a second is let through."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_result(options: RunOptions, reporter: ConsoleReporter, result: dict[str, Any]) -> None:
    if options.output is not None:
        print(row(result, options.output))
        for warning in result["warnings"] if options.output != "json" else ():  # a row has no room for sentences
            print(f"[WARNING] {warning}", file=sys.stderr)
    else:
        for number, text in enumerate(result["output"]["texts"] or ()):
            reporter.say(f"[TEXT {number:04d}] {text}")
        reporter.say(summary(result))
        reporter.say(f"\n详细 JSON 已保存到: {options.out_json}")
    if result["interrupted"]:
        done = f"{result['repeats']['n']} of {options.repeats} repeats are in {options.out_json}"
        print(f"bench_infer.py: interrupted; {done}", file=sys.stderr)
