"""From the command line to an exit code: the one place that knows them (DESIGN section 11)."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import torch

from bench.cli.verbs import run_compare, run_pack, run_plan, run_prompts, run_verify
from bench.options.flags import check_point, parse
from bench.options.run_flags import RunOptions
from bench.options.sweep_flags import SweepOptions
from bench.options.verb_flags import CompareOptions, PackOptions, PromptsOptions, ReportOptions, VerifyOptions
from bench.report.report import run_report
from bench.run.job import SOLO, Job, Terminated, job_of
from bench.run.run import run
from bench.sweep.sweep import run_sweep
from llama.parallel.watch import RankFailed
from wsm.errors import DoesNotFit, StoreError, UnusableInput
from wsm.settings import read_ranks

DONE = 0
FAILED, UNUSABLE, TOO_LARGE, BAD_STORE, INTERRUPTED = 1, 2, 3, 4, 130


def main(argv: Sequence[str], user_set: Sequence[str] = ()) -> int:
    """Run one verb; what goes wrong is one sentence on stderr, with ``--verbose`` the traceback too."""
    job, code = SOLO, DONE
    failure: BaseException | None = None
    try:
        job = job_of(read_ranks(os.environ))
        code = _run_verb(argv, user_set, job)
    except (Exception, KeyboardInterrupt, Terminated) as error:
        code, failure = code_of(error), error
    if failure is not None and ("--verbose" in argv or not _is_foreseen(failure)):
        traceback.print_exception(failure)
    code, sentence = job.end(code, sentence_of(failure), failure)
    if sentence is not None:
        print(f"bench_infer.py: {sentence}", file=sys.stderr)
    return code


def _run_verb(argv: Sequence[str], user_set: Sequence[str], job: Job) -> int:
    verb, options = parse(argv, os.environ)
    if isinstance(options, RunOptions) and verb == "run":
        return run(options, argv, user_set, job)
    job.refuse_other_ranks(verb)
    if isinstance(options, RunOptions):
        return run_plan(options, argv)
    if isinstance(options, PackOptions):
        return run_pack(options)
    if isinstance(options, VerifyOptions):
        return run_verify(options)
    if isinstance(options, PromptsOptions):
        return run_prompts(options)
    if isinstance(options, SweepOptions):
        return run_sweep(options, user_set, check_point)
    if isinstance(options, CompareOptions):
        return run_compare(options)
    assert isinstance(options, ReportOptions)
    return run_report(options)


_CODES: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], int], ...] = (
    (UnusableInput, UNUSABLE),
    ((DoesNotFit, torch.OutOfMemoryError), TOO_LARGE),
    (StoreError, BAD_STORE),
    (KeyboardInterrupt, INTERRUPTED),
    (OSError, UNUSABLE),
)


def code_of(error: BaseException) -> int:
    """The exit code of what ended a verb."""
    if isinstance(error, RankFailed):
        return error.ending.code
    return next((code for kinds, code in _CODES if isinstance(error, kinds)), FAILED)


def _is_foreseen(error: BaseException) -> bool:
    """Whether a sentence says it all; anything else is a fault of this program, and its traceback is wanted."""
    return isinstance(error, RuntimeError | Terminated) or any(isinstance(error, kinds) for kinds, _ in _CODES)


def sentence_of(error: BaseException | None) -> str | None:
    """What the user reads."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"the GPU ran out of memory: {str(error).splitlines()[0]} "
            "Lower --gpu-cached-layers, then --group-prefetch-depth, then --batch-size"
        )
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; nothing half-written was left"
    if isinstance(error, Terminated):
        return "ended by SIGTERM; nothing half-written was left"
    if isinstance(error, BrokenPipeError):
        return "standard output was closed before the end"
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    return None if error is None else str(error) or type(error).__name__
