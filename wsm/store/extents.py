"""Where the groups of a packed store are: on which targets, at which offsets, for how many ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from wsm.layout.groups import BLOCK, KINDS, GroupId, GroupLayout, image_layout, pass_order, round_up
from wsm.layout.model import ModelShape


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
    """Where a checkpoint's groups will be on ``targets`` devices: globals first, then pass order.

    For ``tp`` ranks each group is as many images of the same layout, one behind the other; ``offsets`` are rank 0's.
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
    """The layout of a new store; ``target_bytes`` is what each target has to hold, superblock included.

    Raises:
        UnusableInput: if the model cannot be cut for ``tp`` ranks.
    """
    share = config.share(tp)
    by_kind = {kind: image_layout(share.specs(kind), dtype) for kind in (None, *KINDS)}
    layouts: dict[GroupId | None, GroupLayout] = {None: by_kind[None]}
    layouts.update({group: by_kind[group.kind] for group in pass_order(config.n_layers)})
    offsets: dict[GroupId | None, int] = {}
    offset = BLOCK
    for group, layout in layouts.items():
        offsets[group] = offset
        offset += tp * stride_of(layout.nbytes, targets)
    return StorePlan(config, dtype, targets, tp, offsets, layouts, offset)
