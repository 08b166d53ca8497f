"""What a model's start-up reports: lines, progress bars, times. Imports no torch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager


class Reporter:
    """Reports what happens while a model is built; this one is silent."""

    verbose = False

    def say(self, line: str) -> None:
        """A line for the user."""

    def bar(self, total: int | None, unit: str, what: str) -> AbstractContextManager[Callable[[int], None]]:
        """The progress of something that takes ``total`` units (None: nobody knows); the callable inside moves it."""
        return contextlib.nullcontext(lambda done: None)


class LoadTimes:
    """Seconds of each part of the start-up; None for a part that did not take place."""

    def __init__(self) -> None:
        self.parts: dict[str, float | None] = {}

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.parts[part] = (self.parts.get(part) or 0.0) + time.perf_counter() - started
