"""What the pager and the reader are told to do."""

from __future__ import annotations

from dataclasses import dataclass

from wsm.engine.pool import Slot
from wsm.layout.groups import GroupId


@dataclass(frozen=True, slots=True)
class CopyJob:
    """CPU -> GPU. ``step`` is None for a GPU resident, which is copied once."""

    group: GroupId
    step: int | None
    source: Slot
    destination: Slot


@dataclass(frozen=True, slots=True)
class ReadJob:
    """SSD (or checkpoint) -> CPU. ``step`` is None for a resident of either tier, which is read once."""

    group: GroupId
    step: int | None
    destination: Slot
