"""A wish to stop, and waits that look at it.

Nothing raises at an arbitrary line: who wishes a stop (a signal's handler, another rank's failure) only notes it by
:func:`ask`, and the main thread raises :class:`Stopped` where it calls :func:`check`: in every wait, and between two
pieces of work. A wish is answered once: what ends, closes and saves after it is not disturbed by it again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast

from wsm import threads

T = TypeVar("T")

LOOK_S = 0.1
"""How long a wait goes on before it looks whether a stop is wished."""


class Stopped(BaseException):
    """A stop was wished; ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Wish:
    """At most one, of the whole process; its fields are set by one assignment each, as a signal's handler must."""

    number: int | None = None
    held = False


_wish = _Wish()


def ask(number: int) -> None:
    """Note the wish that the signal ``number`` stands for; from any thread, or a signal's handler."""
    _wish.number = number


def check() -> None:
    """Raise Stopped if a stop is wished; for the main thread, between two pieces of work."""
    number = _wish.number
    if number is not None and not _wish.held:
        _wish.number = None
        raise Stopped(number)


def forget() -> None:
    """Whatever was wished: a new command begins."""
    _wish.number = None


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Until the block ends no wish is answered: what takes a second, and would be lost, is let through."""
    before, _wish.held = _wish.held, True
    try:
        yield
    finally:
        _wish.held = before


def pause(bell: SimpleQueue[None]) -> None:
    """Sleep until ``bell`` rings, or for ``LOOK_S``; both a signal and KeyboardInterrupt come through."""
    with contextlib.suppress(Empty):
        bell.get(timeout=LOOK_S)


def beside(work: Callable[[], T]) -> T:
    """What ``work`` gives or raises, on a thread of its own, while this one hears a wish to stop.

    A future's own lock is Python code, in which KeyboardInterrupt could leave it taken; so ``work`` waits for futures.
    """
    came = SimpleQueue[tuple[bool, Any]]()

    def run() -> None:
        try:
            came.put((True, work()))
        except BaseException as error:
            came.put((False, error))

    threads.start(threading.Thread(target=run, name="wsm-wait", daemon=True))
    while True:
        check()
        with contextlib.suppress(Empty):
            well, found = came.get(timeout=LOOK_S)
            break
    if not well:
        raise found
    return cast(T, found)


def result(future: Future[T]) -> T:
    """As ``future.result()``, but a wish to stop is heard."""
    return beside(future.result)
