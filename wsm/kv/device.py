"""Bytes on the device of KV: moved by threads in whole blocks, each with a checksum of its own."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wsm.disk.checks import Checks
from wsm.disk.checksums import xxh3_64
from wsm.disk.io_threads import MOST_BYTES, MOST_PARTS, IOThreads, Piece, Transfer, transfer_fully
from wsm.errors import KVDeviceError
from wsm.kv.target import KVTarget
from wsm.layout.groups import BLOCK, round_up
from wsm.settings import VerifyWhen

SMALLEST_PIECE, LARGEST_PIECE = 256 << 10, MOST_BYTES
"""Of a request, by one thread at a time and in one system call. Each piece wants the interpreter, for which the threads
that compute and copy wait meanwhile: few of them, and nothing is made for each of their blocks but checksums."""
THREADS = 6
"""From memory, beside a busy link, four read 11.7 GB/s, six 16, eight 19.5; all slow down the one that computes."""

Blocks = Sequence[memoryview]
"""CPU memory, each of a unit's bytes at an address that is a multiple of 4096; the next one may lie elsewhere."""
Move = tuple[int, Blocks]
"""An offset on the device and the blocks that lie there, one behind the other."""


def blocks_of(memory: Tensor, unit: int) -> list[memoryview]:
    """CPU memory in one piece as blocks of ``unit`` bytes; ValueError where it is not whole ones, or misaligned."""
    if not memory.is_contiguous() or memory.nbytes % unit or memory.data_ptr() % BLOCK or unit % BLOCK:
        raise ValueError(
            f"{memory.nbytes} bytes at {memory.data_ptr():#x} are no blocks: they must be in one piece, a multiple of "
            f"{unit}, and their address one of {BLOCK}"
        )
    view = memory.view(-1).view(torch.uint8).numpy().data
    return [view[start : start + unit] for start in range(0, len(view), unit)]


class KVDevice:
    """Bytes of offloaded KV, at offsets from 0 to ``nbytes``.

    Requests are begun in the order asked, and a large one is worked on by all threads, in pieces of at most 16 MiB. Two
    that touch the same bytes are not ordered: whoever reads what was written waits until its future has ended.

    Bytes are written and read in whole units. In memory there is a checksum of each that was written, made before it
    goes and compared when it comes back, where ``verify`` asks for it: what the drive changed, lost or put elsewhere is
    a KVDeviceError, and so is a unit that was never written.

    Args and errors are those of :class:`KVTarget`, and a test's fake drive: as ``os.preadv`` and ``os.pwritev``.
    ``unit`` are the bytes of a checksum, a multiple of 4096.
    """

    def __init__(
        self,
        path: str,
        nbytes: int,
        *,
        weights: Sequence[str],
        unit: int = BLOCK,
        verify: VerifyWhen = "auto",
        threads: int = THREADS,
        pread: Transfer = os.preadv,
        pwrite: Transfer = os.pwritev,
    ) -> None:
        self._path, self._nbytes, self._unit = path, round_up(nbytes, BLOCK), unit
        self._pread, self._pwrite = pread, pwrite
        self._target = KVTarget(path, self._nbytes, weights)
        # xxh3-64 of each unit, 0 of one that was not written; and whether it was read back right. Pages of zeros take
        # no memory until they are used.
        self._sums = np.zeros(-(-self._nbytes // unit), dtype=np.uint64)
        self._seen_right = np.zeros(len(self._sums), dtype=np.bool_)
        self._checks = Checks(verify)
        # What was read is compared and marked in one step: where nobody waits for it any more, it may be written anew.
        self._marking = threading.Lock()
        self._closed = False
        warning = (
            f"the filesystem of {path} has no O_DIRECT: offloaded KV goes through the page cache, each write "
            "waiting for the drive; name a file on ext4 or XFS, or a partition of its own"
        )
        self.warnings = [warning] if self._target.buffered else []
        self._n_threads = threads
        try:
            self._threads = IOThreads(threads, "wsm-kv")
        except BaseException:
            with contextlib.suppress(KVDeviceError):
                self._target.give_back()
            raise

    def read(self, moves: Iterable[Move], beside: Iterable[Piece] = ()) -> Future[None]:
        """Queue one request: to fill blocks from each offset on, and to do the work ``beside`` it.

        Its future ends, with the first failure, when nothing touches their memory any more; what has not been begun
        after a failure is left out. Blocks are those of :func:`blocks_of`, offsets whole units, else ValueError.
        Raises RuntimeError if the device is closed.
        """
        return self._submit(chain(self._pieces(moves, writing=False), beside))

    def write(self, moves: Iterable[Move]) -> Future[None]:
        """Queue one request: to write blocks from each offset on; all else as :meth:`read`."""
        return self._submit(self._pieces(moves, writing=True))

    def _submit(self, pieces: Iterable[Piece]) -> Future[None]:
        known = list(pieces)
        if known:
            return self._threads.submit(known)
        nothing = Future[None]()
        nothing.set_result(None)
        return nothing

    def forget(self) -> None:
        """Nothing was written: all of it is refused until it is. With no request under way."""
        self._sums[:] = 0
        self._seen_right[:] = False

    def join(self) -> None:
        """Join every thread: nothing uses anybody's memory any more. Requests that were not done end with a
        KVDeviceError. Raises ThreadsStuck where the drive holds a thread up: another call goes on.
        """
        self._threads.close(KVDeviceError(f"{self._path} was closed before this KV was read or written"))

    def close(self) -> None:
        """:meth:`join`, and give the target back, which may raise KVDeviceError; after that a call does nothing."""
        self.join()
        if not self._closed:
            self._closed = True
            self._target.give_back()

    def _pieces(self, moves: Iterable[Move], *, writing: bool) -> Iterator[Piece]:
        runs = self._joined(moves)
        units, most = sum(len(blocks) for _, blocks in runs), max(1, min(LARGEST_PIECE // self._unit, MOST_PARTS))
        if sum(-(-len(blocks) // most) for _, blocks in runs) < 3 * self._n_threads:
            # Few pieces: so many that no thread has nothing left while others do, but for small requests.
            pieces = self._n_threads * max(1, -(-units // (self._n_threads * most)))
            most = max(1, SMALLEST_PIECE // self._unit, -(-units // pieces))
        work = self._write if writing else self._read
        for offset, blocks in runs:
            share = -(-len(blocks) // -(-len(blocks) // most))  # all pieces of a run are of about one size
            for start in range(0, len(blocks), share):
                yield partial(work, blocks[start : start + share], offset + start * self._unit)

    def _joined(self, moves: Iterable[Move]) -> list[tuple[int, list[memoryview]]]:
        """Moves that follow one another on the device as one; ValueError for one that is not in it."""
        runs = list[tuple[int, list[memoryview]]]()
        for offset, blocks in moves:
            nbytes = len(blocks) * self._unit
            if not blocks or len(blocks[0]) != self._unit or offset % self._unit:
                raise ValueError(f"{nbytes} bytes at {offset}: not whole blocks of {self._unit} bytes")
            if not 0 <= offset <= self._nbytes - nbytes:
                raise ValueError(f"{nbytes} bytes at {offset} are not in the {self._nbytes} bytes of {self._path}")
            if runs and runs[-1][0] + len(runs[-1][1]) * self._unit == offset:
                runs[-1][1].extend(blocks)
            else:
                runs.append((offset, list(blocks)))
        return runs

    def _units(self, blocks: Blocks, offset: int) -> slice:
        return slice(offset // self._unit, offset // self._unit + len(blocks))

    def _write(self, blocks: Blocks, offset: int) -> None:
        units = self._units(blocks, offset)
        sums = self._checks.timed(len(blocks) * self._unit, partial(_sums_of, blocks))
        with self._marking:
            self._sums[units] = 0  # until all of it is there
            self._seen_right[units] = False
        self._move(blocks, BLOCK + offset, writing=True)
        self._sums[units] = sums

    def _read(self, blocks: Blocks, offset: int) -> None:
        units, nbytes = self._units(blocks, offset), len(blocks) * self._unit
        with self._checks.reading(nbytes):
            self._move(blocks, BLOCK + offset, writing=False)
        if not self._checks.needed(bool(self._seen_right[units].all())):
            return
        sums = self._checks.timed(nbytes, partial(_sums_of, blocks))
        with self._marking:
            right = self._sums[units] == sums
            self._seen_right[units] |= right
        if not right.all():
            at = BLOCK + offset + int(right.argmin()) * self._unit
            raise KVDeviceError(
                f"{self._path} at byte {at}, in offloaded KV: what was read is not what was written there (its "
                "checksum differs): the drive or another program changed it; check the drive, or name another "
                "--kv-device"
            )

    def _move(self, blocks: Blocks, offset: int, *, writing: bool) -> None:
        transfer, verb = (self._pwrite, "write") if writing else (self._pread, "read")
        transfer_fully(transfer, self._target.file, blocks, offset, partial(self._error, verb))
        if not self._target.buffered:
            return
        try:
            if writing:
                os.fdatasync(self._target.file)  # before it leaves the page cache: its errors are ours to tell
            os.posix_fadvise(self._target.file, offset, len(blocks) * self._unit, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._error("write", offset, error) from error

    def _error(self, verb: str, offset: int, failed: OSError | int) -> KVDeviceError:
        ended = f"short {verb}: the file or device ends here"
        what = ended if isinstance(failed, int) else f"{verb} error: {failed.strerror}"
        return KVDeviceError(
            f"{self._path} at byte {offset}, in offloaded KV: {what}; check the drive, or name another --kv-device"
        )


def _sums_of(blocks: Blocks) -> npt.NDArray[np.uint64]:
    """Of each block; never 0. As an array: a list would be compared as floats, of which 53 bits count."""
    return np.fromiter((xxh3_64(block) or 1 for block in blocks), np.uint64, len(blocks))
