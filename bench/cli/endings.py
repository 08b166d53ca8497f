"""How a verb ends: the one place that knows the exit codes. Imports no torch."""

from __future__ import annotations

import sys

from bench.run.job import Terminated
from llama.parallel.watch import RankFailed
from wsm.errors import DoesNotFit, StoreError, UnusableInput

DONE = 0
FAILED, UNUSABLE, TOO_LARGE, BAD_STORE, INTERRUPTED = 1, 2, 3, 4, 130

_CODES: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], int], ...] = (
    ((UnusableInput, ModuleNotFoundError), UNUSABLE),
    (DoesNotFit, TOO_LARGE),
    (StoreError, BAD_STORE),
    (KeyboardInterrupt, INTERRUPTED),
    (OSError, UNUSABLE),
)


def code_of(error: BaseException) -> int:
    """The exit code of what ended a verb."""
    if isinstance(error, RankFailed):
        return error.ending.code
    if _ran_out(error):
        return TOO_LARGE
    return next((code for kinds, code in _CODES if isinstance(error, kinds)), FAILED)


def _ran_out(error: BaseException | None) -> bool:
    """Whether it is torch's error of a GPU without memory; where that was raised, torch is imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def is_foreseen(error: BaseException) -> bool:
    """Whether a sentence says it all; anything else is a fault of this program, and its traceback is wanted."""
    return isinstance(error, RuntimeError | Terminated) or any(isinstance(error, kinds) for kinds, _ in _CODES)


def sentence_of(error: BaseException | None) -> str | None:
    """What the user reads."""
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the package {error.name} is not installed here: run `make bench` once, then "
            "`.venv/bin/python bench_infer.py`"
        )
    if _ran_out(error):
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
