"""KV on a device of its own: whole blocks there, each row's newest one in page-locked memory, where it grows."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import accumulate, product

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from wsm.disk.checks import Checks
from wsm.disk.io_threads import IOThreads, Piece, Transfer, transfer_fully
from wsm.engine.slots import Slot
from wsm.engine.telemetry import Telemetry
from wsm.errors import KVDeviceError, UnusableInput
from wsm.kv.schedule import Fetch, Write
from wsm.kv.target import KVTarget
from wsm.layout.groups import BLOCK, round_up
from wsm.layout.kv import KV_BLOCK_TOKENS, KVPlacement, Unit
from wsm.plan.kv import DISK_SLOTS, tail_bytes
from wsm.settings import VerifyWhen
from wsm.store.packed_store import CHUNK_UNIT, LARGEST_CHUNK, SMALLEST_CHUNK

Move = tuple[int, Tensor]
"""An offset on the device, and CPU memory."""


class KVDisk:
    """Reads units into page-locked slots ahead of their fetch, and writes blocks as they fill.

    One thread reads, another writes. ``take`` gives page-locked CPU memory, ``uint8``, so many bytes. Raises
    UnusableInput, DoesNotFit or StoreError as :class:`KVDevice`; reading and writing raise StoreError if they fail.
    """

    def __init__(
        self,
        placement: KVPlacement,
        path: str,
        weights: Sequence[str],
        take: Callable[[int], Tensor],
        telemetry: Telemetry,
        verify: VerifyWhen = "auto",
    ) -> None:
        layout = self.layout = placement.layout
        if layout.block_bytes % BLOCK:
            raise UnusableInput(
                f"--kv-device moves blocks of whole {BLOCK} bytes, this model's have {layout.block_bytes}: leave it out"
            )
        self._telemetry = telemetry
        ends = [0, *accumulate(layout.unit_bytes(unit) for unit in placement.disk)]
        self._offsets = dict(zip(placement.disk, ends, strict=False))
        # The newest blocks of each unit's rows, uint8 [rows, n_kv_heads, 256, 2, record].
        self.tails: dict[Unit, Tensor] = {}
        for unit in placement.disk:
            rows = len(layout.rows_of(unit.stretch))
            self.tails[unit] = take(tail_bytes(layout, rows)).view(layout.shape(rows, KV_BLOCK_TOKENS))
        self.slots = [Slot(take(layout.window_bytes)) for _ in range(DISK_SLOTS - 1)]  # on the way up
        self.down = take(layout.window_bytes)  # for a window on its way down
        # The first row and the blocks to bring of each unit next time, in CPU memory.
        self.wanted: dict[Unit, tuple[int, Tensor]] = {}
        self._device = KVDevice(path, ends[-1], weights=weights, unit=layout.block_bytes, verify=verify)
        self.warnings = self._device.warnings

    def _offset(self, unit: Unit, row: int, head: int) -> int:
        """Where the blocks of a head are on the device."""
        return self._offsets[unit] + row * self.layout.row_bytes + head * self.layout.head_bytes

    # -- up

    def read(self, fetch: Fetch) -> None:
        """Read what a fetch brings into its slot."""
        slot = fetch.room.buffer
        moves = list(self._chosen(fetch, slot) if fetch.k else self._whole(fetch, slot))
        self._move(moves, fetch.unit, fetch.pass_no, writing=False)
        self._add_tails(fetch, slot)

    def _whole(self, fetch: Fetch, slot: Tensor) -> Iterator[Move]:
        blocks = [length // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS for length in fetch.lengths]
        # Not a byte that this run has not written: a device keeps those of others, and they may be read as NaN.
        for run in self.layout.runs(blocks, worth=1.0):
            yield self._offsets[fetch.unit] + run.offset, slot[run.offset : run.offset + run.nbytes]

    def _chosen(self, fetch: Fetch, slot: Tensor) -> Iterator[Move]:
        """A piece for each chosen whole block; the newest comes from memory, and what is masked stays as it is."""
        layout, size = self.layout, self.layout.block_bytes
        first, wanted = self.wanted[fetch.unit]
        compact = slot[: len(fetch.lengths) * layout.n_kv_heads * fetch.k * size].view(-1, size)
        for place, heads in enumerate(wanted.tolist()):
            row = first + place
            whole = fetch.lengths[row] // KV_BLOCK_TOKENS
            for head, blocks in enumerate(heads):
                base = self._offset(fetch.unit, row, head)
                target = (row * layout.n_kv_heads + head) * fetch.k
                for number, block in enumerate(blocks[: min(whole, fetch.k - 1)]):
                    yield base + block * size, compact[target + number]

    def _add_tails(self, fetch: Fetch, slot: Tensor) -> None:
        tails = self.tails[fetch.unit]
        tokens = fetch.k * KV_BLOCK_TOKENS or self.layout.tokens
        shape = self.layout.shape(len(fetch.lengths), tokens)
        window = slot[: torch.Size(shape).numel()].view(shape)
        for row, length in enumerate(fetch.lengths):
            begin = tokens - KV_BLOCK_TOKENS if fetch.k else length // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS
            if length % KV_BLOCK_TOKENS:
                window[row, :, begin : begin + KV_BLOCK_TOKENS].copy_(tails[row])

    # -- down

    def write_window(self, write: Write) -> None:
        """The changed rows of a unit, which are in ``down``: whole blocks to the device, the rest to memory."""
        layout, rows = self.layout, len(write.after)
        window = self.down[: rows * layout.row_bytes].view(layout.shape(rows))
        whole = [after // KV_BLOCK_TOKENS if row in write.changed else 0 for row, after in enumerate(write.after)]
        runs = layout.runs([blocks * KV_BLOCK_TOKENS for blocks in whole], worth=1.0)
        moves = [
            (self._offsets[write.unit] + run.offset, self.down[run.offset : run.offset + run.nbytes]) for run in runs
        ]
        self._move(moves, write.unit, write.pass_no, writing=True)
        for row in write.changed:
            if write.after[row] % KV_BLOCK_TOKENS:
                begin = whole[row] * KV_BLOCK_TOKENS
                self.tails[write.unit][row].copy_(window[row, :, begin : begin + KV_BLOCK_TOKENS])

    def write_full(self, write: Write, rows: Sequence[int]) -> None:
        """Blocks that a decode step has filled, from memory to the device."""
        layout, tails = self.layout, self.tails[write.unit]
        full = [row for row in rows if write.after[row] % KV_BLOCK_TOKENS == 0]
        begin = {row: write.before[row] // KV_BLOCK_TOKENS * layout.block_bytes for row in full}
        places = product(full, range(layout.n_kv_heads))
        moves = [(self._offset(write.unit, row, head) + begin[row], tails[row, head]) for row, head in places]
        self._move(moves, write.unit, write.pass_no, writing=True)

    def _move(self, moves: Sequence[Move], unit: Unit, pass_no: int, *, writing: bool) -> None:
        """All of them, and until all are done; the first failure is raised."""
        if not moves:
            return
        started = time.perf_counter()
        (self._device.write if writing else self._device.read)(moves).result()
        nbytes = sum(memory.nbytes for _, memory in moves)
        tier = "kv_write" if writing else "kv_read"
        self._telemetry.kv_disk(tier, unit.layer, pass_no, nbytes, started, time.perf_counter())

    def close(self) -> None:
        """Give the device back."""
        self._device.close()
        self.tails.clear()


class KVDevice:
    """Bytes of offloaded KV, at offsets from 0 to ``nbytes``.

    Requests are begun in the order asked, and a large one is worked on by all threads, in chunks of at most 4 MiB. Two
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
        threads: int = 8,
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

    def read(self, moves: Iterable[Move]) -> Future[None]:
        """Queue one request of at least one move: to fill each tensor from its offset on.

        Its future ends, with the first failure, when nothing touches their memory any more; what has not been begun
        after a failure is left out. Tensors are contiguous and in CPU memory; their sizes and the offsets are whole
        units, and their addresses multiples of 4096, else ValueError. Raises RuntimeError if the device is closed.
        """
        return self._threads.submit(piece for move in moves for piece in self._pieces(*move, writing=False))

    def write(self, moves: Iterable[Move]) -> Future[None]:
        """Queue one request: to write each tensor to its offset; all else as :meth:`read`."""
        return self._threads.submit(piece for move in moves for piece in self._pieces(*move, writing=True))

    def close(self) -> None:
        """Join every thread and give the target back; requests that were not done end with a KVDeviceError.

        A second call does nothing.
        """
        if not self._closed:
            self._closed = True
            self._threads.close(KVDeviceError(f"{self._path} was closed before this KV was read or written"))
            self._target.give_back()

    def _pieces(self, offset: int, buffer: Tensor, *, writing: bool) -> Iterator[Piece]:
        nbytes = buffer.nbytes
        if nbytes == 0 or nbytes % self._unit or offset % self._unit or buffer.data_ptr() % BLOCK:
            raise ValueError(
                f"{nbytes} bytes at {offset}: size and offset must be multiples of {self._unit}, the address of {BLOCK}"
            )
        if not 0 <= offset <= self._nbytes - nbytes:
            raise ValueError(f"{nbytes} bytes at {offset} are not in the {self._nbytes} bytes of {self._path}")
        image = memoryview(buffer.view(-1).view(torch.uint8).numpy().data)
        chunk = min(LARGEST_CHUNK, max(SMALLEST_CHUNK, round_up(-(-nbytes // self._n_threads), CHUNK_UNIT)))
        chunk = max(1, chunk // self._unit) * self._unit
        work = self._write if writing else self._read
        for start in range(0, nbytes, chunk):
            yield partial(work, image[start : start + chunk], offset + start)

    def _write(self, image: memoryview, offset: int) -> None:
        first, sums = offset // self._unit, self._checks.timed(len(image), partial(self._sums_of, image))
        self._sums[first : first + len(sums)] = 0  # until all of it is there
        self._seen_right[first : first + len(sums)] = False
        self._move(image, BLOCK + offset, writing=True)
        self._sums[first : first + len(sums)] = sums

    def _read(self, image: memoryview, offset: int) -> None:
        with self._checks.reading(len(image)):
            self._move(image, BLOCK + offset, writing=False)
        units = slice(offset // self._unit, (offset + len(image)) // self._unit)
        if not self._checks.needed(bool(self._seen_right[units].all())):
            return
        right = self._sums[units] == self._checks.timed(len(image), partial(self._sums_of, image))
        if not right.all():
            at = BLOCK + offset + int(right.argmin()) * self._unit
            raise KVDeviceError(
                f"{self._path} at byte {at}, in offloaded KV: what was read is not what was written there (its "
                "checksum differs): the drive or another program changed it; check the drive, or name another "
                "--kv-device"
            )
        self._seen_right[units] = True

    def _sums_of(self, image: memoryview) -> npt.NDArray[np.uint64]:
        """Of each unit; never 0. As an array: a list would be compared as floats, of which 53 bits count."""
        parts = range(0, len(image), self._unit)
        sums = (xxhash.xxh3_64_intdigest(image[start : start + self._unit]) or 1 for start in parts)
        return np.fromiter(sums, np.uint64, len(parts))

    def _move(self, image: memoryview, offset: int, *, writing: bool) -> None:
        transfer, verb = (self._pwrite, "write") if writing else (self._pread, "read")
        transfer_fully(transfer, self._target.file, image, offset, partial(self._error, verb))
        if not self._target.buffered:
            return
        try:
            if writing:
                os.fdatasync(self._target.file)  # before it leaves the page cache: its errors are ours to tell
            os.posix_fadvise(self._target.file, offset, len(image), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._error("write", offset, error) from error

    def _error(self, verb: str, offset: int, failed: OSError | int) -> KVDeviceError:
        ended = f"short {verb}: the file or device ends here"
        what = ended if isinstance(failed, int) else f"{verb} error: {failed.strerror}"
        return KVDeviceError(
            f"{self._path} at byte {offset}, in offloaded KV: {what}; check the drive, or name another --kv-device"
        )
