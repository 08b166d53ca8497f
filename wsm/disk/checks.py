"""Whether bytes that were right before are checked at the next read too, and what the checks cost."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, TypeVar

from wsm.settings import VerifyWhen

T = TypeVar("T")
SAMPLE_BYTES = 64 << 20
"""What ``auto`` reads and checks before it decides."""


class CheckCost(NamedTuple):
    """Bytes that were checked so far, and the CPU seconds that it took."""

    nbytes: int = 0
    cpu_s: float = 0.0

    def __sub__(self, earlier: CheckCost) -> CheckCost:
        return CheckCost(self.nbytes - earlier.nbytes, self.cpu_s - earlier.cpu_s)


class Checks:
    """The rule of one drive, and the rates that ``auto`` goes by. Any thread may call.

    ``first``: what was right once is not checked again. ``always``: every read is. ``auto``: every read, until
    64 MiB were read and checked; from then on ``always`` where the drive gave no more bytes a second than one
    thread checks, so that the checks of the bytes that came keep up with those that come, else ``first``.
    """

    def __init__(self, asked: VerifyWhen) -> None:
        self.asked = asked
        self.rule: Literal["first", "always"] | None = None if asked == "auto" else asked
        self._lock = threading.Lock()
        self._cost = CheckCost()
        self._under_way = 0
        self._busy_since = self._busy_s = 0.0
        self._read_bytes = 0

    def needed(self, seen_right: bool) -> bool:
        """Whether bytes that are read now are to be checked; ``seen_right``: they were, and were right."""
        return not seen_right or self.rule != "first"

    @property
    def cost(self) -> CheckCost:
        return self._cost

    @property
    def check_MBps(self) -> float | None:
        """What one thread checks; None before anything was."""
        nbytes, cpu_s = self._cost
        return nbytes / cpu_s / 1e6 if cpu_s else None

    @property
    def read_MBps(self) -> float | None:
        """What the drive gave while it was asked for anything; None before that."""
        return self._read_bytes / self._busy_s / 1e6 if self._busy_s else None

    def timed(self, nbytes: int, check: Callable[[], T]) -> T:
        """What ``check`` gives of so many bytes; its CPU time counts, since others may hold the cores."""
        began = time.thread_time()
        found = check()
        with self._lock:
            self._cost = CheckCost(self._cost.nbytes + nbytes, self._cost.cpu_s + time.thread_time() - began)
        return found

    def read_begins(self) -> None:
        """A read is asked of the drive."""
        with self._lock:
            if self._under_way == 0:
                self._busy_since = time.perf_counter()
            self._under_way += 1

    def read_ends(self, nbytes: int) -> None:
        """A read has ended, well or not; ``nbytes`` came."""
        with self._lock:
            self._under_way -= 1
            self._read_bytes += nbytes
            now = time.perf_counter()
            self._busy_s, self._busy_since = self._busy_s + now - self._busy_since, now
            if self.rule is None and min(self._read_bytes, self._cost.nbytes) >= SAMPLE_BYTES:
                self.rule = "always" if (self.read_MBps or 0.0) <= (self.check_MBps or math.inf) else "first"

    @contextmanager
    def reading(self, nbytes: int) -> Iterator[None]:
        """A read of so many bytes by the calling thread."""
        self.read_begins()
        try:
            yield
        finally:
            self.read_ends(nbytes)
