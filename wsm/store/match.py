"""Is a store the one that a run needs: this model, this number of ranks, this dtype, these very weights?"""

from __future__ import annotations

from typing import NamedTuple

import torch

from wsm.errors import StoreError, UnusableInput
from wsm.layout.model import ModelShape, TensorSource
from wsm.store.description import DTYPE_FORMATS, DTYPE_NAMES, PLAIN, StoreDescription
from wsm.store.packed_store import PackedStore

HEAD_BYTES = 4096


class Asked(NamedTuple):
    """What a run asks of a store; a ``dtype`` of None is any, ``plain`` is no weight format at all, ``auto`` any.

    ``brought``: the formats of a checkpoint that is quantised already, ``plain`` of one that is not, None of one whose
    weights are not there.
    """

    config: ModelShape
    dtype: torch.dtype | None
    ranks: int
    weight_format: str = "auto"
    brought: str | None = None


def check_suits(description: StoreDescription, asked: Asked, model_flags: str) -> None:
    """Raises UnusableInput for a store of another model, ranks, dtype or weight format than asked.

    ``config`` is the whole model's; ``model_flags`` are the user's, for the `pack` command.
    """
    config, dtype, ranks, weight_format, brought = asked
    found = description.config.to_json()
    for part, wanted in config.to_json().items():
        stored = found.get(part)
        if stored != wanted and part != "name":
            raise UnusableInput(
                f"--manifest {description.path} holds {description.config.name} ({part} {stored}), "
                f"the model is {config.name} ({part} {wanted}): give the checkpoint that was packed"
            )
    packed_for = description.shard.size
    pack = " ".join(filter(None, ["bench_infer.py pack", model_flags]))
    if packed_for != ranks:
        raise UnusableInput(
            f"the store of {description.path} is packed for {packed_for} rank{'s' * (packed_for > 1)}, this run has "
            f"{ranks}; pack another: {pack} --tp {ranks} --to TARGET --manifest FILE, or start it with torchrun "
            f"--nproc-per-node {packed_for}"
        )
    if dtype is not None and dtype != description.dtype:
        raise UnusableInput(
            f"the store of {description.path} holds {DTYPE_NAMES[description.dtype]}; pack another: "
            f"{pack} --dtype {DTYPE_NAMES[dtype]} --to TARGET --manifest FILE"
        )
    held = description.weight_format or PLAIN
    if brought not in (None, held if description.native else PLAIN):
        made = f"a checkpoint that is quantised in {held}" if description.native else "an unquantised checkpoint"
        this = "not quantised" if brought == PLAIN else f"quantised in {brought}"
        raise UnusableInput(
            f"the store of {description.path} was made of {made}, and this one is {this}: give the checkpoint that was "
            f"packed, or pack this one: {pack} --to TARGET --manifest FILE"
        )
    if weight_format not in ("auto", held):
        flag = DTYPE_FORMATS[description.dtype] if weight_format == PLAIN else weight_format
        raise UnusableInput(
            f"the store of {description.path} holds the weights in "
            f"{DTYPE_FORMATS[description.dtype] if held == PLAIN else held}; pack another: "
            f"{pack} --weight-format {flag} --to TARGET --manifest FILE"
        )


def compare_heads(store: PackedStore, checkpoint: TensorSource) -> None:
    """Raises StoreError for a tensor whose first 4 KiB (at most a row) are not the checkpoint's, or a changed file.

    Without weights in the checkpoint, version 2 relies on its superblock and checksums; for version 1, which has
    neither, a warning is left in ``store.warnings``.
    """
    packed = {source.name: source for source in store.description.sources}
    for source in checkpoint.sources():
        if source.name in packed and packed[source.name] != source:
            raise StoreError(
                f"{source.name} of the checkpoint is not the file that {store.description.path} was packed from: "
                "give the checkpoint that was packed, or pack this one"
            )
    if not checkpoint.has_weights:
        if store.description.version == 1:
            store.warnings.append(
                "a version 1 manifest has no checksums and the checkpoint has no weights to compare with: "
                "whether the device bears this model could not be checked; pack again to have it checked"
            )
        return
    for group, stored in store.description.groups.items():
        for tensor in stored.layout.tensors:
            if tensor.format is not None:  # what was made of it may have been weighted; each group's norm tells, too
                continue
            name = checkpoint.config.full_name(group, tensor.name)
            head = checkpoint.first_row(name, tensor.dtype)[: HEAD_BYTES // tensor.dtype.itemsize]
            found = store.peek(group, tensor.offset, head.nbytes)
            if found != head.view(torch.uint8).numpy().tobytes():
                target = store.description.targets[0]
                raise StoreError(
                    f"{target} does not hold the checkpoint's {name}: it is another device, or the store of another "
                    "checkpoint; give the one that was packed, or pack this one"
                )
