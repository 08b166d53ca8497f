"""Threads that work on jobs cut into pieces: in the order asked, all of them on one job where it has pieces enough."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial

Piece = Callable[[], None]


class _Job:
    """The pieces not dealt out yet, how many have not come back (``left``), and the first failure."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.pieces = deque(pieces)
        self.left = len(self.pieces)
        self.failure: BaseException | None = None
        self.future = Future[None]()
        self.future.set_running_or_notify_cancel()  # so nobody can cancel it: a thread may write into its memory

    def give_up(self, failure: BaseException) -> None:
        """Deal out no more of it. Pieces under way still use its memory, so its future waits for them."""
        if self.failure is None:
            self.failure = failure
        self.left -= len(self.pieces)
        self.pieces.clear()

    def end(self) -> None:
        if self.failure is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(self.failure)


class IOThreads:
    """A job's pieces are dealt out in order, the next job's while the last of this one's are under way.

    Threads (at least 1, called ``name`` and a number) share the jobs under ``_changed``: ``_jobs`` holds those with
    pieces to deal, in order. A job is ended once, by whoever brings ``left`` to 0.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._jobs: deque[_Job] = deque()
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

    def submit(self, pieces: Iterable[Piece], *, after: Future[None] | None = None) -> Future[None]:
        """Queue a job of at least one piece; its future ends, with the first failure, when no piece is under way.

        Callbacks of the future run on one of the threads, or on that of :meth:`close`. ``after`` is a job of other
        threads that has to end well first; where it fails, this one fails with it. RuntimeError after :meth:`close`.
        """
        job = _Job(pieces)
        if not job.pieces:
            raise ValueError("a job needs a piece of work")
        if after is None:
            self._queue(job)
        else:
            after.add_done_callback(partial(self._queue_after, job))
        return job.future

    def _queue(self, job: _Job) -> None:
        with self._changed:
            if self._closing:
                raise RuntimeError("closed: nothing more is read or written")
            self._jobs.append(job)
            self._changed.notify_all()

    def _queue_after(self, job: _Job, ended: Future[None]) -> None:
        try:
            ended.result()
            self._queue(job)
        except BaseException as failure:
            job.failure = failure
            job.end()

    def close(self, failure: BaseException) -> None:
        """Join every thread; jobs with pieces left to deal end with ``failure``. A second call does nothing."""
        with self._changed:
            self._closing = True
            waiting = [job for job in self._jobs if job.pieces]
            self._jobs.clear()
            for job in waiting:
                job.give_up(failure)
            untouched = [job for job in waiting if job.left == 0]
            self._changed.notify_all()
        for job in untouched:
            job.end()
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
            with self._changed:
                job.left -= 1
                if failure is not None:
                    job.give_up(failure)
                is_last = job.left == 0
            if is_last:
                job.end()
            del work, job, piece, failure  # an idle thread keeps no buffer alive
