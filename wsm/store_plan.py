"""Where the groups of a packed store lie: on which targets, at which offsets, for how many ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llama.checkpoint import rank_config
from llama.checkpoint.names import KINDS, GroupId, pass_order
from llama.config import ModelConfig
from wsm.groups import BLOCK, GroupLayout, globals_layout, group_layout, round_up


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of a target, ready for O_DIRECT; only its first ``needed`` bytes have to exist."""

    target: int
    offset: int
    nbytes: int
    slot_offset: int
    needed: int


def stripes(nbytes: int, offset: int, targets: int) -> tuple[Extent, ...]:
    """An image cut into one contiguous part a target, each at the same ``offset``; parts are multiples of 4096."""
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
    """Where a checkpoint's groups will lie on ``targets`` devices: globals first, then pass order.

    For ``tp`` ranks each group is as many images of the same layout, one behind the other; ``offsets`` are rank 0's.
    """

    config: ModelConfig
    dtype: torch.dtype
    targets: int
    tp: int
    offsets: Mapping[GroupId | None, int]
    layouts: Mapping[GroupId | None, GroupLayout]
    target_bytes: int

    def extents(self, group: GroupId | None, rank: int) -> tuple[Extent, ...]:
        """Where the image of a rank's share of ``group`` lies."""
        nbytes = self.layouts[group].nbytes
        return stripes(nbytes, self.offsets[group] + rank * stride_of(nbytes, self.targets), self.targets)


def plan_store(config: ModelConfig, dtype: torch.dtype, targets: int, tp: int = 1) -> StorePlan:
    """The layout of a new store; ``target_bytes`` is what each target has to hold, superblock included.

    Raises:
        UnusableInput: if the model cannot be cut for ``tp`` ranks.
    """
    share = rank_config(config, tp)
    by_kind = {kind: group_layout(share, kind, dtype) for kind in KINDS}
    layouts: dict[GroupId | None, GroupLayout] = {None: globals_layout(share, dtype)}
    layouts.update({group: by_kind[group.kind] for group in pass_order(config.n_layers)})
    offsets: dict[GroupId | None, int] = {}
    offset = BLOCK
    for group, layout in layouts.items():
        offsets[group] = offset
        offset += tp * stride_of(layout.nbytes, targets)
    return StorePlan(config, dtype, targets, tp, offsets, layouts, offset)
