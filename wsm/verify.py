"""Reading a whole packed store back."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import torch

from wsm.errors import StoreError
from wsm.store import PackedStore


def verify(store: PackedStore, *, progress: Callable[[int], None] = lambda nbytes: None) -> list[str]:
    """A sentence for every group that cannot be read or is not what was packed; none if the store is sound.

    Args:
        store: open, with a description of version 2 (version 1 has no checksums: reading is then all that is checked).
        progress: called with the bytes of each group read.
    """
    largest = max(group.layout.nbytes for group in store.description.groups.values())
    buffer = torch.frombuffer(mmap.mmap(-1, largest), dtype=torch.uint8)
    bad = []
    for group, stored in store.description.groups.items():
        try:
            store.read_blocking(group, buffer[: stored.layout.nbytes])
        except StoreError as error:
            bad.append(str(error))
        progress(stored.layout.nbytes)
    return bad
