"""Where a group's bytes come from: a packed store, or a checkpoint read tensor by tensor."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from wsm.disk.io_threads import IOThreads
from wsm.errors import StoreError
from wsm.layout.groups import KINDS, GroupId, GroupLayout, Kind, image_layout, views
from wsm.layout.model import TensorSource


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

    Used by ``stream`` and ``preload`` without a packed store, so nothing here counts as read from the SSD.
    """

    def __init__(self, checkpoint: TensorSource, dtype: torch.dtype, *, threads: int) -> None:
        self.warnings: list[str] = []
        self._checkpoint = checkpoint
        self._layouts: dict[Kind | None, GroupLayout] = {
            kind: image_layout(checkpoint.config.specs(kind), dtype) for kind in (None, *KINDS)
        }
        self._threads = IOThreads(threads, "wsm-load")

    def layout(self, group: GroupId | None) -> GroupLayout:
        return self._layouts[group.kind if group is not None else None]

    def slot_bytes(self, kind: Kind) -> int:
        return self._layouts[kind].nbytes

    def read(self, group: GroupId | None, buffer: Tensor) -> GroupRead:
        read_into, name_of = self._checkpoint.read_into, self._checkpoint.config.full_name
        tensors = views(buffer, self.layout(group))
        done = self._threads.submit(partial(read_into, name_of(group, name), out) for name, out in tensors.items())
        return GroupRead(done, done, [])

    def close(self) -> None:
        self._threads.close(StoreError("the checkpoint was closed before the read was done"))
