"""What a run says and writes: what it decided, its result and files, and what its errors mean."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from bench.options.flags import kept_command, swept_flags
from bench.options.run_flags import RunOptions
from bench.result.console import ConsoleReporter
from bench.result.results import dump
from bench.result.summary import row, summary
from bench.result.types import Result
from bench.run.job import handled
from bench.run.record import Progress
from bench.run.trace import chrome_trace
from llama.inputs import Inputs
from llama.llm import LLaMA
from wsm.disk.atomic import write_atomically
from wsm.errors import KVDeviceError, StoreError, UnusableInput
from wsm.plan.advice import budget_text, nothing_on_ssd, ran_out
from wsm.plan.levers import auto_flags
from wsm.plan.plan import Plan
from wsm.plan.time import Ceiling


def say_plan(reporter: ConsoleReporter, options: RunOptions, inputs: Inputs, plan: Plan, argv: Sequence[str]) -> None:
    """What was decided, in the guide's lines."""
    mode = options.mode
    if options.auto:
        chosen = auto_flags(plan)
        reporter.say(f"[INFO] --auto chose {' '.join(chosen) or 'nothing: the mode has no layers to place'}")
        reporter.say(f"[INFO] to keep this choice: {kept_command(argv, chosen)}")
    reporter.say(f"[MODE-DECISION] called LLaMA.build(mode={mode}, load_model={mode in ('full', 'preload')})")
    if mode == "full" and options.manifest is not None:
        reporter.say("[INFO] --manifest and --raw-device are not used: mode full reads the checkpoint")
    if "SSD" in plan.way:
        store = inputs.description
        device = ",".join(store.targets) if store is not None else "(packed file in the cache)"
        reporter.say(f"[MODE-DECISION] use_raw_ssd=True raw_device={device}")
        reporter.say("[INFO] raw-ssd mode: large weights replaced with CPU stubs")
        reporter.say("[WSM] Initializing SSD backend...")
    for note in (*plan.notes, *nothing_on_ssd(plan)):
        reporter.say(f"[INFO] {note}")
    if reporter.verbose:
        reporter.say(budget_text(plan))


def say_streaming(reporter: ConsoleReporter, plan: Plan) -> None:
    """That the model is there, and the way of its weights."""
    if plan.placement.mode != "full":
        way = " -> ".join(plan.way).replace("CPU", "CPU(pinned)")
        reporter.say(f"✅ Weight streaming enabled ({way} by layer)")


def warnings_of(user_set: Sequence[str], plan: Plan) -> list[str]:
    """Variables that the user has set in vain, and a mode that is another one here."""
    names = ", ".join(sorted(name for name in user_set if name.startswith("WSM_KV_THROTTLE")))
    said = f"{names}: no effect, since all KV is on the compute device: nothing is written back"
    return [*([said] if names and not plan.kv.below else []), *nothing_on_ssd(plan)]


@contextlib.contextmanager
def explained(options: RunOptions, inputs: Inputs, plan: Plan, ceilings: Mapping[str, Ceiling]) -> Iterator[None]:
    """What goes wrong although it fitted: a device that runs out is an error with the budget and the next smaller run.

    A packed file in the cache that turns out damaged is dropped: the next run packs it anew.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ran_out(plan, str(error).splitlines()[0].rstrip(". "), ceilings) from error
    except StoreError as error:
        if options.manifest is not None or inputs.description is None or isinstance(error, KVDeviceError):
            raise
        inputs.description.path.unlink(missing_ok=True)
        raise StoreError(f"{error} (a packed file in the cache: the next run packs it anew by itself)") from error


def print_result(reporter: ConsoleReporter, options: RunOptions, result: Result) -> None:
    """A row or the summary, and where the JSON is."""
    if options.output is not None:
        print(row(result, options.output, swept_flags(result.config.argv if options.output == "md" else None)))
        for warning in result.warnings if options.output != "json" else ():  # a row has no room for sentences
            print(f"[WARNING] {warning}", file=sys.stderr)
    else:
        for number, text in enumerate(result.output.texts or ()):
            reporter.say(f"[TEXT {number:04d}] {text}")
        reporter.say(summary(result))
        reporter.say(f"\n[INFO] the result, with all details, is in {options.out_json}")
        reporter.say(f"详细 JSON 已保存到: {options.out_json}")
    if result.interrupted:
        done = f"{result.repeats.n} of {options.repeats} repeats are in {options.out_json}"
        print(f"bench_infer.py: interrupted; {done}", file=sys.stderr)


# -- files


def check_outputs(options: RunOptions) -> None:
    """Every file that will be written can be, and is none that is read or written for another purpose."""
    outputs = [path for path in (options.out_json, options.trace) if path is not None]
    read = [path for path in (options.manifest, options.prompts) if path is not None and path.exists()]
    if options.checkpoints is not None and options.checkpoints.is_dir():
        read += [path for path in options.checkpoints.iterdir() if path.is_file()]
    for path in outputs:
        try:
            if path.exists() and not path.is_file():
                raise OSError(errno.EINVAL, "it is no regular file")
            with tempfile.TemporaryFile(dir=path.absolute().parent):
                pass
        except OSError as error:
            said = f"{path} cannot be written ({error.strerror}); name another --out-json or --trace"
            raise UnusableInput(said) from error
        if path.exists() and any(path.samefile(other) for other in read):
            raise UnusableInput(f"{path} is read by this run: name another file to write")
    if len({os.path.realpath(path) for path in outputs}) < len(outputs):
        raise UnusableInput(f"--out-json and --trace both name {options.out_json}: name two files")


def write_outputs(options: RunOptions, llm: LLaMA, got: Progress, result: Result) -> None:
    """The timeline, if one is asked for, and the result."""
    if options.trace is not None:
        write_atomically(options.trace, chrome_trace(llm.telemetry, got.rounds[got.chosen].windows) + "\n")
    write_atomically(options.out_json, dump(result))


def finishing() -> AbstractContextManager[None]:
    """Ctrl-C or SIGTERM comes too late to lose finished rounds: what takes a second is let through."""
    return handled(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM)
