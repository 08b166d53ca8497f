"""The verb ``run``: plan, build, warm up, measure, write."""

from __future__ import annotations

import contextlib
import errno
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

from bench import ceilings as ceilings_of
from bench.command import kept_command
from bench.conditions import Watch
from bench.flags import RunOptions
from bench.measure import Sampling, run_round, warm_up
from bench.prompts import DEFAULT_FILE, fill_batch, keep_last, random_prompts, read_prompts, tokenize
from bench.record import Progress, result_of
from bench.results import dump, median_round
from bench.summary import ConsoleReporter, row, summary
from bench.trace import chrome_trace
from llama.build import BuildOptions, Inputs, LLaMA, open_inputs, plan_run
from llama.config import UnusableInput
from wsm.advice import check_fits, ran_out
from wsm.atomic import write_atomically
from wsm.auto import auto_flags
from wsm.errors import StoreError
from wsm.plan import Plan, RunShape
from wsm.probe import Ceiling
from wsm.settings import read_settings


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
        auto=options.auto,
    )
    return built, warnings


def batch_prompts(options: RunOptions, inputs: Inputs, say: Callable[[str], None]) -> list[list[int]]:
    """The token ids of every row: at most ``max_seq_len - max_new_tokens``, the last ones, BOS counted in.

    ``say`` is told what was cut.
    """
    most = options.max_seq_len - options.max_new_tokens
    if options.prompt_len is not None:
        whole = random_prompts(inputs.checkpoint.config, options.prompt_len, options.batch_size, options.seed)
    else:
        texts = [options.prompt] if options.prompt is not None else read_prompts(options.prompts or DEFAULT_FILE)
        whole = fill_batch(tokenize(texts[: options.batch_size], inputs.tokenizer), options.batch_size)
    if long := [len(prompt) for prompt in whole if len(prompt) > most]:
        say(f"[INFO] {len(long)} of {len(whole)} prompts cut to their last {most} tokens (the longest had {max(long)})")
    return [keep_last(prompt, most) for prompt in whole]


def shape_of(prompts: Sequence[Sequence[int]], options: RunOptions) -> RunShape:
    lengths = [len(prompt) for prompt in prompts]
    return RunShape(len(prompts), max(lengths), options.max_new_tokens, sum(lengths))


def run(options: RunOptions, argv: Sequence[str], user_set: Sequence[str] = ()) -> int:
    """Measure, print, write the JSON; the exit code. ``user_set`` names the variables that the user had set."""
    reporter = ConsoleReporter(quiet=options.output is not None, verbose=options.verbose)
    built, warnings = build_options(options)
    _check_outputs(options)
    reporter.say("[INFO] Global state tracker initialized")
    inputs = open_inputs(built)
    prompts = batch_prompts(options, inputs, reporter.say)
    plan = plan_run(inputs, shape_of(prompts, options))
    if options.auto:
        _say_choice(reporter, plan, argv)
    known = ceilings_of.recall_near(inputs)
    check_fits(plan, known)
    _announce(reporter, built, inputs, plan)
    if without_effect := sorted(name for name in user_set if name.startswith("WSM_KV_THROTTLE")):
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
        try:
            _rounds(options, llm, prompts, reporter, got)
        except KeyboardInterrupt:
            got.interrupted = True
            if not got.rounds:
                raise
        with _finishing():
            llm.stop()
            if options.trace is not None:
                _write_trace(options.trace, llm, got)
            result = result_of(options, argv, user_set, llm, prompts, got, [*warnings, *llm.warnings])
            write_atomically(options.out_json, dump(result))
    _print_result(options, reporter, result)
    if got.interrupted:
        done = f"{len(got.rounds)} of {options.repeats} repeats are in {options.out_json}"
        print(f"bench_infer.py: interrupted; {done}", file=sys.stderr)
    return 130 if got.interrupted else 0


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
        reporter.say(plan.budget_text())


def _rounds(
    options: RunOptions, llm: LLaMA, prompts: list[list[int]], reporter: ConsoleReporter, got: Progress
) -> None:
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed, options.ignore_eos)
    with llm.load_times.timed("warmup_s"):
        for _ in range(options.warmup_rounds):
            warm_up(llm, prompts, sampling)
    if llm.manager is not None and options.warmup_rounds:
        llm.manager.wait_loaded()
    llm.load_times.parts["from_process_start_s"] = time.time() - psutil.Process().create_time()
    got.watch = Watch(llm.inputs.device, _read_in_rounds(llm))
    with got.watch:
        for number in range(options.repeats):
            with reporter.bar(options.max_new_tokens, "tok", f"round {number + 1}/{options.repeats}") as advance:
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


def _write_trace(path: Path, llm: LLaMA, got: Progress) -> None:
    chosen = got.rounds[median_round(got.rounds)]
    phases = {"prefill": (chosen.start, chosen.prefill_done), "decode": (chosen.prefill_done, chosen.done)}
    write_atomically(path, chrome_trace(llm.telemetry, phases) + "\n")


@contextlib.contextmanager
def _cache_kept_sound(inputs: Inputs) -> Iterator[None]:
    """A packed file in the cache that turns out damaged is dropped, so that the next run packs it anew."""
    try:
        yield
    except StoreError as error:
        if inputs.options.manifest is None and inputs.description is not None:
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
    """Ctrl-C comes too late to lose finished rounds: what takes a second is let through."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _print_result(options: RunOptions, reporter: ConsoleReporter, result: dict[str, Any]) -> None:
    if options.output is not None:
        print(row(result, options.output))
        for warning in result["warnings"] if options.output != "json" else ():  # a row has no room for sentences
            print(f"[WARNING] {warning}", file=sys.stderr)
        return
    if options.print_text:
        for number, text in enumerate(result["output"]["texts"]):
            reporter.say(f"[TEXT {number:04d}] {text}")
    reporter.say(summary(result))
    reporter.say(f"\n详细 JSON 已保存到: {options.out_json}")
