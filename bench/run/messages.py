"""What a run says: what it decided, its result, and what its errors mean."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch

from bench.options.command import kept_command
from bench.options.run_flags import RunOptions
from bench.result.summary import ConsoleReporter, row, summary
from bench.result.types import Result
from llama.inputs import Inputs
from wsm.errors import KVDeviceError, StoreError
from wsm.plan.advice import budget_text, ran_out
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


def say_streaming(reporter: ConsoleReporter, plan: Plan) -> None:
    """That the model is there, and the way of its weights."""
    if plan.placement.mode != "full":
        way = {"mixed": "SSD -> CPU(pinned) -> GPU", "stream": "CPU(pinned) -> GPU"}.get(plan.placement.mode, "GPU")
        reporter.say(f"✅ Weight streaming enabled ({way} by layer)")


def warnings_of(user_set: Sequence[str], plan: Plan) -> list[str]:
    """Variables that the user has set in vain."""
    names = sorted(name for name in user_set if name.startswith("WSM_KV_THROTTLE"))
    if not names or plan.kv.below:
        return []
    return [f"{', '.join(names)}: no effect, since all KV is on the compute device: nothing is written back"]


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
        print(row(result, options.output))
        for warning in result.warnings if options.output != "json" else ():  # a row has no room for sentences
            print(f"[WARNING] {warning}", file=sys.stderr)
    else:
        for number, text in enumerate(result.output.texts or ()):
            reporter.say(f"[TEXT {number:04d}] {text}")
        reporter.say(summary(result))
        reporter.say(f"\n详细 JSON 已保存到: {options.out_json}")
    if result.interrupted:
        done = f"{result.repeats.n} of {options.repeats} repeats are in {options.out_json}"
        print(f"bench_infer.py: interrupted; {done}", file=sys.stderr)
