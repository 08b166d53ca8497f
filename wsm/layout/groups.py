"""Groups of a pass, and the image of each: where each tensor is in it, on the SSD, in a CPU and in a GPU slot alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 4096
"""Extents and slots are aligned to this: what O_DIRECT asks for on every common drive."""
TENSOR_ALIGNMENT = 512
"""As torch's own CUDA allocations: every mode runs the same kernels."""

Kind = Literal["attn", "ffn"]
KINDS: tuple[Kind, ...] = ("attn", "ffn")


class GroupId(NamedTuple):
    """The attn or the ffn weights of one layer, norm included: what is stored, moved and evicted as one."""

    layer: int
    kind: Kind

    def __str__(self) -> str:
        return f"L{self.layer}.{self.kind}"


def pass_order(n_layers: int) -> list[GroupId]:
    """The order in which a pass uses the groups: attn 0, ffn 0, attn 1, …"""
    return [GroupId(layer, kind) for layer in range(n_layers) for kind in KINDS]


class TensorSpec(NamedTuple):
    """A tensor's short name inside its group, and its shape."""

    name: str
    shape: tuple[int, ...]


def round_up(nbytes: int, unit: int) -> int:
    """``nbytes`` rounded up to a multiple of ``unit``."""
    return -(-nbytes // unit) * unit


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """A tensor inside an image: ``offset`` and ``nbytes`` in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """An image: ``nbytes`` in all (a multiple of 4096) and its tensors."""

    nbytes: int
    tensors: tuple[TensorLayout, ...]


def image_layout(specs: Sequence[TensorSpec], dtype: torch.dtype) -> GroupLayout:
    """The tensors one after the other, each aligned to 512 bytes, the whole padded to 4096."""
    tensors, offset = [], 0
    for spec in specs:
        nbytes = math.prod(spec.shape) * dtype.itemsize
        tensors.append(TensorLayout(spec.name, dtype, spec.shape, offset, nbytes))
        offset = round_up(offset + nbytes, TENSOR_ALIGNMENT)
    return GroupLayout(round_up(offset, BLOCK), tuple(tensors))


def without(layout: GroupLayout, name: str) -> GroupLayout:
    """The image of all tensors but one."""
    kept = [tensor for tensor in layout.tensors if tensor.name != name]
    return image_layout([TensorSpec(tensor.name, tensor.shape) for tensor in kept], kept[0].dtype)


def bytes_apart(layout: GroupLayout, names: Sequence[str]) -> int:
    """Bytes of the named tensors where they are not one right behind the other, in this order; else 0."""
    parts = [tensor for name in names for tensor in layout.tensors if tensor.name == name]
    ends = [part.offset + part.nbytes for part in parts]
    adjacent = all(end == part.offset for end, part in zip(ends, parts[1:], strict=False))
    return 0 if adjacent else sum(part.nbytes for part in parts)


def views(image: Tensor, layout: GroupLayout) -> dict[str, Tensor]:
    """Typed views of the tensors in ``image`` (``uint8 [>= layout.nbytes]``), by short name; no copy."""
    return {
        tensor.name: image[tensor.offset : tensor.offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor in layout.tensors
    }
