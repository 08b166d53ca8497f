"""Threads beside the computation: what they share under one lock, how a failure reaches everyone, and one life."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import TypeVar

from wsm import stop, threads
from wsm.engine.device import Device
from wsm.errors import DoesNotFit, StoreError, UnusableInput

T = TypeVar("T")
P = TypeVar("P", bound="Threaded")


class SharedState:
    """What a subclass adds is read and written under ``_lock`` alone; every change calls :meth:`_wake`.

    Sentences say that a thread of ``name`` failed, or that it is closed; once ``closing``, nothing more is handed out.

    The lock is taken by ``with`` and nobody sleeps holding it: in a condition's Python code KeyboardInterrupt could
    come between taking the lock and the block that gives it back, and every thread would wait for it for ever.
    """

    def __init__(self, name: str) -> None:
        self._lock = threading.RLock()
        self._bells: list[SimpleQueue[None]] = []
        self._name = name
        self.threads: list[threads.Thread] = []
        self._failure: BaseException | None = None
        self._told = self._over = False
        self.closing = False

    def _wake(self) -> None:
        """Something has changed: who waits looks again. With the lock held."""
        while self._bells:
            self._bells.pop().put(None)

    def _sleep(self, bell: SimpleQueue[None]) -> None:
        """Until a change, for a moment at most: no wait depends on a wake-up that was lost, or on a thread that is."""
        stop.pause(bell)
        with self._lock:
            if bell in self._bells:
                self._bells.remove(bell)

    def _wait(self, claim: Callable[[], T | None]) -> T:
        """Wait, on the computing thread, until ``claim`` gives something; it is asked under the lock.

        Raises StoreError, DoesNotFit, UnusableInput or RuntimeError for whatever failed on a thread, as the cause, and
        Stopped if a stop is wished.
        """
        bell = SimpleQueue[None]()
        while True:
            stop.check()
            with self._lock:
                self.raise_failure()
                if self.closing:
                    raise RuntimeError(f"closed: {self._name}")
                claimed = claim()
                if claimed is not None:
                    return claimed
                self._raise_where_one_is_gone()
                self._bells.append(bell)
            self._sleep(bell)

    def raise_failure(self, *, unless_told: bool = False) -> None:
        """Raise what failed on a thread, as :meth:`_wait` does; ``unless_told``: but for what was raised before."""
        if (cause := self._failure) is not None and not (unless_told and self._told):
            self._told = True
            if isinstance(cause, StoreError | DoesNotFit | UnusableInput):
                raise type(cause)(str(cause)) from cause
            raise RuntimeError(f"a thread of {self._name} failed: {cause!r}") from cause

    def _raise_where_one_is_gone(self) -> None:
        for thread in self.threads:
            if thread.has_ended:
                raise RuntimeError(f"the thread {thread.name} of {self._name} is gone: nothing more will come")

    def next(self, claim: Callable[[], T | None], *, to_the_end: bool = False) -> T | None:
        """Wait, on a thread, until there is something to ``claim``, asked under the lock; None once closing.

        ``to_the_end``: what is there when closing begins is still handed out.
        """
        bell = SimpleQueue[None]()
        while True:
            with self._lock:
                claimed = claim() if to_the_end or not self.closing else None
                if claimed is not None or self.closing:
                    return claimed
                self._bells.append(bell)
            self._sleep(bell)

    def fail(self, failure: BaseException) -> None:
        """Hand an exception of any thread to whoever waits, and to the next caller."""
        with self._lock:
            if self._failure is None and not self._over:
                self._failure = failure
            self._wake()

    def close(self) -> None:
        """Let everyone who waits go; nothing more is handed out."""
        with self._lock:
            self.closing = True
            self._wake()

    def end(self) -> None:
        """Every thread has ended: what a drive still has under way is for nobody, and may fail."""
        with self._lock:
            self._over = True


class Threaded(ABC):
    """A part of the engine with threads of its own: started, stopped and closed once. A context manager.

    The threads share a state; whatever fails on one of them is handed to it.
    """

    def __init__(self, state: SharedState, device: Device) -> None:
        self.device, self._state = device, state

    def _begin(self, works: Mapping[str, Callable[[], None]]) -> None:
        """Start a thread of each name."""
        for name, work in works.items():
            thread = threads.Thread(target=self._guard, args=(self.device.enter_thread, work), name=name, daemon=True)
            self._state.threads.append(thread)  # first: an interrupted start may leave it running
            threads.start(thread)

    def _guard(self, *works: Callable[[], None]) -> None:
        try:
            for work in works:
                work()
        except BaseException as error:
            self._state.fail(error)

    def stop(self) -> None:
        """Begin nothing more and join every thread: the telemetry is then complete, and nothing can be had."""
        self._state.close()
        threads.join(self._state.threads)
        self._state.end()
        self._state.threads.clear()
        self.device.synchronize()

    def raise_unheard(self) -> None:
        """Raise what has failed on a thread since anybody last waited, after :meth:`stop`: no token hung on it."""
        self._state.raise_failure(unless_told=True)

    def close(self) -> None:
        """Stop, and free every page. May be called twice, and after a failure.

        Raises ThreadsStuck, and frees nothing, where a thread does not end: it may still write there.
        """
        try:
            self.stop()
        except threads.ThreadsStuck:
            raise
        except BaseException:
            if not self._state.threads:  # else broken off while they were waited for: another close goes on
                self._free_memory()
            raise
        self._free_memory()

    @abstractmethod
    def _free_memory(self) -> None: ...

    def __enter__(self: P) -> P:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
