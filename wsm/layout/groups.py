"""Groups of a pass, and the image of each: where each tensor is in it, on the SSD, in a CPU and in a GPU slot alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple, Union

from wsm.formats.format import PLANE_ALIGNMENT, Plane

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 4096
"""Extents and slots are aligned to this: what O_DIRECT asks for on every common drive."""
TENSOR_ALIGNMENT = PLANE_ALIGNMENT
"""512, as torch's own CUDA allocations: every mode runs the same kernels."""

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
class PlaneLayout:
    """A plane inside an image: ``offset`` and ``nbytes`` in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """A tensor inside an image: ``offset`` and ``nbytes`` in bytes.

    With a weight ``format`` it lies there as the format's ``planes``, from the start of the first to the end of the
    last; ``dtype`` and ``shape`` are those of the decoded tensor.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    format: str | None = None
    planes: tuple[PlaneLayout, ...] = ()

    @property
    def decoded_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """An image: ``nbytes`` in all (a multiple of 4096) and its tensors."""

    nbytes: int
    tensors: tuple[TensorLayout, ...]

    @property
    def encoded(self) -> tuple[TensorLayout, ...]:
        """The tensors that lie there in a weight format."""
        return tuple(tensor for tensor in self.tensors if tensor.format is not None)

    @property
    def encoded_bytes(self) -> int:
        """Bytes of these once they are decoded."""
        return sum(tensor.decoded_bytes for tensor in self.encoded)


def gaps(layout: GroupLayout) -> Iterator[slice]:
    """The bytes of an image that belong to no tensor, its end included."""
    end = 0
    parts = [part for tensor in layout.tensors for part in tensor.planes or (tensor,)]
    for part in sorted(parts, key=attrgetter("offset")):
        if part.offset > end:
            yield slice(end, part.offset)
        end = part.offset + part.nbytes
    if end < layout.nbytes:
        yield slice(end, layout.nbytes)


def is_encoded(spec: TensorSpec) -> bool:
    """Whether a tensor of a group may lie there in a weight format: matrices do, norms stay as they are."""
    return len(spec.shape) == 2


class InFormat(NamedTuple):
    """How a matrix lies at rest: the weight format's name, and its planes."""

    format: str
    planes: tuple[Plane, ...]


def image_layout(
    specs: Sequence[TensorSpec], dtype: torch.dtype, encoded: Mapping[str, InFormat] = MappingProxyType({})
) -> GroupLayout:
    """The tensors one after the other, each aligned to 512 bytes, the whole padded to 4096.

    ``encoded`` names those that lie there in a weight format; each of their planes is aligned like a tensor.
    """
    tensors, offset = [], 0
    for spec in specs:
        how = encoded.get(spec.name)
        if how is None:
            nbytes = math.prod(spec.shape) * dtype.itemsize
            tensors.append(TensorLayout(spec.name, dtype, spec.shape, offset, nbytes))
        else:
            planes = _plane_layouts(how.planes, offset)
            nbytes = planes[-1].offset + planes[-1].nbytes - offset
            tensors.append(TensorLayout(spec.name, dtype, spec.shape, offset, nbytes, how.format, planes))
        offset = round_up(offset + nbytes, TENSOR_ALIGNMENT)
    return GroupLayout(round_up(offset, BLOCK), tuple(tensors))


def _plane_layouts(planes: Sequence[Plane], offset: int) -> tuple[PlaneLayout, ...]:
    placed = []
    for plane in planes:
        nbytes = math.prod(plane.shape) * plane.dtype.itemsize
        placed.append(PlaneLayout(*plane, offset, nbytes))
        offset = round_up(offset + nbytes, TENSOR_ALIGNMENT)
    return tuple(placed)


def decoded_layout(layout: GroupLayout) -> GroupLayout:
    """The image of the same tensors when none is in a weight format."""
    specs = [TensorSpec(tensor.name, tensor.shape) for tensor in layout.tensors]
    return image_layout(specs, layout.tensors[0].dtype)


def largest_images(layouts: Mapping[GroupId | None, GroupLayout]) -> dict[Kind, int]:
    """Bytes of the largest image of each kind: of a slot."""
    largest = dict.fromkeys(KINDS, 0)
    for group, layout in layouts.items():
        if group is not None:
            largest[group.kind] = max(largest[group.kind], layout.nbytes)
    return largest


def alike_as_one(layouts: Mapping[GroupId | None, GroupLayout]) -> dict[GroupId | None, GroupLayout]:
    """The same images, equal ones as one object: a plan asks each but once."""
    known: dict[GroupLayout, GroupLayout] = {}
    return {group: known.setdefault(layout, layout) for group, layout in layouts.items()}


def counted(layouts: Mapping[GroupId | None, GroupLayout]) -> list[tuple[GroupLayout, int]]:
    """Each image of the layers' groups, and of how many it is."""
    number = Counter(id(layout) for group, layout in layouts.items() if group is not None)
    return [(layout, number.pop(id(layout))) for layout in layouts.values() if id(layout) in number]


def without(layout: GroupLayout, name: str) -> GroupLayout:
    """The image of all tensors but one."""
    kept = [tensor for tensor in layout.tensors if tensor.name != name]
    return image_layout([TensorSpec(tensor.name, tensor.shape) for tensor in kept], kept[0].dtype)


def bytes_apart(layout: GroupLayout, names: Sequence[str]) -> int:
    """Bytes of the named tensors where they are not one right behind the other, in this order; else 0.

    Encoded ones are put together as they are decoded, wherever they are.
    """
    parts = [tensor for name in names for tensor in layout.tensors if tensor.name == name]
    if any(part.format is not None for part in parts):
        return 0
    ends = [part.offset + part.nbytes for part in parts]
    adjacent = all(end == part.offset for end, part in zip(ends, parts[1:], strict=False))
    return 0 if adjacent else sum(part.nbytes for part in parts)


class Encoded(NamedTuple):
    """A matrix of ``shape`` at rest in a weight format: its planes by name."""

    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    planes: dict[str, Tensor]

    @property
    def decoded_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Stored = Union["Tensor", Encoded]
"""A tensor as it lies in an image."""


def views(image: Tensor, layout: GroupLayout) -> dict[str, Tensor]:
    """Typed views of the plain tensors in ``image`` (``uint8 [>= layout.nbytes]``), by short name; no copy."""
    return {tensor.name: _view(image, tensor) for tensor in layout.tensors if tensor.format is None}


def stored_views(image: Tensor, layout: GroupLayout) -> dict[str, Stored]:
    """As :func:`views`, and the planes of those in a weight format."""
    tensors = layout.tensors
    return {t.name: _view(image, t) if t.format is None else planes_in(image, t) for t in tensors}


def planes_in(image: Tensor, tensor: TensorLayout) -> Encoded:
    """Typed views of an encoded tensor's planes in ``image``."""
    assert tensor.format is not None
    return Encoded(tensor.format, tensor.shape, tensor.dtype, {p.name: _view(image, p) for p in tensor.planes})


def _view(image: Tensor, part: TensorLayout | PlaneLayout) -> Tensor:
    return image[part.offset : part.offset + part.nbytes].view(part.dtype).view(part.shape)
