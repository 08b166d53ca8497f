"""The first 4096 bytes of every target of a packed store: which store this is, and of which manifest."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from wsm.errors import StoreError
from wsm.groups import BLOCK

MAGIC = b"WSMSTORE"
VERSION = 2
_FIELDS = struct.Struct("<8sIII16s16s")


@dataclass(frozen=True, slots=True)
class Superblock:
    """``store_id`` and ``manifest_digest`` are 16 bytes each, in hexadecimal."""

    store_id: str
    manifest_digest: str
    target: int
    targets: int

    def to_bytes(self) -> bytes:
        """4096 bytes: the fields, little-endian; their xxh3-64; zeros."""
        ids = bytes.fromhex(self.store_id), bytes.fromhex(self.manifest_digest)
        fields = _FIELDS.pack(MAGIC, VERSION, self.target, self.targets, *ids)
        return (fields + xxhash.xxh3_64_digest(fields)).ljust(BLOCK, b"\0")


def parse(block: bytes, where: str) -> Superblock:
    """The superblock in ``block``.

    Raises:
        StoreError: if there is none, or it is damaged or of another version.
    """
    fields, check = block[: _FIELDS.size], block[_FIELDS.size : _FIELDS.size + 8]
    if len(block) < BLOCK or not block.startswith(MAGIC):
        raise StoreError(f"{where} bears no packed store (or one that was not finished): pack it again")
    if xxhash.xxh3_64_digest(fields) != check:
        raise StoreError(f"{where}: the superblock is damaged: pack it again")
    _, version, target, targets, store_id, digest = _FIELDS.unpack(fields)
    if version != VERSION:
        raise StoreError(f"{where} bears a packed store of version {version}; this program reads version {VERSION}")
    return Superblock(store_id.hex(), digest.hex(), target, targets)


def check(block: bytes, expected: Superblock, where: str) -> None:
    """Raises StoreError unless ``block`` is the superblock that the manifest calls for."""
    found = parse(block, where)
    if found.store_id != expected.store_id:
        raise StoreError(
            f"{where} bears another store ({found.store_id}) than the manifest names ({expected.store_id})"
        )
    if (found.target, found.targets) != (expected.target, expected.targets):
        raise StoreError(f"{where} is part {found.target} of {found.targets} of the store, not part {expected.target}")
    if found.manifest_digest != expected.manifest_digest:
        raise StoreError(f"{where} was packed with another manifest than this one: use that one, or pack again")
