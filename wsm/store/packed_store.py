"""The SSD tier: O_DIRECT reads by several threads, straight into the slots."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import chain, cycle, pairwise, zip_longest

import torch
from torch import Tensor

from wsm import stop
from wsm.disk.blockdev import target_size
from wsm.disk.checks import Checks
from wsm.disk.checksums import xxh3_128
from wsm.disk.direct import open_for_reading
from wsm.disk.io_threads import IOThreads, Transfer, transfer_fully
from wsm.errors import StoreError
from wsm.formats import registry
from wsm.layout.groups import BLOCK, GroupId, GroupLayout, Kind, largest_images, planes_in, round_up
from wsm.settings import VerifyWhen
from wsm.store.description import StoreDescription, StoredGroup
from wsm.store.layout import AGAIN, Extent
from wsm.store.source import ChunkRead, GroupRead

SMALLEST_CHUNK, LARGEST_CHUNK = 256 << 10, 8 << 20
"""Each is read by a thread, and after it wants the interpreter, as those do who queue copies: few and large. A pass of
`mixed` from tmpfs took 549 ms with sixteen threads of 4 MiB and 405 with eight of 8 (docs/LOG.md)."""
CHUNK_UNIT = 64 << 10
"""A multiple of every logical block size."""
USUAL_THREADS, MOST_THREADS = 8, 16
CHECKSUM_THREADS = 8
"""One makes 6 to 13 GB/s of them."""
_CLOSED = "the packed store was closed before the read was done"


def _chunks(extents: Sequence[Extent], chunk_bytes: int) -> Iterator[tuple[Extent, int]]:
    """Where each chunk begins in its extent; those of several targets in turn, to keep every drive at work."""
    by_target: dict[int, list[tuple[Extent, int]]] = {}
    for extent in extents:
        starts = range(0, extent.nbytes, chunk_bytes)
        by_target.setdefault(extent.target, []).extend((extent, start) for start in starts)
    return filter(None, chain.from_iterable(zip_longest(*by_target.values())))


class PackedStore:
    """Reads a packed store's groups; a ``GroupSource``.

    A chunk is at most 8 MiB, and as many are in flight as make ``staging_bytes`` (at least one, of 256 KiB). Groups are
    read in the order asked, the next one's chunks beginning while the last of this one's are under way; checksums are
    made by threads of their own, meanwhile, where ``checks`` ask for it. After every read the superblocks are looked at
    again: packing takes them away before it changes a group. A test's fake drive reads by ``pread``.

    Raises UnusableInput if a target cannot be opened, StoreError if it has not the manifest's store or not all of it.
    """

    def __init__(
        self,
        description: StoreDescription,
        *,
        staging_bytes: int,
        verify: VerifyWhen = "auto",
        pread: Transfer = os.preadv,
    ) -> None:
        self.description = description
        self.warnings: list[str] = []
        self.checks, self._pread = Checks(verify), pread
        self._verified: set[GroupId | None] = set()
        wanted = max(SMALLEST_CHUNK, staging_bytes // USUAL_THREADS)
        self.chunk_bytes = min(LARGEST_CHUNK, wanted - wanted % CHUNK_UNIT)
        self.threads = max(1, min(MOST_THREADS, staging_bytes // self.chunk_bytes))
        self._files: list[int] = []
        self._buffered: set[int] = set()
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._close_files)
            self._open()
            self._check_identity()
            self._checkers = IOThreads(CHECKSUM_THREADS, "wsm-checksum")
            on_failure.callback(self._checkers.close, StoreError(_CLOSED))
            self._reads = IOThreads(self.threads, "wsm-io")
            on_failure.pop_all()

    def _open(self) -> None:
        for target in self.description.targets:
            file, buffered = open_for_reading(target)
            self._files.append(file)
            if buffered:
                self._buffered.add(file)
                self.warnings.append(
                    f"the filesystem of {target} has no O_DIRECT: reads go through the page cache, so ssd figures are "
                    "not the drive's; put the store on ext4, XFS or a partition of its own"
                )

    def _check_identity(self) -> None:
        """That these are the manifest's targets, whole; once, before anything is read."""
        targets = self.description.targets
        self._check_superblocks(range(len(self.description.superblocks)))
        sizes = [target_size(file) for file in self._files]
        for stored in self.description.groups.values():
            for extent in stored.extents:
                if sizes[extent.target] < extent.offset + extent.needed:
                    raise StoreError(
                        f"{targets[extent.target]} ends at byte {sizes[extent.target]}, before the end of "
                        f"{stored.name} at byte {extent.offset + extent.needed}: it was cut short, or is another "
                        f"device; {AGAIN}"
                    )

    def _check_superblocks(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            expected = self.description.superblocks[number]
            expected.check(self._read_few(number, 0, BLOCK), self.description.targets[number])

    def _read_few(self, target: int, offset: int, nbytes: int) -> bytes:
        """A few bytes from anywhere, through an aligned buffer of their own; fewer where the target ends."""
        low = offset - offset % CHUNK_UNIT
        buffer = mmap.mmap(-1, round_up(offset + nbytes, CHUNK_UNIT) - low)
        try:
            got = os.preadv(self._files[target], [buffer], low)
            if self._files[target] in self._buffered:  # of a network's file the cache may keep what was there before
                os.posix_fadvise(self._files[target], low, len(buffer), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise StoreError(
                f"{self.description.targets[target]} at byte {low}: read error: {error.strerror}; check the drive"
            ) from error
        return buffer[offset - low : min(got, offset - low + nbytes)]

    def peek(self, group: GroupId | None, slot_offset: int, nbytes: int) -> bytes:
        """``nbytes`` of a group's image from ``slot_offset`` on, in one extent; StoreError if they are not there."""
        extents = self.description.groups[group].extents
        extent = next(e for e in extents if e.slot_offset <= slot_offset < e.slot_offset + e.nbytes)
        start = extent.offset + slot_offset - extent.slot_offset
        found = self._read_few(extent.target, start, nbytes)
        if len(found) < nbytes:
            target = self.description.targets[extent.target]
            raise StoreError(f"{target} ends at byte {start + len(found)}: it was cut short; {AGAIN}")
        return found

    def layout(self, group: GroupId | None) -> GroupLayout:
        return self.description.groups[group].layout

    def slot_bytes(self, kind: Kind) -> int:
        return largest_images({group: stored.layout for group, stored in self.description.groups.items()})[kind]

    def read(self, group: GroupId | None, buffer: Tensor) -> GroupRead:
        """Queue a group's read into ``buffer`` (CPU ``uint8``, contiguous, 4096-aligned, at least the image's bytes).

        Callbacks of its futures run on a thread of the store, or on that of :meth:`close`. Raises ValueError for a
        buffer that is too small or misaligned, RuntimeError if the store is closed.
        """
        stored = self.description.groups[group]
        nbytes = stored.layout.nbytes
        if buffer.nbytes < nbytes or buffer.data_ptr() % BLOCK:
            raise ValueError(f"{stored.name} needs {nbytes} bytes, {BLOCK}-aligned, not {buffer.nbytes}")
        image, came = memoryview(buffer.numpy().data)[:nbytes], list[ChunkRead]()
        chunks = _chunks(stored.extents, self.chunk_bytes)
        self.checks.read_begins()
        try:
            arrived = self._reads.submit(partial(self._read, stored, image, *chunk, came) for chunk in chunks)
        except BaseException:
            self.checks.read_ends(0)
            raise
        arrived.add_done_callback(lambda _: self.checks.read_ends(sum(chunk.nbytes for chunk in came)))
        if not self.description.superblocks and stored.checksum is None:
            return GroupRead(arrived, arrived, came)
        return GroupRead(arrived, self._checkers.submit([partial(self._check, stored, image)], after=arrived), came)

    def close(self) -> None:
        """Join every thread; reads that were not done end with a StoreError. A second call does nothing."""
        self._reads.close(StoreError(_CLOSED))  # first, since they ask for checks
        self._checkers.close(StoreError(_CLOSED))
        self._close_files()

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def _read(self, stored: StoredGroup, image: memoryview, extent: Extent, start: int, came: list[ChunkRead]) -> None:
        """Read a chunk whole, but for what is behind the end of a target in its last block."""
        began = time.perf_counter()
        file, nbytes = self._files[extent.target], min(self.chunk_bytes, extent.nbytes - start)
        place, offset = extent.slot_offset + start, extent.offset + start
        failed = partial(self._error, stored, extent)
        transfer_fully(self._pread, file, [image[place : place + nbytes]], offset, failed, extent.needed - start)
        if file in self._buffered:
            os.posix_fadvise(file, offset, nbytes, os.POSIX_FADV_DONTNEED)
        came.append(ChunkRead(nbytes, began, time.perf_counter()))

    def _error(self, stored: StoredGroup, extent: Extent, offset: int, failed: OSError | int) -> StoreError:
        target, ended = self.description.targets[extent.target], "the store ends here (short read): it was cut short"
        what = ended if isinstance(failed, int) else f"read error: {failed.strerror}"
        return StoreError(f"{target} at byte {offset}, in {stored.name}: {what}; check the drive, or {AGAIN}")

    def _check(self, stored: StoredGroup, image: memoryview) -> None:
        """To be asked once the image is there: what a superblock says then was true while it was read."""
        if self.description.superblocks:
            self._check_superblocks(sorted({extent.target for extent in stored.extents}))
        if stored.checksum is None or not self.checks.needed(stored.group in self._verified):
            return
        if self.checks.timed(len(image), partial(xxh3_128, image)) != stored.checksum:
            where = ", ".join(f"{self.description.targets[e.target]} at byte {e.offset}" for e in stored.extents)
            raise StoreError(
                f"{stored.name} ({where}) does not match its checksum: the store was damaged or overwritten; {AGAIN}"
            )
        if stored.group not in self._verified:  # the same bytes need no second look
            self._check_planes(stored, image)
        self._verified.add(stored.group)

    def _check_planes(self, stored: StoredGroup, image: memoryview) -> None:
        for tensor in stored.layout.encoded:
            found = planes_in(torch.frombuffer(image, dtype=torch.uint8), tensor)
            try:
                registry.get(found.format).check((found.shape[0], found.shape[1]), found.planes)
            except StoreError as error:
                raise StoreError(
                    f"{tensor.name} of {stored.name} in {self.description.path} cannot be decoded: {error}; {AGAIN}"
                ) from error


def verify(store: PackedStore, *, progress: Callable[[int], None] = lambda nbytes: None) -> list[str]:
    """A sentence for every group that cannot be read or is not what was packed; none if the store is sound.

    A store of version 1 has no checksums: reading is then all that is checked. ``progress`` is called with the bytes of
    each group read.
    """
    groups = store.description.groups.values()
    largest = max(stored.layout.nbytes for stored in groups)
    # Two, so that the drive goes on while a checksum is made.
    buffers = cycle(torch.frombuffer(mmap.mmap(-1, largest), dtype=torch.uint8) for _ in range(2))
    reads = (store.read(stored.group, buffer).checked for stored, buffer in zip(groups, buffers, strict=False))
    bad = []
    for stored, (read, _next) in zip(groups, pairwise(chain(reads, [Future[None]()])), strict=True):
        try:
            stop.result(read)
        except StoreError as error:
            bad.append(str(error))
        progress(stored.layout.nbytes)
    return bad
