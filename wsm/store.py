"""The SSD tier: O_DIRECT reads by several threads, straight into the slots."""

from __future__ import annotations

import errno
import grp
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import xxhash
from torch import Tensor

from llama.checkpoint.names import GroupId, Kind
from llama.config import UnusableInput
from wsm import superblock
from wsm.errors import StoreError
from wsm.groups import BLOCK, GroupLayout, round_up
from wsm.manifest import Extent, StoreDescription, StoredGroup
from wsm.source import ChunkRead, Done

LARGEST_CHUNK = 4 << 20
SMALLEST_CHUNK = 256 << 10
MOST_THREADS = 32

Pread = Callable[[int, Sequence[memoryview], int], int]


class _Request:
    """One group's read: the chunks not dealt out yet, and how many have not come in."""

    def __init__(self, group: StoredGroup, image: memoryview, done: Done, chunk_bytes: int) -> None:
        self.group, self.image, self.done = group, image, done
        self.chunks = deque(
            (extent, start, min(chunk_bytes, extent.nbytes - start))
            for extent in group.extents
            for start in range(0, extent.nbytes, chunk_bytes)
        )
        self.left = len(self.chunks)


class PackedStore:
    """Reads a packed store's groups; a ``GroupSource``.

    A chunk is at most 4 MiB, and as many are in flight as make ``staging_bytes``. Requests are served in the order
    asked, the next one's chunks beginning while the last of this one's are under way.

    Args:
        staging_bytes: SSD bytes in flight.
        verify: check a group's checksum the first time it is read, or always.
        pread: reads like ``os.preadv``; a test's fake drive.

    Raises:
        UnusableInput: if a target cannot be opened.
        StoreError: if a target does not bear the manifest's store.
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
        self.on_read: ChunkRead | None = None
        self.warnings: list[str] = list(description.warnings)
        self._verify, self._pread = verify, pread
        self._verified: set[GroupId | None] = set()
        wanted = max(SMALLEST_CHUNK, staging_bytes // 16)
        self.chunk_bytes = min(LARGEST_CHUNK, wanted - wanted % BLOCK)
        self.threads = max(1, min(MOST_THREADS, staging_bytes // self.chunk_bytes))
        self._requests: deque[_Request] = deque()
        self._open_requests: set[_Request] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._files: list[int] = []
        self._workers: list[threading.Thread] = []
        try:
            for target in description.targets:
                self._files.append(self._open(target))
            self._check_superblocks()
        except BaseException:
            self._close_files()
            raise
        for number in range(self.threads):
            worker = threading.Thread(target=self._serve, name=f"wsm-io-{number}", daemon=True)
            self._workers.append(worker)
            worker.start()

    def _open(self, target: str) -> int:
        try:
            return os.open(target, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno == errno.EINVAL:
                self.warnings.append(
                    f"the filesystem of {target} has no O_DIRECT: reads go through the page cache, so ssd figures are "
                    "not the drive's; put the store on ext4, XFS or a partition of its own"
                )
                return os.open(target, os.O_RDONLY)
            raise unusable_target(target, error) from error

    def _check_superblocks(self) -> None:
        for file, expected, target in zip(
            self._files, self.description.superblocks, self.description.targets, strict=False
        ):
            buffer = _aligned_block()
            got = os.preadv(file, [buffer], 0)
            superblock.check(bytes(buffer[:got]), expected, target)

    # -- GroupSource

    def layout(self, group: GroupId | None) -> GroupLayout:
        return self.description.groups[group].layout

    def slot_bytes(self, kind: Kind) -> int:
        return max(g.layout.nbytes for g in self.description.groups.values() if g.group and g.group.kind == kind)

    def read(self, group: GroupId | None, buffer: Tensor, done: Done) -> None:
        stored = self.description.groups[group]
        image = memoryview(buffer.numpy().data)[: stored.layout.nbytes]
        with self._changed:
            if self._closing:
                raise RuntimeError("the packed store is closed")
            request = _Request(stored, image, done, self.chunk_bytes)
            self._requests.append(request)
            self._open_requests.add(request)
            self._changed.notify_all()

    def read_blocking(self, group: GroupId | None, buffer: Tensor) -> None:
        """Fill ``buffer`` with a group's image and come back; raises what the read raised."""
        finished = threading.Event()
        failures: list[BaseException | None] = []

        def done(failure: BaseException | None) -> None:
            failures.append(failure)
            finished.set()

        self.read(group, buffer, done)
        finished.wait()
        if failures[0] is not None:
            raise failures[0]

    def peek(self, group: GroupId | None, slot_offset: int, nbytes: int) -> bytes:
        """``nbytes`` of a group's image from ``slot_offset`` on, all of them in one extent."""
        extent = next(
            e for e in self.description.groups[group].extents if e.slot_offset <= slot_offset < e.slot_offset + e.nbytes
        )
        start = extent.offset + slot_offset - extent.slot_offset
        first, end = start - start % BLOCK, round_up(start + nbytes, BLOCK)
        block = memoryview(mmap.mmap(-1, end - first))
        try:
            got = self._pread(self._files[extent.target], [block], first)
        except OSError as error:
            raise StoreError(f"{self.description.targets[extent.target]} at byte {first}: {error.strerror}") from error
        if got < start + nbytes - first:
            raise StoreError(
                f"{self.description.targets[extent.target]} ends at byte {first + got}: it was cut short; pack again"
            )
        return bytes(block[start - first : start - first + nbytes])

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._requests.clear()
            left = list(self._open_requests)
            self._open_requests.clear()
            self._changed.notify_all()
        for worker in self._workers:
            worker.join()
        for request in left:
            request.done(RuntimeError("the packed store was closed before the read was done"))
        self._close_files()

    def _close_files(self) -> None:
        for file in self._files:
            os.close(file)
        self._files.clear()

    # -- the I/O threads

    def _next_chunk(self) -> tuple[_Request, Extent, int, int] | None:
        with self._changed:
            while not self._closing:
                while self._requests and not self._requests[0].chunks:
                    self._requests.popleft()
                if self._requests:
                    return (self._requests[0], *self._requests[0].chunks.popleft())
                self._changed.wait()
        return None

    def _serve(self) -> None:
        while (work := self._next_chunk()) is not None:
            request, extent, start, nbytes = work
            failure: BaseException | None = None
            began = time.perf_counter()
            try:
                self._read_chunk(request, extent, start, nbytes)
            except BaseException as error:
                failure = error
            if self.on_read is not None and failure is None:
                self.on_read(request.group.group, nbytes, began, time.perf_counter())
            self._finish_chunk(request, failure)

    def _read_chunk(self, request: _Request, extent: Extent, start: int, nbytes: int) -> None:
        done = 0
        place = extent.slot_offset + start
        while done < nbytes:
            try:
                got = self._pread(
                    self._files[extent.target],
                    [request.image[place + done : place + nbytes]],
                    extent.offset + start + done,
                )
            except OSError as error:
                raise self._error(request, extent, start + done, f"read error: {error.strerror}") from error
            done += got
            if got == 0 or done % BLOCK:
                # Only the end of a target is met in the middle of a block.
                if start + done >= extent.needed:
                    return
                raise self._error(request, extent, start + done, "the store ends here (short read): it was cut short")

    def _error(self, request: _Request, extent: Extent, start: int, what: str) -> Exception:
        target = self.description.targets[extent.target]
        return StoreError(
            f"{target} at byte {extent.offset + start}, in {request.group.name}: {what}; check the drive, or pack again"
        )

    def _finish_chunk(self, request: _Request, failure: BaseException | None) -> None:
        """Tell the asker once: at the first failure, or when the last chunk is in and the checksum is right."""
        with self._changed:
            request.left -= 1
            over = failure is not None or request.left == 0
            if not over or request not in self._open_requests:
                return
            self._open_requests.discard(request)
            request.chunks.clear()
        request.done(failure if failure is not None else self._checksum_failure(request))

    def _checksum_failure(self, request: _Request) -> BaseException | None:
        stored = request.group
        if stored.checksum is None or (self._verify == "first" and stored.group in self._verified):
            return None
        if xxhash.xxh3_128_hexdigest(request.image) == stored.checksum:
            self._verified.add(stored.group)
            return None
        where = ", ".join(f"{self.description.targets[e.target]} at byte {e.offset}" for e in stored.extents)
        return StoreError(
            f"{stored.name} ({where}) does not match its checksum: the store was damaged or overwritten; pack again"
        )


def _aligned_block() -> memoryview:
    return memoryview(mmap.mmap(-1, BLOCK))


def unusable_target(target: str, error: OSError) -> UnusableInput:
    """The sentence for a target that cannot be opened; for a refused device it names the group that has it."""
    if error.errno in (errno.EACCES, errno.EPERM):
        try:
            group = grp.getgrgid(os.stat(target).st_gid).gr_name
        except (OSError, KeyError):
            group = "its"
        return UnusableInput(
            f"no permission on {target}: it belongs to group {group}; "
            f"run `sudo usermod -aG {group} $USER` and log in again"
        )
    return UnusableInput(f"{target} cannot be opened: {error.strerror}")
