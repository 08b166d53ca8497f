"""The SSD tier: O_DIRECT reads by several threads, straight into the slots."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import Literal, NamedTuple

import xxhash
from torch import Tensor

from wsm.disk.blockdev import target_size
from wsm.disk.io_threads import IOThreads
from wsm.disk.targets import open_for_reading
from wsm.errors import StoreError
from wsm.layout.groups import BLOCK, GroupId, GroupLayout, Kind, round_up
from wsm.store import superblock
from wsm.store.description import StoreDescription, StoredGroup
from wsm.store.extents import Extent
from wsm.store.source import ChunkRead, GroupRead
from wsm.store.superblock import AGAIN

LARGEST_CHUNK = 4 << 20
SMALLEST_CHUNK = 256 << 10
CHUNK_UNIT = 64 << 10
"""A multiple of every logical block size."""
MOST_THREADS = 32
CHECKSUM_THREADS = 8
"""One makes 6 to 13 GB/s of them."""

Pread = Callable[[int, Sequence[memoryview], int], int]


class _Chunk(NamedTuple):
    extent: Extent
    start: int
    nbytes: int


def _chunks(extents: Sequence[Extent], chunk_bytes: int) -> Iterator[_Chunk]:
    """The extents in pieces; those of several targets in turn, so that every drive is at work."""
    by_target: dict[int, list[_Chunk]] = {}
    for extent in extents:
        pieces = range(0, extent.nbytes, chunk_bytes)
        by_target.setdefault(extent.target, []).extend(
            _Chunk(extent, start, min(chunk_bytes, extent.nbytes - start)) for start in pieces
        )
    for row in zip_longest(*by_target.values()):
        yield from (chunk for chunk in row if chunk is not None)


class PackedStore:
    """Reads a packed store's groups; a ``GroupSource``.

    A chunk is at most 4 MiB, and as many are in flight as make ``staging_bytes`` (at least one, of 256 KiB). Groups are
    read in the order asked, the next one's chunks beginning while the last of this one's are under way; checksums are
    made by threads of their own, meanwhile.

    Args:
        staging_bytes: SSD bytes in flight.
        verify: check a group's checksum the first time it is read, or always.
        pread: reads groups as ``os.preadv`` does; a test's fake drive.

    Raises:
        UnusableInput: if a target cannot be opened.
        StoreError: if a target does not bear the manifest's store, or not all of it.
    """

    def __init__(
        self,
        description: StoreDescription,
        *,
        staging_bytes: int,
        verify: Literal["first", "always"] = "first",
        pread: Pread = os.preadv,
    ) -> None:
        self.description = description
        self.warnings: list[str] = list(description.warnings)
        self._verify, self._pread = verify, pread
        self._verified: set[GroupId | None] = set()
        wanted = max(SMALLEST_CHUNK, staging_bytes // 16)
        self.chunk_bytes = min(LARGEST_CHUNK, wanted - wanted % CHUNK_UNIT)
        self.threads = max(1, min(MOST_THREADS, staging_bytes // self.chunk_bytes))
        self._files: list[int] = []
        self._buffered: set[int] = set()
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._close_files)
            for target in description.targets:
                self._files.append(self._open(target))
            self._check_identity()
            self._checks = IOThreads(CHECKSUM_THREADS, "wsm-checksum")
            on_failure.callback(self._checks.close, _closed())
            self._reads = IOThreads(self.threads, "wsm-io")
            on_failure.pop_all()

    # -- opening

    def _open(self, target: str) -> int:
        file, buffered = open_for_reading(target)
        if buffered:
            self._buffered.add(file)
            self.warnings.append(
                f"the filesystem of {target} has no O_DIRECT: reads go through the page cache, so ssd figures are "
                "not the drive's; put the store on ext4, XFS or a partition of its own"
            )
        return file

    def _check_identity(self) -> None:
        """That these are the manifest's targets, whole; once, before anything is read."""
        targets = self.description.targets
        for number, expected in enumerate(self.description.superblocks):
            superblock.check(self._read_few(number, 0, BLOCK), expected, targets[number])
        sizes = [target_size(file) for file in self._files]
        for stored in self.description.groups.values():
            for extent in stored.extents:
                if sizes[extent.target] < extent.offset + extent.needed:
                    raise StoreError(
                        f"{targets[extent.target]} ends at byte {sizes[extent.target]}, before the end of "
                        f"{stored.name} at byte {extent.offset + extent.needed}: it was cut short, or is another "
                        f"device; {AGAIN}"
                    )

    def _read_few(self, target: int, offset: int, nbytes: int) -> bytes:
        """A few bytes from anywhere, through an aligned buffer of their own; fewer where the target ends."""
        low = offset - offset % CHUNK_UNIT
        buffer = mmap.mmap(-1, round_up(offset + nbytes, CHUNK_UNIT) - low)
        try:
            got = os.preadv(self._files[target], [buffer], low)
        except OSError as error:
            raise StoreError(
                f"{self.description.targets[target]} at byte {low}: read error: {error.strerror}; check the drive"
            ) from error
        return buffer[offset - low : min(got, offset - low + nbytes)]

    def peek(self, group: GroupId | None, slot_offset: int, nbytes: int) -> bytes:
        """``nbytes`` of a group's image from ``slot_offset`` on, all of them in one extent; unchecked.

        Raises:
            StoreError: if they cannot be read.
        """
        extents = self.description.groups[group].extents
        extent = next(e for e in extents if e.slot_offset <= slot_offset < e.slot_offset + e.nbytes)
        start = extent.offset + slot_offset - extent.slot_offset
        found = self._read_few(extent.target, start, nbytes)
        if len(found) < nbytes:
            target = self.description.targets[extent.target]
            raise StoreError(f"{target} ends at byte {start + len(found)}: it was cut short; {AGAIN}")
        return found

    # -- GroupSource

    def layout(self, group: GroupId | None) -> GroupLayout:
        return self.description.groups[group].layout

    def slot_bytes(self, kind: Kind) -> int:
        return max(g.layout.nbytes for g in self.description.groups.values() if g.group and g.group.kind == kind)

    def read(self, group: GroupId | None, buffer: Tensor) -> GroupRead:
        """Queue a group's read into ``buffer`` (CPU ``uint8``, contiguous, 4096-aligned, at least the image's bytes).

        Callbacks of its futures run on a thread of the store, or on that of :meth:`close`.

        Raises:
            ValueError: for a buffer that is too small or misaligned.
            RuntimeError: if the store is closed.
        """
        stored = self.description.groups[group]
        nbytes = stored.layout.nbytes
        if buffer.nbytes < nbytes or buffer.data_ptr() % BLOCK:
            raise ValueError(f"{stored.name} needs {nbytes} bytes, {BLOCK}-aligned, not {buffer.nbytes}")
        image, came = memoryview(buffer.numpy().data)[:nbytes], list[ChunkRead]()
        chunks = _chunks(stored.extents, self.chunk_bytes)
        arrived = self._reads.submit(partial(self._read, stored, image, chunk, came) for chunk in chunks)
        if not self._has_to_check(stored):
            return GroupRead(arrived, arrived, came)
        return GroupRead(arrived, self._checks.submit([partial(self._check, stored, image)], after=arrived), came)

    def close(self) -> None:
        """Join every thread; reads that were not done end with a StoreError. A second call does nothing."""
        self._reads.close(_closed())  # first, since they ask for checks
        self._checks.close(_closed())
        self._close_files()

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.pop())

    # -- the I/O threads

    def _read(self, stored: StoredGroup, image: memoryview, chunk: _Chunk, came: list[ChunkRead]) -> None:
        """Read on after a short read; only the end of a target may keep the last block from being whole."""
        began = time.perf_counter()
        extent, file = chunk.extent, self._files[chunk.extent.target]
        place, offset = extent.slot_offset + chunk.start, extent.offset + chunk.start
        done, tried = 0, False
        while done < chunk.nbytes:
            try:
                got = self._pread(file, [image[place + done : place + chunk.nbytes]], offset + done)
            except OSError as error:
                raise self._error(stored, extent, offset + done, f"read error: {error.strerror}") from error
            if got > 0 and chunk.start + done + got >= extent.needed:
                break
            whole = got - got % BLOCK
            if got <= 0 or (whole == 0 and tried):
                raise self._error(stored, extent, offset + done, "the store ends here (short read): it was cut short")
            # Part of a block is read again from its beginning, as O_DIRECT asks; once, for it may be the target's end.
            done, tried = done + whole, whole == 0
        if file in self._buffered:
            os.posix_fadvise(file, offset, chunk.nbytes, os.POSIX_FADV_DONTNEED)
        came.append(ChunkRead(chunk.nbytes, began, time.perf_counter()))

    def _error(self, stored: StoredGroup, extent: Extent, offset: int, what: str) -> StoreError:
        target = self.description.targets[extent.target]
        return StoreError(f"{target} at byte {offset}, in {stored.name}: {what}; check the drive, or {AGAIN}")

    def _has_to_check(self, stored: StoredGroup) -> bool:
        return stored.checksum is not None and (self._verify == "always" or stored.group not in self._verified)

    def _check(self, stored: StoredGroup, image: memoryview) -> None:
        if xxhash.xxh3_128_hexdigest(image) != stored.checksum:
            where = ", ".join(f"{self.description.targets[e.target]} at byte {e.offset}" for e in stored.extents)
            raise StoreError(
                f"{stored.name} ({where}) does not match its checksum: the store was damaged or overwritten; {AGAIN}"
            )
        self._verified.add(stored.group)


def _closed() -> StoreError:
    return StoreError("the packed store was closed before the read was done")
