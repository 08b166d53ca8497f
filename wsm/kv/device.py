"""The third tier of KV: a file or block device of its own, read and written past the page cache by several threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from wsm.disk.io_threads import IOThreads, Piece
from wsm.errors import KVDeviceError
from wsm.kv.target import KVTarget
from wsm.layout.groups import BLOCK, round_up
from wsm.store.packed_store import CHUNK_UNIT, LARGEST_CHUNK, SMALLEST_CHUNK

Transfer = Callable[[int, Sequence[memoryview], int], int]
Move = tuple[int, Tensor]
"""An offset on the device, and CPU memory."""


class KVDevice:
    """Bytes of offloaded KV, at offsets from 0 to ``nbytes``.

    Requests are begun in the order asked, and a large one is worked on by all threads, in chunks of at most 4 MiB. Two
    that touch the same bytes are not ordered: whoever reads what was written waits until its future has ended.

    Args:
        path: a file, which is made and goes again, or a block device, which is written over.
        nbytes: room for KV, rounded up to 4096.
        weights: the files and devices that the weights of this run lie on.
        pread, pwrite: as ``os.preadv`` and ``os.pwritev``; a test's fake drive.

    Raises:
        UnusableInput: for what must not be written (see :class:`KVTarget`), said before anything is.
        DoesNotFit: if it is too small.
        KVDeviceError: if it cannot be read or written.
    """

    def __init__(
        self,
        path: str,
        nbytes: int,
        *,
        weights: Sequence[str],
        threads: int = 8,
        pread: Transfer = os.preadv,
        pwrite: Transfer = os.pwritev,
    ) -> None:
        self.path, self.nbytes, self.threads = path, round_up(nbytes, BLOCK), threads
        self.warnings: list[str] = []
        self._pread, self._pwrite = pread, pwrite
        self._target = KVTarget(path, self.nbytes, weights)
        self._closed = False
        if self._target.buffered:
            self.warnings.append(
                f"the filesystem of {path} has no O_DIRECT: offloaded KV goes through the page cache, each write "
                "waiting for the drive; name a file on ext4 or XFS, or a partition of its own"
            )
        try:
            self._threads = IOThreads(threads, "wsm-kv")
        except BaseException:
            self._target.give_back()
            raise

    def read(self, moves: Iterable[Move]) -> Future[None]:
        """Queue one request: to fill each tensor from its offset on.

        Its future ends, with the first failure, when nothing touches their memory any more; what has not been begun
        after a failure is left out.

        Args:
            moves: at least one; offsets are multiples of 4096, tensors CPU uint8, contiguous, their addresses and sizes
                multiples of 4096.

        Raises:
            ValueError: for a buffer or an offset that does not fit.
            RuntimeError: if the device is closed.
        """
        return self._threads.submit(piece for move in moves for piece in self._pieces(*move, writing=False))

    def write(self, moves: Iterable[Move]) -> Future[None]:
        """Queue one request: to write each tensor to its offset; all else as :meth:`read`."""
        return self._threads.submit(piece for move in moves for piece in self._pieces(*move, writing=True))

    def close(self) -> None:
        """Join every thread and give the target back; requests that were not done end with a KVDeviceError.

        A file that this run made is removed, one that was there is emptied, a device keeps its superblock. A second
        call does nothing.
        """
        if self._closed:
            return
        self._closed = True
        self._threads.close(KVDeviceError(f"{self.path} was closed before this KV was read or written"))
        self._target.give_back()

    def _pieces(self, offset: int, buffer: Tensor, *, writing: bool) -> Iterator[Piece]:
        nbytes = buffer.nbytes
        if buffer.dtype != torch.uint8 or buffer.device.type != "cpu" or not buffer.is_contiguous():
            raise ValueError("KV is read and written as contiguous uint8 in CPU memory")
        if nbytes == 0 or (buffer.data_ptr() | nbytes | offset) % BLOCK:
            raise ValueError(f"{nbytes} bytes at {offset}: address, size and offset must be multiples of {BLOCK}")
        if not 0 <= offset <= self.nbytes - nbytes:
            raise ValueError(f"{nbytes} bytes at {offset} do not lie in the {self.nbytes} bytes of {self.path}")
        image = memoryview(buffer.view(-1).numpy().data)
        chunk = min(LARGEST_CHUNK, max(SMALLEST_CHUNK, round_up(-(-nbytes // self.threads), CHUNK_UNIT)))
        move = partial(self._move, writing=writing)
        return (
            partial(move, image[start : start + chunk], BLOCK + offset + start) for start in range(0, nbytes, chunk)
        )

    def _move(self, image: memoryview, offset: int, *, writing: bool) -> None:
        """Move one chunk, going on after a short transfer: from a whole block, as O_DIRECT asks."""
        transfer, what = (self._pwrite, "write") if writing else (self._pread, "read")
        done, tried = 0, False
        while done < len(image):
            try:
                moved = transfer(self._target.file, [image[done:]], offset + done)
            except OSError as error:
                raise self._error(offset + done, f"{what} error: {error.strerror}") from error
            whole = moved - moved % BLOCK
            # Part of a block is moved again from its beginning; once, for it may be where the target ends.
            if moved <= 0 or (whole == 0 and tried):
                raise self._error(offset + done, f"short {what}: the file or device ends here")
            done, tried = done + whole, whole == 0
        if self._target.buffered:
            self._drop(offset, len(image), writing=writing)

    def _drop(self, offset: int, nbytes: int, *, writing: bool) -> None:
        """Out of the page cache: what is written is on the drive first, so that its errors are ours to tell."""
        try:
            if writing:
                os.fdatasync(self._target.file)
            os.posix_fadvise(self._target.file, offset, nbytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._error(offset, f"write error: {error.strerror}") from error

    def _error(self, offset: int, what: str) -> KVDeviceError:
        return KVDeviceError(
            f"{self.path} at byte {offset}, in offloaded KV: {what}; check the drive, or name another --kv-device"
        )
