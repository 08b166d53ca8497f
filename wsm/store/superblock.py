"""The first 4096 bytes of every target of a packed store: which store this is, and of which manifest."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from wsm.disk.targets import sealed, unsealed
from wsm.errors import StoreError
from wsm.layout.groups import BLOCK

MAGIC = b"WSMSTORE"
VERSION = 2
AGAIN = "re-pack with `bench_infer.py pack`"
_FIELDS = struct.Struct("<8sIII16s16s")


@dataclass(frozen=True, slots=True)
class Superblock:
    """``store_id`` and ``manifest_digest`` are 16 bytes each, in hexadecimal."""

    store_id: str
    manifest_digest: str
    target: int
    targets: int

    def to_bytes(self) -> bytes:
        """4096 bytes: the fields, little-endian, sealed."""
        ids = bytes.fromhex(self.store_id), bytes.fromhex(self.manifest_digest)
        return sealed(_FIELDS.pack(MAGIC, VERSION, self.target, self.targets, *ids))


def parse(block: bytes, where: str) -> Superblock:
    """The superblock in ``block``.

    Raises:
        StoreError: if there is none, or it is damaged or of another version.
    """
    if len(block) < BLOCK or not block.startswith(MAGIC):
        raise StoreError(f"{where} bears no packed store: it was overwritten, or packing was broken off; {AGAIN}")
    if (fields := unsealed(block, _FIELDS.size)) is None:
        raise StoreError(f"{where}: the superblock of the packed store is damaged; {AGAIN}")
    _, version, target, targets, store_id, digest = _FIELDS.unpack(fields)
    if version != VERSION:
        raise StoreError(f"{where} bears a packed store of version {version}, version {VERSION} is read here; {AGAIN}")
    return Superblock(store_id.hex(), digest.hex(), target, targets)


def check(block: bytes, expected: Superblock, where: str) -> None:
    """Refuse a target that is not the one that the manifest calls for.

    Raises:
        StoreError: if ``block`` is not the ``expected`` superblock.
    """
    found = parse(block, where)
    if found.store_id != expected.store_id:
        raise StoreError(
            f"{where} is another store or was overwritten: it bears {found.store_id}, the manifest names "
            f"{expected.store_id}; name the right device, or {AGAIN}"
        )
    if (found.target, found.targets) != (expected.target, expected.targets):
        raise StoreError(
            f"{where} is part {found.target + 1} of {found.targets} of the store, not part {expected.target + 1} of "
            f"{expected.targets}; name the devices in the order of `pack --to`"
        )
    if found.manifest_digest != expected.manifest_digest:
        raise StoreError(f"{where} was packed with another manifest than this one: use that one, or {AGAIN}")
