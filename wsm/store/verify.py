"""Reading a whole packed store back."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import Future

import torch

from wsm.errors import StoreError
from wsm.store.packed_store import PackedStore


def verify(store: PackedStore, *, progress: Callable[[int], None] = lambda nbytes: None) -> list[str]:
    """A sentence for every group that cannot be read or is not what was packed; none if the store is sound.

    Args:
        store: open, with a description of version 2 (version 1 has no checksums: reading is then all that is checked).
        progress: called with the bytes of each group read.
    """
    groups = list(store.description.groups.items())
    largest = max(stored.layout.nbytes for _, stored in groups)
    # Two, so that the drive goes on while a checksum is made.
    buffers = [torch.frombuffer(mmap.mmap(-1, largest), dtype=torch.uint8) for _ in range(2)]
    reads: list[Future[None]] = []
    bad = []
    for number in range(len(groups) + 1):
        if number < len(groups):
            reads.append(store.read(groups[number][0], buffers[number % 2]).checked)
        if number > 0:
            failure = reads[number - 1].exception()
            if isinstance(failure, StoreError):
                bad.append(str(failure))
            elif failure is not None:
                raise failure
            progress(groups[number - 1][1].layout.nbytes)
    return bad
