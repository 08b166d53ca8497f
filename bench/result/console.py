"""What a person sees while a verb works: log lines on stdout, and on stderr what is being done and its rate."""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from tqdm import tqdm

from llama.loading import Reporter
from wsm import threads
from wsm.errors import DoesNotFit
from wsm.stop import Stopped

DRAWN_S, LOGGED_S = 0.25, 30.0
"""Between two drawings of the line on a terminal, and between two lines of a log."""
_CLEAR = "\r\033[K"


class _Task:
    """Something that is being done. Those who do it only count; the rate is that since the first count.

    So in a round it is that of the decode passes: the prefill is over when the first token counts.
    """

    def __init__(self, what: str, total: int | None, unit: str, detail: Callable[[int], str]) -> None:
        self.total, self.unit, self.what, self._detail = total, unit, what, detail
        self.since_s, self.done, self.broken_off = time.monotonic(), 0, False
        self.counted_from: tuple[float, int] | None = None

    def advance(self, done: int) -> None:
        self.done += done
        if self.counted_from is None:
            self.counted_from = time.monotonic(), self.done

    def named(self) -> str:
        detail = self._detail(self.done)
        return f"{self.what}: {detail}" if detail else self.what

    @property
    def rate(self) -> float | None:
        """Units a second; None where that is not known yet."""
        if self.counted_from is None or self.done == self.counted_from[1]:
            return None
        return (self.done - self.counted_from[1]) / max(time.monotonic() - self.counted_from[0], 1e-9)

    def meter(self, columns: int) -> str:
        """``round 1/1: 16% 5/32 [00:12<01:03, 2.40s/tok]``; how long it has taken, where nothing was counted yet.

        With a bar in it where there are ``columns``.
        """
        elapsed_s = time.monotonic() - self.since_s
        if self.total is None or self.counted_from is None:
            return f"{self.named()} [{tqdm.format_interval(elapsed_s)}]"[: columns or None]
        return str(
            tqdm.format_meter(
                self.done,
                self.total,
                elapsed_s,
                ncols=columns,
                prefix=self.named(),
                unit=self.unit,
                unit_scale=self.unit == "B",
                rate=self.rate,
                initial=self.done,  # without a rate there is none to be had from the time before the first count
            )
        )


class ConsoleReporter(Reporter):
    """Log lines on stdout (silent where a row is printed instead); unless ``bars`` is off, progress on stderr.

    On a terminal that is one line, of the innermost of what is being done; elsewhere a line every 30 s. A thread shows
    it, so that nothing that is timed waits for a terminal. A run that is stopped says how long what it did had taken.
    """

    def __init__(self, *, quiet: bool, verbose: bool, bars: bool = True) -> None:
        self._quiet, self.verbose = quiet, verbose and not quiet
        self._bars = bars and sys.stderr is not None
        self._tasks: list[_Task] = []
        self._took_s: dict[tuple[str, ...], float] = {}
        self._logged_s = time.monotonic()
        # Under the lock: what is on the terminal. tqdm draws too, but keeps its own lock where a write fails.
        self._terminal = threading.Lock()
        self._is_drawn = False

    def say(self, line: str) -> None:
        if not self._quiet:
            with self._terminal:
                self._clear()
                print(line, flush=True)

    def notes(self, lines: Iterable[str]) -> None:
        """Each as a line of information."""
        for line in lines:
            self.say(f"[INFO] {line}")

    def doing(self, what: str) -> AbstractContextManager[Callable[[int], None]]:
        """Something whose length is not known before."""
        return self.bar(None, "", what)

    @contextmanager
    def bar(
        self, total: int | None, unit: str, what: str, detail: Callable[[int], str] = lambda done: ""
    ) -> Iterator[Callable[[int], None]]:
        task = _Task(what, total, unit, detail)
        with contextlib.nullcontext() if self._tasks else self._shown():
            self._tasks.append(task)
            way = tuple(each.what.rstrip("0123456789/ ") for each in self._tasks)  # all rounds together
            self._took_s.setdefault(way, 0.0)
            try:
                yield task.advance
            except Stopped:
                task.broken_off = True
                raise
            finally:
                self._tasks.remove(task)
                self._took_s[way] += time.monotonic() - task.since_s
                if task.broken_off and not self._tasks:  # all that is known: there may be no result
                    self.say(f"[INFO] stopped; times so far: {self._times()}")

    def _times(self) -> str:
        """How long each thing took, in the order of their beginnings; what was a part of it in brackets."""
        said = []
        for way, seconds in self._took_s.items():
            if len(way) == 1:
                parts = [f"{w[-1]} {s:.1f} s" for w, s in self._took_s.items() if len(w) > 1 and w[:1] == way]
                said.append(f"{way[0]} {seconds:.1f} s" + (f" (of these {', '.join(parts)})" if parts else ""))
        return "; ".join(said)

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Progress is shown until the block ends."""
        over = threading.Event()
        show = self._draw if self._bars and sys.stderr.isatty() else self._log
        shower = threading.Thread(target=show, args=(over,), name="progress", daemon=True)
        if self._bars:
            with contextlib.suppress(DoesNotFit):  # no thread to be had: the run matters, its progress does not
                threads.start(shower)
        try:
            yield
        finally:
            over.set()
            if shower.ident is not None:
                shower.join(1.0)  # not for ever: a terminal may be stopped

    def _draw(self, over: threading.Event) -> None:
        with contextlib.suppress(OSError, ValueError):
            while not over.wait(DRAWN_S):
                columns = shutil.get_terminal_size().columns - 1  # behind the last some go on in the next row
                for task in self._tasks[-1:]:
                    with self._terminal:
                        print(f"{_CLEAR}{task.meter(columns)}", end="", file=sys.stderr, flush=True)
                        self._is_drawn = True
        with self._terminal:
            self._clear()

    def _clear(self) -> None:
        """Take the line away; called under the lock."""
        if self._is_drawn:
            self._is_drawn = False
            with contextlib.suppress(OSError, ValueError):
                print(_CLEAR, end="", file=sys.stderr, flush=True)

    def _log(self, over: threading.Event) -> None:
        with contextlib.suppress(OSError, ValueError):
            while not over.wait(max(0.0, self._logged_s + LOGGED_S - time.monotonic())):
                self._logged_s = time.monotonic()
                for task in self._tasks[-1:]:
                    print(f"[PROGRESS] {task.meter(0)}", file=sys.stderr, flush=True)
