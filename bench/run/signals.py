"""Signals that ask a program to end. A handler only notes the wish (:mod:`wsm.stop`); nothing here imports torch."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from wsm import stop

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE_S = 5.0
"""A signal that comes again after that ends the process at once: the first one may be stuck on a drive or a GPU."""

_first_s: dict[int, float] = {}
_begun = [False]
"""Its last entry: whether there is anything to end in order; not while only modules are imported."""


def hear() -> None:
    """From now on, on the main thread, the signals of ``ENDING`` are wishes to stop.

    One that was ignored at the start stays so: ``nohup`` means SIGHUP, a shell's background job SIGINT.
    """
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Until the block ends a signal ends the process at once: torch takes seconds, and swallows an exception."""
    _begun.append(False)
    try:
        yield
    finally:
        _begun.pop()


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """:func:`hear` for one command; then all is as before, and a wish that nobody answered is forgotten.

    In the script, where signals were heard before, they come too late then: its exit code is known.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    hear()
    _begun.append(True)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not set from Python, and so not by us
                signal.signal(number, signal.SIG_IGN if handler is _note else handler)
        _begun.pop()
        stop.forget()
        _first_s.clear()


def _note(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if not _begun[-1]:
        _end_now(number, "interrupted; nothing was begun")
    if now - _first_s.setdefault(number, now) >= PATIENCE_S:
        _end_now(number, "ended at once, after the second signal")
    stop.ask(number)


def _end_now(number: int, said: str) -> NoReturn:
    """Files are written beside their place and renamed, so none is half-written."""
    with contextlib.suppress(OSError):
        os.write(2, f"bench_infer.py: {said}\n".encode())
    os._exit(exit_code(number))


def exit_code(number: int) -> int:
    """As a shell tells a process that the signal has ended: 130, 143, 129."""
    return 128 + number


def name_of(number: int) -> str:
    """What the user knows a signal by."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
