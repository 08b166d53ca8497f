"""Is this the right store? For version 1, which has no superblock, the checkpoint beside it is the witness."""

from __future__ import annotations

import torch

from llama.checkpoint import Checkpoint
from llama.checkpoint.names import full_name
from wsm.errors import StoreError
from wsm.store import PackedStore

HEAD_BYTES = 4096


def compare_heads(store: PackedStore, checkpoint: Checkpoint) -> None:
    """Compare the first 4 KiB of each tensor (at most its first row) of a version 1 store with the checkpoint.

    Without weights in the checkpoint, a warning is left in ``store.warnings``. Version 2 has its superblock.

    Raises:
        StoreError: naming the first tensor that differs.
    """
    if store.description.version != 1:
        return
    for group, stored in store.description.groups.items():
        for tensor in stored.layout.tensors:
            name = full_name(group, tensor.name)
            row = checkpoint.first_row(name)
            if row is None:
                store.warnings.append(
                    "a version 1 manifest has no checksums and the checkpoint has no weights to compare with: "
                    "whether the device bears this model could not be checked; pack again to have it checked"
                )
                return
            head = row.to(tensor.dtype)[: HEAD_BYTES // tensor.dtype.itemsize].contiguous()
            found = store.peek(group, tensor.offset, head.nbytes)
            if found != head.view(torch.uint8).numpy().tobytes():
                target = store.description.targets[0]
                raise StoreError(
                    f"{target} does not hold the checkpoint's {name}: it is another device, or was overwritten"
                )
