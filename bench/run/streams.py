"""Standard streams that may be closed, full, or have lost their reader: what is said there never ends a run.

What a verb's exit code and files say is not lost with a line on the terminal. :func:`lost` tells those verbs whose only
result is what they print.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any


class _Lossy(io.FileIO):
    """Takes every byte; after the first error, which ``failed`` keeps, they go nowhere."""

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        if self.failed is None:
            try:
                return super().write(data)
            except OSError as error:
                self.failed = error
        return memoryview(data).nbytes


_stdout: _Lossy | None = None


def make_lossy() -> None:
    """Replace this process's standard output and error, once, before anything is said or opened.

    A closed stream's number would be given to the next file that is opened, a store perhaps, and written to by whatever
    prints there: the null device takes its place, as GNU's tools do it.
    """
    global _stdout
    closed = [number for number in range(3) if not _is_open(number)]
    for _ in closed:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    _stdout, stderr = (_Lossy(number, "w", closefd=False) for number in (1, 2))
    if 1 in closed:
        _stdout.failed = OSError(errno.EBADF, os.strerror(errno.EBADF))
    sys.stdout, sys.stderr = _text(_stdout, sys.stdout), _text(stderr, sys.stderr)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _text(raw: _Lossy, before: object) -> io.TextIOWrapper:
    """As Python makes it, but with escapes for what the terminal's encoding lacks."""
    lines = raw.isatty() or raw.fileno() == 2
    encoding = getattr(before, "encoding", None) or "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=lines)


def lost() -> str | None:
    """Why standard output could not be written, in words; None where it could, or its reader had what it wanted."""
    if _stdout is None:
        return None
    sys.stdout.flush()
    if _stdout.failed is None or _stdout.failed.errno == errno.EPIPE:
        return None
    return f"standard output: {_stdout.failed.strerror}"
