"""What stands in for checksums in a version 1 store: the first bytes of its tensors, against the checkpoint's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from llama.checkpoint import Checkpoint
from llama.checkpoint.names import full_name
from wsm.errors import StoreError
from wsm.groups import TensorLayout
from wsm.manifest import StoreDescription, StoredGroup
from wsm.superblock import AGAIN

HEAD_BYTES = 4096

Read = Callable[[int, int, int], bytes]
"""(target, offset, nbytes) -> bytes; fewer of them where the target ends."""


@runtime_checkable
class HeadReader(Protocol):
    """A checkpoint that can read the beginning of a tensor without the rest."""

    def read_head(self, name: str, out: Tensor) -> None:
        """Fill ``out`` (1-D, any float dtype) with the tensor's first values, row by row."""


def check_first_bytes(description: StoreDescription, reference: Checkpoint, read: Read) -> None:
    """Compare the first 4096 bytes of every tensor (or all of a smaller one) with ``reference``, in the store's dtype.

    Raises:
        StoreError: naming the first tensor that differs.
    """
    for group, stored in description.groups.items():
        for tensor in stored.layout.tensors:
            target, offset = _place(stored, tensor)
            nbytes = min(HEAD_BYTES, tensor.nbytes)
            name = full_name(group, tensor.name)
            if read(target, offset, nbytes) != _head(reference, name, tensor, nbytes):
                raise StoreError(
                    f"{description.targets[target]} at byte {offset}: {name} is not what {reference.config.name} has: "
                    f"this is another store, it was overwritten, or the checkpoint is another; name the right ones, "
                    f"or {AGAIN}"
                )


def _place(stored: StoredGroup, tensor: TensorLayout) -> tuple[int, int]:
    for extent in stored.extents:
        if extent.slot_offset <= tensor.offset < extent.slot_offset + extent.nbytes:
            return extent.target, extent.offset + tensor.offset - extent.slot_offset
    raise StoreError(f"{stored.name}: {tensor.name} lies in none of the extents")


def _head(reference: Checkpoint, name: str, tensor: TensorLayout, nbytes: int) -> bytes:
    count = nbytes // tensor.dtype.itemsize
    if isinstance(reference, HeadReader):
        head = torch.empty(count, dtype=tensor.dtype)
        reference.read_head(name, head)
    else:
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        reference.read_into(name, whole)
        head = whole.view(-1)[:count]
    return head.view(torch.uint8).numpy().tobytes()
