"""Bytes on the device of KV: moved by threads in whole blocks, each with a checksum of its own."""

from __future__ import annotations

import os
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
from wsm.disk.io_threads import IOThreads, Piece, Transfer, transfer_fully
from wsm.errors import KVDeviceError
from wsm.kv.target import KVTarget
from wsm.layout.groups import BLOCK, round_up
from wsm.settings import VerifyWhen

SMALLEST_PIECE, LARGEST_PIECE = 256 << 10, 32 << 20
"""Of a request, by one thread at a time. Few: of each Python takes some 50 microseconds, in which no other thread runs,
and the thread that computes waits for its turn at each of its calls."""

THREADS = 6
"""Each wants the interpreter as often as it moves a piece; five read 12 GB/s of a device in memory, beside the link."""

Move = tuple[int, Tensor]
"""An offset on the device and what lies there in one piece: CPU memory in one piece, or blocks ``[n, unit]`` that may
lie apart there."""
Blocks = npt.NDArray[np.uint8]
"""``[n, unit]``; each in one piece, but the next one may lie elsewhere."""


class KVDevice:
    """Bytes of offloaded KV, at offsets from 0 to ``nbytes``.

    Requests are begun in the order asked, and a large one is worked on by all threads, in pieces of at most 32 MiB. Two
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
            self._target.give_back()
            raise

    def read(self, moves: Iterable[Move], beside: Iterable[Piece] = ()) -> Future[None]:
        """Queue one request: to fill each tensor from its offset on, and to do the work ``beside`` it.

        Its future ends, with the first failure, when nothing touches their memory any more; what has not been begun
        after a failure is left out. Tensors are in CPU memory; their sizes and the offsets are whole units, and their
        addresses multiples of 4096, else ValueError. Raises RuntimeError if the device is closed.
        """
        return self._submit(chain(self._pieces(moves, writing=False), beside))

    def write(self, moves: Iterable[Move]) -> Future[None]:
        """Queue one request: to write each tensor to its offset; all else as :meth:`read`."""
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

    def close(self) -> None:
        """Join every thread and give the target back; requests that were not done end with a KVDeviceError.

        A second call does nothing.
        """
        if not self._closed:
            self._closed = True
            self._threads.close(KVDeviceError(f"{self._path} was closed before this KV was read or written"))
            self._target.give_back()

    def _pieces(self, moves: Iterable[Move], *, writing: bool) -> Iterator[Piece]:
        known = [(offset, self._blocks(offset, memory)) for offset, memory in moves]
        fewest, most = SMALLEST_PIECE // self._unit, LARGEST_PIECE // self._unit
        of_each = -(-sum(len(blocks) for _, blocks in known) // self._n_threads)
        together = max(1, min(most, max(fewest, of_each)))
        work = self._write if writing else self._read
        for offset, blocks in known:
            share = -(-len(blocks) // -(-len(blocks) // together))  # all pieces of a move are of about one size
            for start in range(0, len(blocks), share):
                yield partial(work, blocks[start : start + share], offset + start * self._unit)

    def _blocks(self, offset: int, memory: Tensor) -> Blocks:
        """What a move touches in memory, as blocks of a unit; ValueError where it cannot be moved."""
        if memory.nbytes == 0 or memory.nbytes % self._unit or offset % self._unit or memory.data_ptr() % BLOCK:
            raise ValueError(
                f"{memory.nbytes} bytes at {offset}: size and offset must be multiples of {self._unit}, the address of "
                f"{BLOCK}"
            )
        if not 0 <= offset <= self._nbytes - memory.nbytes:
            raise ValueError(f"{memory.nbytes} bytes at {offset} are not in the {self._nbytes} bytes of {self._path}")
        if memory.is_contiguous():
            memory = memory.view(-1).view(torch.uint8).view(-1, self._unit)
        if memory.shape[1:] != (self._unit,) or memory.stride(1) != 1 or memory.stride(0) % BLOCK:
            raise ValueError("memory that is not contiguous has to be blocks of a unit, each of them in one piece")
        blocks: Blocks = memory.numpy()
        return blocks

    def _write(self, blocks: Blocks, offset: int) -> None:
        units = slice(offset // self._unit, offset // self._unit + len(blocks))
        sums = self._checks.timed(blocks.nbytes, partial(_sums_of, blocks))
        self._sums[units] = 0  # until all of it is there
        self._seen_right[units] = False
        self._move(blocks, BLOCK + offset, writing=True)
        self._sums[units] = sums

    def _read(self, blocks: Blocks, offset: int) -> None:
        with self._checks.reading(blocks.nbytes):
            self._move(blocks, BLOCK + offset, writing=False)
        units = slice(offset // self._unit, offset // self._unit + len(blocks))
        if not self._checks.needed(bool(self._seen_right[units].all())):
            return
        right = self._sums[units] == self._checks.timed(blocks.nbytes, partial(_sums_of, blocks))
        if not right.all():
            at = BLOCK + offset + int(right.argmin()) * self._unit
            raise KVDeviceError(
                f"{self._path} at byte {at}, in offloaded KV: what was read is not what was written there (its "
                "checksum differs): the drive or another program changed it; check the drive, or name another "
                "--kv-device"
            )
        self._seen_right[units] = True

    def _move(self, blocks: Blocks, offset: int, *, writing: bool) -> None:
        transfer, verb = (self._pwrite, "write") if writing else (self._pread, "read")
        # As few parts as there are: the drive gets what lies together in memory in one.
        apart = [blocks.reshape(-1)] if blocks.flags.c_contiguous else blocks
        transfer_fully(transfer, self._target.file, [block.data for block in apart], offset, partial(self._error, verb))
        if not self._target.buffered:
            return
        try:
            if writing:
                os.fdatasync(self._target.file)  # before it leaves the page cache: its errors are ours to tell
            os.posix_fadvise(self._target.file, offset, blocks.nbytes, os.POSIX_FADV_DONTNEED)
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
    return np.fromiter((xxh3_64(block.data) or 1 for block in blocks), np.uint64, len(blocks))
