"""How a packed store is laid out: the block that each target begins with, and where the groups are."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from wsm.disk.targets import sealed, unsealed
from wsm.errors import StoreError
from wsm.formats.format import Plane, Shape, WeightFormat
from wsm.formats.mix import Formats, format_of
from wsm.layout.groups import (
    BLOCK,
    GroupId,
    GroupLayout,
    InFormat,
    image_layout,
    is_encoded,
    pass_order,
    round_up,
)
from wsm.layout.model import ModelShape
from wsm.store.cuts import check_cuts

VERSION, FORMATTED = 2, 3
"""Of a plain store, and of one in a weight format."""
MAGIC = b"WSMSTORE"
_MOST = "most"
"""Of the one plane that a matrix of unknown size is planned with."""
AGAIN = "re-pack with `bench_infer.py pack`"
_SUPERBLOCK = struct.Struct("<8sIII16s16s")


@dataclass(frozen=True, slots=True)
class Superblock:
    """Which store this is, and of which manifest; ``store_id`` and ``manifest_digest`` are 16 bytes, in hexadecimal."""

    store_id: str
    manifest_digest: str
    target: int
    targets: int
    version: int = VERSION

    def to_bytes(self) -> bytes:
        """4096 bytes: the fields, little-endian, sealed."""
        ids = bytes.fromhex(self.store_id), bytes.fromhex(self.manifest_digest)
        return sealed(_SUPERBLOCK.pack(MAGIC, self.version, self.target, self.targets, *ids))

    @classmethod
    def from_bytes(cls, block: bytes, where: str) -> Superblock:
        """Raises StoreError where ``block`` has none, or one that is damaged or of another version."""
        if len(block) < BLOCK or not block.startswith(MAGIC):
            raise StoreError(f"{where} bears no packed store: it was overwritten, or packing was broken off; {AGAIN}")
        if (fields := unsealed(block, _SUPERBLOCK.size)) is None:
            raise StoreError(f"{where}: the superblock of the packed store is damaged; {AGAIN}")
        _, version, target, targets, store_id, digest = _SUPERBLOCK.unpack(fields)
        if version not in (VERSION, FORMATTED):
            raise StoreError(
                f"{where} bears a packed store of version {version}, {VERSION} and {FORMATTED} are read here; {AGAIN}"
            )
        return cls(store_id.hex(), digest.hex(), target, targets, version)

    def check(self, block: bytes, where: str) -> None:
        """Raises StoreError for a target that begins with ``block`` and is not the one that the manifest calls for."""
        found = Superblock.from_bytes(block, where)
        if found.store_id != self.store_id:
            raise StoreError(
                f"{where} is another store or was overwritten: it bears {found.store_id}, the manifest names "
                f"{self.store_id}; name the right device, or {AGAIN}"
            )
        if (found.target, found.targets) != (self.target, self.targets):
            raise StoreError(
                f"{where} is part {found.target + 1} of {found.targets} of the store, not part {self.target + 1} of "
                f"{self.targets}; name the devices in the order of `pack --to`"
            )
        if found.manifest_digest != self.manifest_digest:
            raise StoreError(f"{where} was packed with another manifest than this one: use that one, or {AGAIN}")


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of a target, ready for O_DIRECT; only its first ``needed`` bytes have to exist."""

    target: int
    offset: int
    nbytes: int
    slot_offset: int
    needed: int


def stripes(nbytes: int, offset: int, targets: int) -> tuple[Extent, ...]:
    """An image cut into one contiguous part per target, each at the same ``offset``; parts are multiples of 4096."""
    part = stride_of(nbytes, targets)
    return tuple(
        Extent(target, offset, min(part, nbytes - start), start, min(part, nbytes - start))
        for target in range(targets)
        if (start := target * part) < nbytes
    )


def stride_of(nbytes: int, targets: int) -> int:
    """Bytes that an image takes on each target."""
    return round_up(-(-nbytes // targets), BLOCK)


@dataclass(frozen=True, slots=True)
class StorePlan:
    """The layout of a new store on ``targets`` devices: globals first, then pass order.

    For ``tp`` ranks each group is as many images of one size, one behind the other; ``offsets`` are rank 0's.
    ``target_bytes`` is what each target has to hold, superblock included. In a weight format whose sizes follow from
    the weights, ``layouts`` are the largest that there can be, and so are ``offsets`` and ``target_bytes``.
    """

    config: ModelShape
    dtype: torch.dtype
    targets: int
    tp: int
    offsets: Mapping[GroupId | None, int]
    layouts: Mapping[GroupId | None, GroupLayout]
    target_bytes: int
    weight_format: Formats | None = None

    @property
    def is_bound(self) -> bool:
        """Whether sizes are only known not to be larger."""
        return not all(map(is_final, self.layouts.values()))

    def extents(self, group: GroupId | None, rank: int) -> tuple[Extent, ...]:
        """Where the image of a rank's share of ``group`` is."""
        nbytes = self.layouts[group].nbytes
        return stripes(nbytes, self.offsets[group] + rank * stride_of(nbytes, self.targets), self.targets)


class WrittenGroup(NamedTuple):
    """A group in a store: rank 0's ``offset``, and for each rank the layout (of one size) and the checksum."""

    offset: int
    layouts: Sequence[GroupLayout]
    checksums: Sequence[str]


def plan_store(
    config: ModelShape, dtype: torch.dtype, targets: int, tp: int = 1, weight_format: Formats | None = None
) -> StorePlan:
    """The layout of a new store; raises UnusableInput if the model cannot be cut for ``tp`` ranks."""
    if weight_format is not None:
        check_cuts(config, dtype, tp, weight_format)
    layouts = planned_layouts(config.share(tp), dtype, weight_format, most=True)
    offsets, offset = {}, BLOCK
    for group, layout in layouts.items():
        offsets[group] = offset
        offset += tp * stride_of(layout.nbytes, targets)
    return StorePlan(config, dtype, targets, tp, offsets, layouts, offset, weight_format)


def planned_layouts(
    share: ModelShape, dtype: torch.dtype, weight_format: Formats | None, *, most: bool
) -> dict[GroupId | None, GroupLayout]:
    """All images, as far as shapes tell.

    Where sizes follow from the weights: the ``most`` that they can be, or the least, as which nearly all come out.
    """
    layouts: dict[GroupId | None, GroupLayout] = {None: image_layout(share.specs(None), dtype)}
    alike: dict[tuple[object, ...], GroupLayout] = {}
    for group in pass_order(share.n_layers):
        specs = share.specs(group.kind)
        formats = {
            spec.name: found
            for spec in filter(is_encoded, specs)
            if (found := format_of(weight_format, share.full_name(group, spec.name))) is not None
        }
        key = (group.kind, *((name, found.name) for name, found in formats.items()))
        if key not in alike:
            encoded = {
                name: InFormat(
                    formats[name].name, _planned_planes(formats[name], (shape[0], shape[1]), dtype, most=most)
                )
                for name, shape in specs
                if name in formats
            }
            alike[key] = image_layout(specs, dtype, encoded)
        layouts[group] = alike[key]
    return layouts


def is_final(layout: GroupLayout) -> bool:
    """Whether a planned image comes out just so: no size in it follows from the weights."""
    return not any(plane.name == _MOST for tensor in layout.tensors for plane in tensor.planes)


def _planned_planes(weight_format: WeightFormat, shape: Shape, dtype: torch.dtype, *, most: bool) -> tuple[Plane, ...]:
    if most and weight_format.planes(shape, dtype) is None:
        return (Plane(_MOST, torch.uint8, (weight_format.most_bytes(shape, dtype),)),)
    return weight_format.least_planes(shape, dtype)
