"""A packed store as its manifest describes it, whatever the manifest's version."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import torch

from wsm.errors import UnusableInput
from wsm.layout.groups import GroupId, GroupLayout
from wsm.layout.model import WHOLE, ModelShape, Shard, SourceFile
from wsm.store.layout import Extent, Superblock

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
DTYPE_FORMATS = {torch.bfloat16: "bf16", torch.float16: "float16", torch.float32: "float32"}
"""A plain dtype as `--weight-format` spells it."""
PLAIN = "plain"
"""Stands for any of these."""

Name = Annotated[str, msgspec.Meta(min_length=1)]
T = TypeVar("T")


def typed(content: Mapping[str, Any], kind: type[T], where: str, mend: str) -> T:
    """JSON found at ``where`` as a ``kind``; raises UnusableInput for the first field that is not as its type says."""
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        wrong, _, field = str(error).partition(" - at `$")
        inside, missing = field.strip(".`"), re.search("required field `(.*)`", wrong)
        if missing:
            wrong = f"field {'.'.join(filter(None, [inside, missing[1]]))} is missing"
        elif inside:
            wrong = f"field {inside}: {wrong}, not {_at(content, inside)!r:.60}"
        raise UnusableInput(f"{where}: {wrong}; {mend}") from error


def _at(content: Any, field: str) -> Any:
    """What is found at a path as msgspec writes it, such as ``groups[3].checksum``."""
    for step in re.findall(r"\w+", field):
        content = content[int(step) if isinstance(content, list) else step]
    return content


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """One group (None: the globals), or a rank's share of it: its image, where its bytes are, and their xxh3-128."""

    group: GroupId | None
    layout: GroupLayout
    extents: tuple[Extent, ...]
    checksum: str | None
    rank: int | None = None

    @property
    def name(self) -> str:
        group = str(self.group) if self.group is not None else "the globals"
        return group if self.rank is None else f"{group} of rank {self.rank}"


@dataclass(frozen=True, slots=True)
class StoreDescription:
    """A manifest, read and checked: what ``shard`` of it holds. ``config`` is the whole model's.

    ``content`` is a digest of what was packed, the same wherever it was packed to; ``weight_format`` is None where all
    lies there in its dtype, ``native`` is whether it is what the checkpoint itself was quantised in.
    """

    version: int
    path: Path
    targets: tuple[str, ...]
    config: ModelShape
    dtype: torch.dtype
    groups: Mapping[GroupId | None, StoredGroup]
    superblocks: tuple[Superblock, ...] = ()
    sources: tuple[SourceFile, ...] = ()
    shard: Shard = WHOLE
    content: str | None = None
    weight_format: str | None = None
    native: bool = False

    @property
    def nbytes(self) -> int:
        """What a full read of the shard moves."""
        return sum(extent.nbytes for group in self.groups.values() for extent in group.extents)
