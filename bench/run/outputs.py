"""What a run says and writes: what it decided, its result and files, and what its errors mean."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.options.flags import kept_command, swept_flags
from bench.options.run_flags import RunOptions
from bench.result.console import ConsoleReporter
from bench.result.results import dump, held_result, may_be_replaced
from bench.result.summary import row, summary
from bench.result.types import MOST_TOKENS, Result
from bench.run.record import Progress
from bench.run.signals import name_of
from bench.run.trace import chrome_trace
from llama.inputs import Inputs
from llama.llm import LLaMA
from wsm.disk.atomic import NO_ROOM, check_folder, write_atomically
from wsm.engine.records import Records
from wsm.errors import DoesNotFit, KVDeviceError, StoreError, UnusableInput
from wsm.formats.backend import decoder
from wsm.option import is_default
from wsm.plan.advice import budget_text, nothing_on_ssd, nothing_streams, ran_out
from wsm.plan.levers import auto_flags
from wsm.plan.plan import Plan
from wsm.plan.time import Ceiling
from wsm.words import counted, plural

_JSON_BYTES, _ROUND_BYTES, _TEXT_BYTES, _TOKEN_BYTES, _LAYER_BYTES, _DECODING_BYTES = 1 << 20, 512, 32, 64, 4096, 1024
"""Room for a result, for a round, a token of text and a token's number and margin in it, and for a layer of a pass in a
timeline; about thrice what was seen."""
_MOST_BYTES = 2 << 30


def say_plan(reporter: ConsoleReporter, options: RunOptions, inputs: Inputs, plan: Plan, argv: Sequence[str]) -> None:
    """What was decided, in the guide's lines."""
    mode = options.mode
    if options.auto and plan.fits:  # else it is no command that runs
        chosen = auto_flags(plan)
        reporter.say(f"[INFO] --auto chose {' '.join(chosen) or 'nothing: the mode has no layers to place'}")
        reporter.say(f"[INFO] to keep this choice: {kept_command(argv, chosen)}")
    reporter.say(f"[MODE-DECISION] called LLaMA.build(mode={mode}, load_model={mode in ('full', 'preload')})")
    if inputs.weight_format is not None:
        reporter.say(f"[INFO] weights in {inputs.format_name}, decoded by {decoder(inputs.device)}")
    if mode == "full" and options.manifest is not None and inputs.description is None:
        reporter.say("[INFO] --manifest and --raw-device are not used: mode full reads the checkpoint")
    if "SSD" in plan.way:
        store = inputs.description
        device = ",".join(store.targets) if store is not None else "(packed file in the cache)"
        reporter.say(f"[MODE-DECISION] use_raw_ssd=True raw_device={device}")
        reporter.say("[INFO] raw-ssd mode: large weights replaced with CPU stubs")
        reporter.say("[WSM] Initializing SSD backend...")
    reporter.notes([*plan.notes, *nothing_on_ssd(plan), *nothing_streams(plan)])
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
    return [*([said] if names and not plan.kv.below else []), *nothing_on_ssd(plan), *nothing_streams(plan)]


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


class Written(NamedTuple):
    """Where the result is, None if nowhere, a sentence on each file that could not be written, and the result that was
    there before, of any version."""

    result: Path | None
    failure: UnusableInput | None
    replaced: Mapping[str, Any] | None = None


def print_result(
    reporter: ConsoleReporter, options: RunOptions, result: Result, written: Written, stopped_by: int | None
) -> None:
    """A row or the summary, and where the JSON is; ``stopped_by`` is the signal that ended the run."""
    place = written.result
    if options.output is not None:
        print(row(result, options.output, swept_flags(result.config.argv if options.output == "md" else None)))
        for warning in result.warnings if options.output != "json" else ():  # a row has no room for sentences
            print(f"[WARNING] {warning}", file=sys.stderr)
    else:
        for number, text in enumerate(result.output.texts or ()):
            reporter.say(f"[TEXT {number:04d}] {text}")
        reporter.say(summary(result))
        if place is not None:
            reporter.say(f"\n[INFO] the result, with all details, is in {place}")
            if written.replaced is not None:
                before = f"the result{_time_of(written.replaced)} that was there"
                mend = "--out-json NAME" if is_default(options, "out_json") else "another --out-json NAME"
                reporter.say(f"[INFO] {before} was replaced; {mend} keeps both")
            reporter.say(f"详细 JSON 已保存到: {place}")
    if stopped_by is not None:
        kept, where = result.repeats.n, "lost" if place is None else f"in {place}"
        done = f"{kept} of {counted(options.repeats, 'repeat')} {plural(kept, 'is', 'are')} {where}"
        print(f"bench_infer.py: interrupted by {name_of(stopped_by)}; {done}", file=sys.stderr)


def _time_of(found: Mapping[str, Any]) -> str:
    provenance = found.get("provenance")
    utc = provenance.get("utc") if isinstance(provenance, dict) else None
    return f" of {utc}" if isinstance(utc, str) else ""


# -- files


def check_outputs(options: RunOptions) -> None:
    """Every file that will be written can be, and is none that is read or written for another purpose."""
    outputs = {"--out-json": options.out_json} | ({"--trace": options.trace} if options.trace is not None else {})
    draft = Path(options.draft) if options.draft is not None else None
    check_writable(outputs, (options.manifest, options.prompts), options.checkpoints, draft)
    if len({os.path.realpath(path) for path in outputs.values()}) < len(outputs):
        raise UnusableInput(f"--out-json and --trace both name {options.out_json}: name two files")


def check_writable(outputs: Mapping[str, Path], given: Sequence[Path | None], *checkpoints: Path | None) -> None:
    """The JSON files to write, by flag, can be, and are none of the ``given`` ones or of those in the ``checkpoints``.

    What is there already has to be such a file or empty: a mistyped name takes nobody's weights, store or notes.
    """
    read = [path for path in (*given, *checkpoints) if path is not None and path.exists()]
    for directory in checkpoints:
        if directory is not None and directory.is_dir():
            read += [path for path in directory.iterdir() if path.is_file()]
    for flag, path in outputs.items():
        check_folder(path.absolute().parent, f"{flag} {path}")
        if not path.exists():
            continue
        if not path.is_file():
            raise UnusableInput(f"{flag} {path} cannot be written (it is no regular file); name another")
        if any(path.samefile(other) for other in read):
            raise UnusableInput(f"{path} is read by this run: name another file to write")
        if not may_be_replaced(path):
            raise UnusableInput(
                f"{path} is there and holds no result, plan or timeline that can be read: name another {flag}, or move "
                "it away"
            )


def check_room(options: RunOptions, plan: Plan) -> None:
    """Raises DoesNotFit, naming the file, where the disk or a quota has no room for what the run will write.

    The room is taken and given back at once: free bytes that are shown may be others', or beyond a quota.
    """
    tokens = options.batch_size * options.max_new_tokens
    result_bytes = _JSON_BYTES + _ROUND_BYTES * options.repeats + _TOKEN_BYTES * min(tokens, MOST_TOKENS)
    room = {options.out_json: result_bytes + _TEXT_BYTES * tokens * options.print_text}
    if options.trace is not None:
        passes = options.max_new_tokens + -(-options.batch_size // plan.wave_rows)
        layer_bytes = _LAYER_BYTES + _DECODING_BYTES * plan.chunks * (plan.decoding.scratch_bytes > 0)
        room[options.trace] = _JSON_BYTES + layer_bytes * passes * plan.placement.residency.n_layers
    with contextlib.ExitStack() as taken:
        for path, nbytes in room.items():
            nbytes = min(nbytes, _MOST_BYTES)
            try:
                file = taken.enter_context(tempfile.TemporaryFile(dir=path.absolute().parent))
                os.posix_fallocate(file.fileno(), 0, nbytes)
            except OSError as error:
                if error.errno in NO_ROOM:
                    raise DoesNotFit(
                        f"{path}: {error.strerror}, and up to {nbytes / 1e6:.0f} MB may be written there; make room, "
                        "or name another --out-json or --trace"
                    ) from error


def write_figures(path: Path, text: str) -> None:
    """The JSON text of a verb that measures no time, at ``--out-json``."""
    try:
        write_atomically(path, text + "\n")
    except OSError as error:
        raise UnusableInput(f"--out-json {path} cannot be written: {error.strerror}") from error


def write_outputs(options: RunOptions, llm: LLaMA, got: Progress, result: Result) -> Written:
    """Write the result, and the timeline if one is asked for, each whatever became of the other.

    A result that has no room where it should be goes to the directory of temporary files: a run may have taken hours.
    """
    before = held_result(options.out_json)
    place, failures = _write_result(options.out_json, dump(result))
    if options.trace is not None:
        try:
            chosen = got.rounds[got.chosen]
            prefill, decode = (stretch.records or Records() for stretch in chosen.stretches)
            write_atomically(options.trace, chrome_trace(prefill + decode, chosen.windows) + "\n")
        except OSError as error:
            failures.append(f"--trace {options.trace}: {error.strerror}")
    if place == options.out_json and failures:
        failures.append(f"{place} is written")
    replaced = before if place == options.out_json else None
    return Written(place, UnusableInput("; ".join(failures)) if failures else None, replaced)


def _write_result(path: Path, text: str) -> tuple[Path | None, list[str]]:
    """Where it is now, and what there is to say of it."""
    elsewhere = Path(tempfile.gettempdir()) / f"{path.stem}-{os.getpid()}.json"
    failures = list[str]()
    for place in (path, elsewhere):
        try:
            write_atomically(place, text)
            return place, [*failures, f"the result is in {place}"] if failures else []
        except OSError as error:
            failures = failures or [f"--out-json {path}: {error.strerror}"]
    return None, [*failures, "the result is lost"]
