"""Slots: the buffers that groups are in, the pools of them, and the jobs that fill them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
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
    """Slots of one kind. Not thread-safe: the tiers' lock guards it.

    Invariants: a slot is either free (in ``_free``, empty ones first, then the oldest) or taken; a group is in at most
    one slot; with ``retain`` a free slot keeps its group until somebody takes the slot, so that the group can be pinned
    again.

    Args:
        buffers: one ``uint8`` tensor per slot.
        retain: whether a freed slot keeps its group.
    """

    def __init__(self, buffers: Iterable[Tensor], *, retain: bool) -> None:
        self.slots = [Slot(buffer) for buffer in buffers]
        self._free = deque(self.slots)
        self._by_group: dict[GroupId, Slot] = {}
        self._retain = retain

    def __len__(self) -> int:
        return len(self.slots)

    def find(self, group: GroupId) -> Slot | None:
        """The slot that holds ``group``, free or taken."""
        return self._by_group.get(group)

    def has_room(self) -> bool:
        return bool(self._free)

    def has_empty(self, slots: int) -> bool:
        """Whether so many free slots hold no group; those are taken before the others."""
        return sum(slot.group is None for slot in self._free) >= slots

    def is_free(self, slot: Slot) -> bool:
        return slot in self._free

    def take(self, group: GroupId) -> Slot:
        """Evict the oldest free slot's group and start loading ``group`` there."""
        slot = self._free.popleft()
        if slot.group is not None:
            del self._by_group[slot.group]
        slot.group, slot.state, slot.filled = group, "loading", None
        self._by_group[group] = slot
        return slot

    def pin(self, slot: Slot) -> None:
        """Take a free slot for the group that it still holds."""
        self._free.remove(slot)

    def free(self, slot: Slot) -> None:
        """Put a taken slot last in the line of free ones."""
        if not self._retain:
            assert slot.group is not None
            del self._by_group[slot.group]
            slot.group, slot.state = None, "absent"
        else:
            slot.state = "ready"
        self._free.append(slot)

    def clear(self, slot: Slot) -> None:
        """Put a taken slot behind the other empty ones."""
        assert slot.group is not None
        del self._by_group[slot.group]
        slot.group, slot.state = None, "absent"
        self._free.insert(sum(free.group is None for free in self._free), slot)

    def contents(self) -> Sequence[tuple[GroupId, State]]:
        """What the slots hold, in pass order."""
        return sorted((slot.group, slot.state) for slot in self.slots if slot.group is not None)


Pools = Mapping[Kind, Pool]
Homes = Mapping[GroupId, Slot]


@dataclass(frozen=True, slots=True)
class Slots:
    """Every slot of a run.

    Attributes:
        gpu_homes, cpu_homes: the residents' own buffers.
        gpu_pools, cpu_pools: the slots that streamed groups pass through.
        loading_pools: slots that GPU residents come through where there is no other CPU memory.
    """

    gpu_homes: Homes
    cpu_homes: Homes
    gpu_pools: Pools
    cpu_pools: Pools
    loading_pools: Pools

    def on_gpu(self) -> list[Slot]:
        """The slots of the pools first."""
        return [slot for pool in self.gpu_pools.values() for slot in pool.slots] + list(self.gpu_homes.values())

    def on_cpu(self) -> list[Slot]:
        pools = (*self.cpu_pools.values(), *self.loading_pools.values())
        return [slot for pool in pools for slot in pool.slots] + list(self.cpu_homes.values())


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
