"""From the command line to an exit code: the one place that knows them (DESIGN section 11)."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

import torch

from bench.flags import PackOptions, PromptsOptions, RunOptions, VerifyOptions, parse
from bench.report import run_report
from bench.run import run
from bench.sweep import run_sweep
from bench.sweep_flags import SweepOptions
from bench.verb_flags import CompareOptions, ReportOptions
from bench.verbs import run_compare, run_pack, run_plan, run_prompts, run_verify
from llama.config import UnusableInput
from wsm.errors import DoesNotFit, StoreError

FAILED, UNUSABLE, TOO_LARGE, BAD_STORE, INTERRUPTED = 1, 2, 3, 4, 130


def main(argv: Sequence[str], user_set: Sequence[str] = ()) -> int:
    """Run one verb; what goes wrong is one sentence on stderr, with ``--verbose`` the traceback too."""
    try:
        verb, options = parse(argv)
        if isinstance(options, RunOptions):
            return run_plan(options, argv) if verb == "plan" else run(options, argv, user_set)
        if isinstance(options, PackOptions):
            return run_pack(options)
        if isinstance(options, VerifyOptions):
            return run_verify(options)
        if isinstance(options, PromptsOptions):
            return run_prompts(options)
        if isinstance(options, SweepOptions):
            return run_sweep(options, user_set, lambda flags: parse(["run", *flags]))
        if isinstance(options, CompareOptions):
            return run_compare(options)
        assert isinstance(options, ReportOptions)
        return run_report(options)
    except UnusableInput as error:
        return _fail(argv, error, UNUSABLE)
    except (DoesNotFit, torch.OutOfMemoryError) as error:
        return _fail(argv, error, TOO_LARGE)
    except StoreError as error:
        return _fail(argv, error, BAD_STORE)
    except KeyboardInterrupt as error:
        return _fail(argv, error, INTERRUPTED)
    except RuntimeError as error:
        return _fail(argv, error, FAILED)
    except BrokenPipeError:
        return _fail(argv, UnusableInput("standard output was closed before the end"), UNUSABLE)
    except OSError as error:
        return _fail(argv, UnusableInput(f"{error.filename or 'a file'}: {error.strerror or error}"), UNUSABLE)


def _fail(argv: Sequence[str], error: BaseException, code: int) -> int:
    if "--verbose" in argv:
        traceback.print_exception(error)
    if isinstance(error, torch.OutOfMemoryError):
        sentence = (
            f"the GPU ran out of memory: {str(error).splitlines()[0]} "
            "Lower --gpu-cached-layers, then --group-prefetch-depth, then --batch-size"
        )
    else:
        sentence = "interrupted; nothing half-written was left" if isinstance(error, KeyboardInterrupt) else str(error)
    print(f"bench_infer.py: {sentence}", file=sys.stderr)
    return code
