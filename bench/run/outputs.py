"""The files that a run leaves: checked before anything is computed, written once all is still."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from bench.options.run_flags import RunOptions
from bench.result.results import dump
from bench.result.types import Result
from bench.run.record import Progress
from bench.run.trace import chrome_trace
from llama.llm import LLaMA
from wsm.disk.atomic import write_atomically
from wsm.errors import UnusableInput


def check_outputs(options: RunOptions) -> None:
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


def write_outputs(options: RunOptions, llm: LLaMA, got: Progress, result: Result) -> None:
    """The timeline, if one is asked for, and the result."""
    if options.trace is not None:
        chosen = got.rounds[got.chosen]
        phases = {"prefill": (chosen.start, chosen.prefill_done), "decode": (chosen.prefill_done, chosen.done)}
        write_atomically(options.trace, chrome_trace(llm.telemetry, phases) + "\n")
    write_atomically(options.out_json, dump(result))


@contextlib.contextmanager
def finishing() -> Iterator[None]:
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
