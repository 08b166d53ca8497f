"""How a packed store is laid out: the block that each target begins with, and where the groups are."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from wsm.disk.targets import sealed, unsealed
from wsm.errors import StoreError
from wsm.layout.groups import BLOCK, KINDS, GroupId, GroupLayout, image_layout, pass_order, round_up
from wsm.layout.model import ModelShape

VERSION = 2
MAGIC = b"WSMSTORE"
AGAIN = "re-pack with `bench_infer.py pack`"
_SUPERBLOCK = struct.Struct("<8sIII16s16s")


@dataclass(frozen=True, slots=True)
class Superblock:
    """Which store this is, and of which manifest; ``store_id`` and ``manifest_digest`` are 16 bytes, in hexadecimal."""

    store_id: str
    manifest_digest: str
    target: int
    targets: int

    def to_bytes(self) -> bytes:
        """4096 bytes: the fields, little-endian, sealed."""
        ids = bytes.fromhex(self.store_id), bytes.fromhex(self.manifest_digest)
        return sealed(_SUPERBLOCK.pack(MAGIC, VERSION, self.target, self.targets, *ids))

    @classmethod
    def from_bytes(cls, block: bytes, where: str) -> Superblock:
        """Raises StoreError where ``block`` has none, or one that is damaged or of another version."""
        if len(block) < BLOCK or not block.startswith(MAGIC):
            raise StoreError(f"{where} bears no packed store: it was overwritten, or packing was broken off; {AGAIN}")
        if (fields := unsealed(block, _SUPERBLOCK.size)) is None:
            raise StoreError(f"{where}: the superblock of the packed store is damaged; {AGAIN}")
        _, version, target, targets, store_id, digest = _SUPERBLOCK.unpack(fields)
        if version != VERSION:
            raise StoreError(
                f"{where} bears a packed store of version {version}, version {VERSION} is read here; {AGAIN}"
            )
        return cls(store_id.hex(), digest.hex(), target, targets)

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

    For ``tp`` ranks each group is as many images of the same layout, one behind the other; ``offsets`` are rank 0's.
    ``target_bytes`` is what each target has to hold, superblock included.
    """

    config: ModelShape
    dtype: torch.dtype
    targets: int
    tp: int
    offsets: Mapping[GroupId | None, int]
    layouts: Mapping[GroupId | None, GroupLayout]
    target_bytes: int

    def extents(self, group: GroupId | None, rank: int) -> tuple[Extent, ...]:
        """Where the image of a rank's share of ``group`` is."""
        nbytes = self.layouts[group].nbytes
        return stripes(nbytes, self.offsets[group] + rank * stride_of(nbytes, self.targets), self.targets)


def plan_store(config: ModelShape, dtype: torch.dtype, targets: int, tp: int = 1) -> StorePlan:
    """The layout of a new store; raises UnusableInput if the model cannot be cut for ``tp`` ranks."""
    share = config.share(tp)
    by_kind = {kind: image_layout(share.specs(kind), dtype) for kind in (None, *KINDS)}
    groups = (None, *pass_order(config.n_layers))
    layouts = {group: by_kind[group.kind if group else None] for group in groups}
    offsets, offset = {}, BLOCK
    for group, layout in layouts.items():
        offsets[group] = offset
        offset += tp * stride_of(layout.nbytes, targets)
    return StorePlan(config, dtype, targets, tp, offsets, layouts, offset)
