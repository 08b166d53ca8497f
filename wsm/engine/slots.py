"""Slots: the buffers that groups are in, the pools of them, and the jobs that fill them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from wsm.engine.device import Event
from wsm.layout.groups import GroupId, Kind

State = Literal["absent", "loading", "ready", "in_use"]


@dataclass(slots=True, eq=False)
class Slot:
    """A fixed-size buffer and the group in it.

    ``filled`` is the event behind the copy into it (GPU tier); ``drained`` is the event behind its last reader: the
    computation (GPU tier) or the copy to the GPU (CPU tier). A new tenant's first write waits for ``drained``.
    """

    buffer: Tensor
    group: GroupId | None = None
    state: State = "absent"
    filled: Event | None = None
    drained: Event | None = None


class Pool:
    """Slots of one kind, a ``uint8`` buffer each. Not thread-safe: the tiers' lock guards it.

    Invariants: a slot is either free (in ``_free``, empty ones first, then the oldest) or taken; a group is in at most
    one slot; with ``retain`` a free slot keeps its group until somebody takes the slot: it can be pinned again.
    """

    def __init__(self, buffers: Iterable[Tensor], *, retain: bool) -> None:
        self.slots = [Slot(buffer) for buffer in buffers]
        self._free = deque(self.slots)
        self._by_group: dict[GroupId, Slot] = {}
        self._retain = retain

    def find(self, group: GroupId) -> Slot | None:
        """The slot that holds ``group``, free or taken."""
        return self._by_group.get(group)

    def has_room(self) -> bool:
        return bool(self._free)

    def has_empty(self, slots: int) -> bool:
        """Whether so many free slots hold no group; those are taken before the others."""
        return sum(slot.group is None for slot in self._free) >= slots

    def keeps(self, group: GroupId) -> bool:
        """Whether a free slot still holds ``group``."""
        return self._by_group.get(group) in self._free

    def take(self, group: GroupId) -> Slot:
        """Evict the oldest free slot's group and start loading ``group`` there."""
        slot = self._free.popleft()
        if slot.group is not None:
            del self._by_group[slot.group]
        slot.group, slot.state, slot.filled = group, "loading", None
        self._by_group[group] = slot
        return slot

    def pin(self, group: GroupId) -> None:
        """Take the free slot that still holds ``group``."""
        self._free.remove(self._by_group[group])

    def free(self, slot: Slot) -> None:
        """Put a taken slot last in the line of free ones."""
        if self._retain:
            slot.state = "ready"
            self._free.append(slot)
        else:
            self.clear(slot)

    def clear(self, slot: Slot) -> None:
        """Empty a taken slot and put it behind the other empty ones."""
        assert slot.group is not None
        del self._by_group[slot.group]
        slot.group, slot.state = None, "absent"
        self._free.insert(sum(free.group is None for free in self._free), slot)


Pools = Mapping[Kind, Pool]
Homes = Mapping[GroupId, Slot]


@dataclass(frozen=True, slots=True)
class ReadJob:
    """SSD (or checkpoint) -> CPU. ``step`` is None for a resident of either tier, which is read once."""

    group: GroupId
    step: int | None
    destination: Slot


@dataclass(frozen=True, slots=True)
class CopyJob:
    """CPU -> GPU. ``step`` is None for a GPU resident, which is copied once; the ``last`` of them ends the loading."""

    group: GroupId
    step: int | None
    source: Slot
    destination: Slot
    last: bool = False
