"""Where a group's bytes come from: a packed store, or a checkpoint read tensor by tensor."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from wsm.disk.io_threads import Done
from wsm.layout.groups import KINDS, GroupId, GroupLayout, Kind, image_layout, views
from wsm.layout.model import TensorSource

Arrived = Callable[[], None]
ChunkRead = Callable[[GroupId | None, int, float, float], None]


class GroupSource(Protocol):
    """Reads whole groups into CPU memory, asynchronously and in the order asked; ``None`` stands for the globals."""

    on_read: ChunkRead | None
    warnings: list[str]

    def layout(self, group: GroupId | None) -> GroupLayout:
        """Where each tensor lies in the group's image."""

    def slot_bytes(self, kind: Kind) -> int:
        """The largest image of a kind."""

    def read(self, group: GroupId | None, buffer: Tensor, done: Done, arrived: Arrived = lambda: None) -> None:
        """Fill ``buffer`` (``uint8``, 4096-aligned), then call ``done(None)`` or ``done(error)`` on some thread.

        ``arrived()`` is called before a ``done(None)``, when all bytes are in the buffer but not checked yet. Neither
        may raise.
        """

    def close(self) -> None:
        """Join every thread."""


def read_blocking(source: GroupSource, group: GroupId | None, buffer: Tensor) -> None:
    """Fill ``buffer`` with a group's image and come back; raises what the read raised."""
    answers: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    source.read(group, buffer, answers.put)
    failure = answers.get()
    if failure is not None:
        raise failure


class CheckpointSource:
    """Group images made from a checkpoint's tensors, converted to ``dtype``; a tensor is the unit of work.

    Used by ``stream`` and ``preload`` without a packed store, so nothing here counts as read from the SSD.
    """

    def __init__(self, checkpoint: TensorSource, dtype: torch.dtype, *, threads: int) -> None:
        self.on_read: ChunkRead | None = None
        self.warnings: list[str] = []
        self._checkpoint = checkpoint
        self._layouts: dict[Kind | None, GroupLayout] = {
            kind: image_layout(checkpoint.config.specs(kind), dtype) for kind in (None, *KINDS)
        }
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="wsm-load")
        self._lock = threading.Lock()
        self._closed = False

    def layout(self, group: GroupId | None) -> GroupLayout:
        return self._layouts[group.kind if group is not None else None]

    def slot_bytes(self, kind: Kind) -> int:
        return self._layouts[kind].nbytes

    def read(self, group: GroupId | None, buffer: Tensor, done: Done, arrived: Arrived = lambda: None) -> None:
        tensors = views(buffer, self.layout(group))
        left = len(tensors)
        first_failure: BaseException | None = None

        def fill(name: str, out: Tensor) -> None:
            nonlocal left, first_failure
            failure: BaseException | None = None
            try:
                if self._closed:
                    raise RuntimeError("the checkpoint was closed before the read was done")
                self._checkpoint.read_into(self._checkpoint.config.full_name(group, name), out)
            except BaseException as error:
                failure = error
            with self._lock:
                left -= 1
                first_failure = first_failure or failure
                last = left == 0
            if last:  # nobody writes into the buffer any more
                if first_failure is None:
                    arrived()
                done(first_failure)

        for name, out in tensors.items():
            self._threads.submit(fill, name, out)

    def close(self) -> None:
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
