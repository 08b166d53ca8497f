"""Where a group's bytes come from: a packed store, or a checkpoint read tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from wsm.disk.io_threads import IOThreads
from wsm.errors import StoreError
from wsm.layout.groups import GroupId, GroupLayout, Kind, largest_images
from wsm.layout.model import TensorSource
from wsm.store.images import image_work
from wsm.store.layout import plan_store


class ChunkRead(NamedTuple):
    """A chunk that came from a drive; times in seconds of ``time.perf_counter``."""

    nbytes: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class GroupRead:
    """A read under way; ``chunks`` are what has come from a drive so far.

    ``arrived`` ends when all bytes are in the buffer; once it has, well or not, nobody writes there any more, nor are
    there more chunks. ``checked`` ends when the bytes are right as well; the same future where nothing is checked.
    """

    arrived: Future[None]
    checked: Future[None]
    chunks: list[ChunkRead]


class GroupSource(Protocol):
    """Reads whole groups into CPU memory, asynchronously and in the order asked; ``None`` stands for the globals."""

    warnings: list[str]

    def layout(self, group: GroupId | None) -> GroupLayout:
        """Where each tensor is in the group's image."""

    def slot_bytes(self, kind: Kind) -> int:
        """The largest image of a kind."""

    def read(self, group: GroupId | None, buffer: Tensor) -> GroupRead:
        """Begin to fill ``buffer`` (``uint8``, 4096-aligned) with a group's image."""

    def close(self) -> None:
        """Join every thread; reads that have not ended fail with a StoreError."""


class CheckpointSource:
    """Group images made from a checkpoint's tensors, converted to ``dtype``; a tensor is the unit of work.

    Used by ``stream`` and ``preload`` without a packed store, so nothing here counts as read from the SSD. Where
    ``layouts`` have matrices in a weight format, each is encoded as it is read.
    """

    def __init__(
        self,
        checkpoint: TensorSource,
        dtype: torch.dtype,
        *,
        threads: int,
        layouts: Mapping[GroupId | None, GroupLayout] | None = None,
    ) -> None:
        self.warnings: list[str] = []
        self._checkpoint, self._dtype = checkpoint, dtype
        self._layouts = layouts or plan_store(checkpoint.config, dtype, 1).layouts
        self._slot_bytes = largest_images(self._layouts)
        self._threads = IOThreads(threads, "wsm-load")

    def layout(self, group: GroupId | None) -> GroupLayout:
        return self._layouts[group]

    def slot_bytes(self, kind: Kind) -> int:
        return self._slot_bytes[kind]

    def read(self, group: GroupId | None, buffer: Tensor) -> GroupRead:
        done = self._threads.submit(image_work(self._checkpoint, group, self.layout(group), buffer))
        return GroupRead(done, done, [])

    def close(self) -> None:
        self._threads.close(StoreError("the checkpoint was closed before the read was done"))
