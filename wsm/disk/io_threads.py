"""Threads that work on jobs cut into pieces: in the order asked, all of them on one job where it has pieces enough."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

Piece = Callable[[], None]
Done = Callable[[BaseException | None], None]


class _Job:
    """The pieces not dealt out yet, how many have not come back, and the first failure."""

    def __init__(self, pieces: Iterable[Piece], done: Done) -> None:
        self.pieces = deque(pieces)
        self.left = len(self.pieces)
        self.done = done
        self.failure: BaseException | None = None

    def give_up(self, failure: BaseException) -> None:
        """Deal out no more of it. Pieces under way still use its memory, so ``done`` waits for them."""
        if self.failure is None:
            self.failure = failure
        self.left -= len(self.pieces)
        self.pieces.clear()


class IOThreads:
    """A job's pieces are dealt out in order, the next job's while the last of this one's are under way.

    Threads share the jobs under ``_changed``: ``_jobs`` holds those with pieces to deal, in order; ``_open_jobs`` those
    whose ``done`` has not been called; a job leaves it exactly once, by whoever brings ``left`` to 0.

    Args:
        threads: how many; at least 1.
        name: what they are called, a number behind it.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._jobs: deque[_Job] = deque()
        self._open_jobs: set[_Job] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._workers: list[threading.Thread] = []
        try:
            for number in range(threads):
                worker = threading.Thread(target=self._serve, name=f"{name}-{number}", daemon=True)
                worker.start()
                self._workers.append(worker)
        except BaseException as error:
            self.close(error)
            raise

    def submit(self, pieces: Iterable[Piece], done: Done) -> None:
        """Queue a job of at least one piece.

        ``done(None)`` or ``done(first failure)`` is called once, when no piece of it is under way any more: by one of
        the threads, or by :meth:`close`. It must not raise.

        Raises:
            RuntimeError: if the threads have been closed.
        """
        job = _Job(pieces, done)
        if not job.pieces:
            raise ValueError("a job needs a piece of work")
        with self._changed:
            if self._closing:
                raise RuntimeError("closed: nothing more is read or written")
            self._jobs.append(job)
            self._open_jobs.add(job)
            self._changed.notify_all()

    def close(self, failure: BaseException) -> None:
        """Join every thread; jobs with pieces left to deal end with ``failure``. A second call does nothing."""
        untouched = []
        with self._changed:
            self._closing = True
            self._jobs.clear()
            for job in list(self._open_jobs):
                if job.pieces:
                    job.give_up(failure)
                    if job.left == 0:
                        self._open_jobs.discard(job)
                        untouched.append(job)
            self._changed.notify_all()
        for job in untouched:
            job.done(job.failure)
        for worker in self._workers:
            worker.join()

    def _next_piece(self) -> tuple[_Job, Piece] | None:
        with self._changed:
            while not self._closing:
                while self._jobs and not self._jobs[0].pieces:
                    self._jobs.popleft()
                if self._jobs:
                    return self._jobs[0], self._jobs[0].pieces.popleft()
                self._changed.wait()
        return None

    def _serve(self) -> None:
        while (work := self._next_piece()) is not None:
            job, piece = work
            failure: BaseException | None = None
            try:
                piece()
            except BaseException as error:
                failure = error
            self._finish_piece(job, failure)
            del work, job, piece, failure  # an idle thread keeps no buffer alive

    def _finish_piece(self, job: _Job, failure: BaseException | None) -> None:
        with self._changed:
            job.left -= 1
            if failure is not None:
                job.give_up(failure)
            if job.left > 0:
                return
            self._open_jobs.discard(job)
        job.done(job.failure)
