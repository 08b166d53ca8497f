"""Is this the store of this checkpoint? The first row of every tensor is the witness."""

from __future__ import annotations

import torch

from wsm.errors import StoreError
from wsm.layout.model import TensorSource
from wsm.store.packed_store import PackedStore

HEAD_BYTES = 4096


def compare_heads(store: PackedStore, checkpoint: TensorSource) -> None:
    """Compare the first 4 KiB of each tensor (at most its first row) of a store with the checkpoint beside it.

    Without weights in the checkpoint, version 2 relies on its superblock and checksums; for version 1, which has
    neither, a warning is left in ``store.warnings``.

    Raises:
        StoreError: naming the first tensor that differs, or the file that has changed since it was packed.
    """
    _compare_sources(store, checkpoint)
    for group, stored in store.description.groups.items():
        for tensor in stored.layout.tensors:
            name = checkpoint.config.full_name(group, tensor.name)
            row = checkpoint.first_row(name)
            if row is None and store.description.version != 1:
                return
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
                    f"{target} does not hold the checkpoint's {name}: it is another device, or the store of another "
                    "checkpoint; give the one that was packed, or pack this one"
                )


def _compare_sources(store: PackedStore, checkpoint: TensorSource) -> None:
    """Files of the names that were packed must be the ones that were packed."""
    packed = {source.name: source for source in store.description.sources}
    for source in checkpoint.sources():
        if source.name in packed and packed[source.name] != source:
            raise StoreError(
                f"{source.name} of the checkpoint is not the file that {store.description.path} was packed from: "
                "give the checkpoint that was packed, or pack this one"
            )
