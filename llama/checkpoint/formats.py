"""In which weight formats a run's matrices lie: a checkpoint's own, a store's, or the one that is asked for."""

from __future__ import annotations

import torch

from llama.checkpoint.base import Checkpoint
from wsm.errors import UnusableInput
from wsm.formats import registry
from wsm.formats.gguf_blocks import NOT_ENCODED
from wsm.formats.mix import Formats, Mix
from wsm.store.cuts import check_cuts
from wsm.store.description import StoreDescription


def native_formats(checkpoint: Checkpoint, asked: str) -> Mix | None:
    """The formats that a checkpoint brings; UnusableInput where another one is asked for."""
    native = checkpoint.formats
    if native is not None and asked not in ("auto", native.name):
        raise UnusableInput(
            f"--weight-format {asked}: {checkpoint.config.name} is quantised already, in {native.name}, and runs as it "
            "is: leave the flag out (--dtype says what is computed in), or take the unquantised checkpoint"
        )
    return native


def formats_of(description: StoreDescription) -> Formats | None:
    """How the matrices of a store lie there, without the checkpoint's word."""
    if description.weight_format is None:
        return None
    if not description.native:
        return registry.get(description.weight_format)
    full_name = description.config.full_name
    tensors = ((full_name(group, t.name), t) for group, s in description.groups.items() for t in s.layout.encoded)
    return Mix({name: tensor.format for name, tensor in tensors if tensor.format is not None})


def check_format(checkpoint: Checkpoint, weight_format: Formats, dtype: torch.dtype, ranks: int) -> None:
    """UnusableInput for GGUF's blocks where weights would be put into them, or where ranks' shares do not fill them."""
    if weight_format.name in registry.BLOCK_TYPES and checkpoint.directory is not None and checkpoint.formats is None:
        raise UnusableInput(f"--weight-format {weight_format.name}: {NOT_ENCODED.format(weight_format.name)}")
    check_cuts(checkpoint.config, dtype, ranks, weight_format)
