"""Threads that work on jobs cut into pieces: in the order asked, all of them on one job where it has pieces enough.

And what a piece of a read or write is: a transfer that goes on until all is moved.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue

from wsm import threads as life
from wsm.layout.groups import BLOCK

Piece = Callable[[], None]

MOST_BYTES = 16 << 20
"""In one system call, and Python runs between two."""
MOST_PARTS = 1024
"""Of memory, in one system call (IOV_MAX)."""

Transfer = Callable[[int, Sequence[memoryview], int], int]
"""As ``os.preadv`` and ``os.pwritev``."""
Failed = Callable[[int, OSError | int], Exception]
"""Makes the exception to raise, from the offset and the error, or the bytes that the last call moved."""


def transfer_fully(
    transfer: Transfer,
    file: int,
    parts: Sequence[memoryview],
    offset: int,
    failed: Failed,
    needed: int | None = None,
) -> None:
    """Move all ``parts``, which lie together in the file; after a short transfer go on at a whole block (O_DIRECT).

    They and ``offset`` are aligned to the file's blocks. ``needed`` bytes have to be there, where the file may end
    before the last block does; else all of them. ``failed`` makes what is raised if the file gives or takes no more.
    """
    done, tried, total = 0, False, sum(map(len, parts))
    needed = total if needed is None else needed
    while done < total:
        try:
            moved = transfer(file, _rest(parts, done, total), offset + done)
        except OSError as error:
            raise failed(offset + done, error) from error
        if moved > 0 and done + moved >= needed:
            return
        whole = moved - moved % BLOCK
        if moved <= 0 or (whole == 0 and tried):
            raise failed(offset + done, moved)
        # Part of a block is moved again from its beginning; once, for it may be where the file ends.
        done, tried = done + whole, whole == 0


def _rest(parts: Sequence[memoryview], done: int, total: int) -> Sequence[memoryview]:
    """What one call moves of what is left of ``total`` bytes behind the first ``done``."""
    if not done and total <= MOST_BYTES and len(parts) <= MOST_PARTS:
        return parts
    rest, room = list[memoryview](), MOST_BYTES
    for part in parts:
        if done >= len(part):
            done -= len(part)
        elif room == 0 or len(rest) == MOST_PARTS:
            break
        else:
            rest.append(part[done : done + room])
            done, room = 0, room - len(rest[-1])
    return rest


class _Job:
    """Pieces, how many of them have not come back (``left``), and the first failure."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.pieces = list(pieces)
        self.left = len(self.pieces)
        self.failure: BaseException | None = None
        self.future = Future[None]()
        self.future.set_running_or_notify_cancel()  # so nobody can cancel it: a thread may write into its memory

    def end(self) -> None:
        if self.failure is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(self.failure)


class IOThreads:
    """A job's pieces are dealt out in order, the next job's while the last of this one's are under way.

    There is at least 1 thread; they are called ``name`` and a number. Once a piece has failed, or the threads are
    closed, the pieces behind it are passed over. A job ends with its last piece, since those under way use its memory.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._dealt = SimpleQueue[tuple[_Job, Piece] | None]()
        self._lock = threading.Lock()
        self._closed: BaseException | None = None
        self._workers: list[life.Thread] = []
        try:
            for number in range(threads):
                worker = life.Thread(target=self._serve, name=f"{name}-{number}", daemon=True)
                self._workers.append(worker)  # first: an interrupted start may leave it running
                life.start(worker)
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
        with self._lock:
            if self._closed is not None:
                raise RuntimeError("closed: nothing more is read or written")
            for piece in job.pieces:
                self._dealt.put((job, piece))

    def _queue_after(self, job: _Job, ended: Future[None]) -> None:
        try:
            ended.result()
            self._queue(job)
        except BaseException as failure:
            job.failure = failure
            job.end()

    def close(self, failure: BaseException) -> None:
        """Join every thread; jobs with pieces left to deal end with ``failure``. May be called again.

        Raises ThreadsStuck where the drive holds one up.
        """
        with self._lock:
            self._closed = self._closed or failure
        with contextlib.suppress(Empty):  # here, since a thread may be held up by the drive
            while work := self._dealt.get_nowait():
                self._work(*work)
        for _ in self._workers:  # at every call: the one before may have been broken off
            self._dealt.put(None)
        life.join(self._workers)

    def check(self) -> None:
        """For a piece that takes long, between its parts: raises what :meth:`close` was called with."""
        if self._closed is not None:
            raise self._closed

    def __enter__(self) -> IOThreads:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(RuntimeError("closed before the work was done"))

    def _serve(self) -> None:
        while work := self._dealt.get():
            self._work(*work)
            del work  # an idle thread keeps no buffer alive, nor does a failure's traceback

    def _work(self, job: _Job, piece: Piece) -> None:
        failure = job.failure or self._closed
        if failure is None:
            try:
                piece()
            except BaseException as error:
                failure = error
        with self._lock:
            job.left -= 1
            job.failure = job.failure or failure
            is_last = job.left == 0
        if is_last:
            job.end()
        del job, piece, failure
