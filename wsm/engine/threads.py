"""Threads beside the computation: what they share under one lock, how a failure reaches everyone, and one life."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TypeVar

from wsm.engine.device import Device
from wsm.errors import DoesNotFit, StoreError, UnusableInput

T = TypeVar("T")
P = TypeVar("P", bound="Threaded")


class SharedState:
    """What a subclass adds is read and written under ``_changed`` alone, whose waiters every change wakes.

    Sentences say that a thread of ``name`` failed, or that it is closed; once ``closing``, nothing more is handed out.
    """

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._name = name
        self._failure: BaseException | None = None
        self.closing = False

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait until ``ready``, with the lock held.

        Raises StoreError, DoesNotFit, UnusableInput or RuntimeError for whatever failed on a thread, as the cause.
        """
        self._changed.wait_for(lambda: ready() or self.closing or self._failure is not None)
        if (cause := self._failure) is not None:
            if isinstance(cause, StoreError | DoesNotFit | UnusableInput):
                raise type(cause)(str(cause)) from cause
            raise RuntimeError(f"a thread of {self._name} failed: {cause!r}") from cause
        if self.closing:
            raise RuntimeError(f"closed: {self._name}")

    def next(self, claim: Callable[[], T | None]) -> T | None:
        """Wait until there is something to ``claim``, which is asked under the lock; None once closing."""
        with self._changed:
            while not self.closing:
                claimed = claim()
                if claimed is not None:
                    return claimed
                self._changed.wait()
        return None

    def fail(self, failure: BaseException) -> None:
        """Hand an exception of any thread to whoever waits, and to the next caller."""
        with self._changed:
            if self._failure is None and not self.closing:
                self._failure = failure
            self._changed.notify_all()

    def close(self) -> None:
        """Let everyone who waits go; nothing more is handed out."""
        with self._changed:
            self.closing = True
            self._changed.notify_all()


class Threaded(ABC):
    """A part of the engine with threads of its own: started, stopped and closed once. A context manager.

    The threads share a state; whatever fails on one of them is handed to it.
    """

    def __init__(self, state: SharedState, device: Device) -> None:
        self.device, self._state = device, state
        self._threads: list[threading.Thread] = []

    def _begin(self, works: Mapping[str, Callable[[], None]]) -> None:
        """Start a thread of each name."""
        for name, work in works.items():
            thread = threading.Thread(target=self._guard, args=(self.device.enter_thread, work), name=name, daemon=True)
            self._threads.append(thread)  # first: an interrupted start may leave it running
            thread.start()

    def _guard(self, *works: Callable[[], None]) -> None:
        try:
            for work in works:
                work()
        except BaseException as error:
            self._state.fail(error)

    def stop(self) -> None:
        """Begin nothing more and join every thread: the telemetry is then complete, and nothing can be had."""
        self._state.close()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._threads.clear()
        self.device.synchronize()

    def close(self) -> None:
        """Stop, and free every page. May be called twice, and after a failure."""
        try:
            self.stop()
        finally:
            self._free_memory()

    @abstractmethod
    def _free_memory(self) -> None: ...

    def __enter__(self: P) -> P:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
