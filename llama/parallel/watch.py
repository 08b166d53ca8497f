"""Whether all ranks of a job are alive. Each says so once a second in the job's store, and reads what the others say.

A rank that was killed, hangs in the system or lost its host is missed within seconds, whatever the others wait for. One
that fails says why to all. Nothing here knows of collectives.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import msgspec
from msgspec import Struct

from wsm import stop, threads
from wsm.errors import DoesNotFit

BEAT_S = 1.0
LOST_S = 10.0
"""Silence after which a rank counts as lost: far beyond any pause that the interpreter's lock makes."""
START_S = 25.0
GRACE_S = 8.0
"""For an orderly end, once another rank is known to have failed."""
_POLL_S = 0.02


class Store(Protocol):
    """What is used of torch's store: a dictionary that all ranks share."""

    def set(self, key: str, value: str) -> None: ...
    def check(self, keys: list[str]) -> bool: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...


class Ending(Struct, frozen=True):
    """Why a job ends: the rank that is to blame, its host, what the user reads, the exit code."""

    rank: int
    host: str
    reason: str
    code: int

    @property
    def sentence(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.reason}"


class RankFailed(RuntimeError):
    """Another rank failed or was lost, so the job ends."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.sentence)
        self.ending = ending


class Beat(Struct, frozen=True):
    """What a rank says: a count that goes on, where it runs, how it stands, and why it failed (None: it did not).

    ``ended``: it still reads how the others end; ``left``: it needs the store no more.
    """

    count: int
    host: str
    state: Literal["running", "ended", "left"] = "running"
    ending: Ending | None = None


class Roll:
    """Who is alive, from the beats that were read; a function of them and of the clock.

    Silence is measured by the reader's own clock, from when a count was last seen to change: no two clocks have to
    agree.
    """

    def __init__(self, rank: int, size: int, lost_s: float) -> None:
        self._others, self._lost_s = [other for other in range(size) if other != rank], lost_s
        self._last: dict[int, tuple[int, float]] = {}  # by rank: its count, and when it was first seen

    def read(self, beats: Sequence[Beat], now_s: float) -> Ending | None:
        """The first failure among the other ranks: what one says of itself before what its silence says."""
        for rank in self._others:
            if rank not in self._last or self._last[rank][0] != beats[rank].count:
                self._last[rank] = (beats[rank].count, now_s)
        for rank in self._others:
            if (ending := beats[rank].ending) is not None:
                return ending
        for rank in self._others:
            if beats[rank].state == "running" and self.is_silent(rank, now_s):
                reason = f"no sign of life for {self._lost_s:g} s: it was killed or its host is gone"
                return Ending(rank, beats[rank].host, f"{reason}; see its own output", 1)
        return None

    def is_silent(self, rank: int, now_s: float) -> bool:
        """Whether another rank's count has not changed for so long that it counts as lost."""
        return rank in self._last and now_s - self._last[rank][1] > self._lost_s


class Watch:
    """This rank's sign of life, and its eye on the others.

    Two threads: one beats and reads, the other acts on what was found, even where the store no longer answers.
    ``_said`` (this rank's newest beat) and ``failure`` (how another rank ended the job, if one did) are written under
    ``_lock`` alone; ``failure`` only once.

    Args:
        store: a connection of its own, used by this object alone.
        on_failure: called once, on a thread of its own, when another rank has failed.
        last_resort: called if the job is not closed or settled ``GRACE_S`` after that.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        host: str,
        *,
        on_failure: Callable[[Ending], None],
        last_resort: Callable[[Ending], None],
    ) -> None:
        self._store, self.rank, self.size, self.host = store, rank, size, host
        self._on_failure, self._last_resort = on_failure, last_resort
        self._keys = [f"beat/{number}" for number in range(size)]
        self._roll = Roll(rank, size, LOST_S)
        self._lock = threading.Lock()
        self._said = Beat(0, host)
        self.failure: Ending | None = None
        self._beats: list[Beat] = []
        self._heard_s = time.monotonic()
        self._settled, self._closed = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    # -- life

    def start(self, limit_s: float) -> None:
        """Say that this rank is here, wait for all others, then watch; RankFailed names one not here in ``limit_s``."""
        self._say()
        until = time.monotonic() + limit_s
        while not self._store.check(self._keys):
            if time.monotonic() > until:
                reason = f"did not start within {limit_s:g} s, {self.size} ranks being expected; see its own output"
                for rank, key in enumerate(self._keys):
                    if not self._store.check([key]):
                        raise RankFailed(self._find(Ending(rank, "a host that was not heard of", reason, 1)))
            stop.check()
            time.sleep(_POLL_S)
        self._listen()
        for name, work in (("watch-beat", self._beat), ("watch-guard", self._guard)):
            self._threads.append(threading.Thread(target=work, name=name, daemon=True))
            threads.start(self._threads[-1])

    def close(self) -> None:
        """Watch no more; a second call does nothing."""
        self._closed.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=BEAT_S)

    # -- what is known

    @property
    def hosts(self) -> list[str]:
        return [beat.host for beat in self._beats]

    def check(self) -> None:
        """Raises RankFailed if another rank has failed."""
        if self.failure is not None:
            raise RankFailed(self.failure)

    def wait_for_failure(self, seconds: float) -> Ending | None:
        """The failure of another rank, which may take a moment to be seen."""
        until = time.monotonic() + seconds
        while self.failure is None and time.monotonic() < until:
            time.sleep(_POLL_S)
        return self.failure

    def endings(self, seconds: float) -> list[Ending | None]:
        """Why each rank failed, when all have ended or ``seconds`` are over; None for one that has not failed."""
        self._listen_until(lambda: all(beat.state != "running" for beat in self._beats), seconds)
        return [beat.ending for beat in self._beats]

    def wait_for_others(self, seconds: float) -> None:
        """Until no other rank that is alive needs the store."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        gone = lambda rank: self._beats[rank].state == "left" or self._roll.is_silent(rank, time.monotonic())  # noqa: E731
        self._listen_until(lambda: all(map(gone, others)), seconds)

    def _listen_until(self, enough: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):  # the store's keeper has left
            while not enough() and time.monotonic() < until:
                time.sleep(_POLL_S)
                self._listen()

    # -- what is said

    def settle(self, ending: Ending | None) -> None:
        """Say how this rank ended (None: well), and leave the rest to the caller."""
        self._settled.set()
        with contextlib.suppress(RuntimeError):
            self._say(state="ended", ending=ending)

    def leave(self) -> None:
        """Say that this rank reads no more, and watch no more."""
        with contextlib.suppress(RuntimeError):
            self._say(state="left")
        self.close()

    def _say(self, **changes: Any) -> None:
        with self._lock:
            self._said = msgspec.structs.replace(self._said, count=self._said.count + 1, **changes)
            # The standard library's JSON: it escapes what is no text, as a path in a reason may be.
            self._store.set(self._keys[self.rank], json.dumps(msgspec.to_builtins(self._said)))

    # -- the threads

    def _listen(self) -> None:
        beats = [msgspec.convert(json.loads(text), Beat) for text in self._store.multi_get(self._keys)]
        found = self._roll.read(beats, time.monotonic())
        self._beats, self._heard_s = beats, time.monotonic()
        if found is not None:
            self._find(found)

    def _find(self, ending: Ending) -> Ending:
        """The first failure that was found: this one, unless there is one already."""
        with self._lock:
            self.failure = self.failure or ending
            return self.failure

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            try:
                self._say()
                self._listen()
            except RuntimeError:  # the store is gone: the guard counts the silence
                continue

    def _guard(self) -> None:
        while not self._closed.wait(BEAT_S / 4):
            if self.failure is None and time.monotonic() - self._heard_s > LOST_S:
                host = self._beats[0].host if self._beats else "the first host"
                self._find(Ending(0, host, f"the job's store has not answered for {LOST_S:g} s", 1))
            if self.failure is not None:
                break
        if self.failure is None or self._settled.is_set():
            return
        # On a thread of its own: what it calls may hang, and the last resort is for that too.
        with contextlib.suppress(DoesNotFit):  # no thread to be had: the last resort is left
            threads.start(
                threading.Thread(target=self._on_failure, args=(self.failure,), name="watch-failure", daemon=True)
            )
        if not self._settled.wait(GRACE_S) and not self._closed.is_set():
            self._last_resort(self.failure)
