"""State that several threads share: one lock, one way to wait for a change, and a failure that reaches everyone."""

from __future__ import annotations

import threading
from collections.abc import Callable

from wsm.errors import DoesNotFit, StoreError, UnusableInput


class SharedState:
    """What a subclass adds is read and written under ``_changed`` alone, whose waiters every change wakes.

    Args:
        name: of what failed or is closed, for the sentence.
    """

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._name = name
        self._failure: BaseException | None = None
        self._closing = False

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait until ``ready``, with the lock held.

        Raises:
            StoreError, DoesNotFit, UnusableInput, RuntimeError: whatever failed on a thread, as the cause.
        """
        while not ready():
            self._check()
            self._changed.wait()
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            cause = self._failure
            if isinstance(cause, StoreError | DoesNotFit | UnusableInput):
                raise type(cause)(str(cause)) from cause
            raise RuntimeError(f"a thread of {self._name} failed: {cause!r}") from cause
        if self._closing:
            raise RuntimeError(f"closed: {self._name}")

    def fail(self, failure: BaseException) -> None:
        """Hand an exception of any thread to whoever waits, and to the next caller."""
        with self._changed:
            if self._failure is None and not self._closing:
                self._failure = failure
            self._changed.notify_all()

    def close(self) -> None:
        """Let everyone who waits go; nothing more is handed out."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
