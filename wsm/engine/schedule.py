"""What to fetch next. Nothing here is thread-safe: the tiers' lock guards it.

Every tier is fed in one cyclic order, one line per kind. Within a kind nothing overtakes; between the two kinds
a later group may overtake one that is held up, within the bounds of :class:`Balance`. Residents come first, once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wsm.engine.slots import CopyJob, Homes, Pool, Pools, ReadJob, Slot
from wsm.layout.groups import KINDS, GroupId, Kind
from wsm.plan.placement import LOADING_SLOTS
from wsm.settings import Settings

RESIDENTS_IN_FLIGHT = 4
"""Reads of residents whose bytes are on their way: enough to keep the drive busy, few enough for a streamed group that
gets room to be read soon."""
_NO_POOL = Pool((), retain=False)


@dataclass(frozen=True, slots=True)
class Cycle:
    """The endless sequence of those groups of one kind that a tier has to be fed.

    ``ordinal`` n stands for the n-th of them, counted over all passes; its ``step`` counts all groups of all passes.

    Args:
        groups: the groups in pass order.
        indices: the place of each in a pass.
        steps_a_pass: groups in a pass, fed or not.
    """

    groups: tuple[GroupId, ...]
    indices: tuple[int, ...]
    steps_a_pass: int

    def group(self, ordinal: int) -> GroupId:
        return self.groups[ordinal % len(self.groups)]

    def step(self, ordinal: int) -> int:
        passes, place = divmod(ordinal, len(self.groups))
        return passes * self.steps_a_pass + self.indices[place]


def cycle_of(order: list[GroupId], kind: Kind, layers: frozenset[int]) -> Cycle:
    """The cycle of one kind over the given layers of a pass ``order``."""
    places = [(group, index) for index, group in enumerate(order) if group.kind == kind and group.layer in layers]
    return Cycle(tuple(group for group, _ in places), tuple(index for _, index in places), len(order))


@dataclass(slots=True)
class Line:
    """The groups of one kind on their way through a tier's slots.

    Ordinals are counted over all passes and never go back: used <= fetched <= started.

    Attributes:
        started: fetches begun; that ordinal of the cycle comes next.
        fetched: fetches that the next tier may count on.
        used: groups that the next tier is through with.
    """

    cycle: Cycle
    pool: Pool
    started: int = 0
    fetched: int = 0
    used: int = 0

    @property
    def group(self) -> GroupId:
        """The group that is fetched next."""
        return self.cycle.group(self.started)

    @property
    def step(self) -> int:
        """The step that it is fetched for."""
        return self.cycle.step(self.started)

    @property
    def ahead(self) -> int:
        """Groups begun and not used."""
        return self.started - self.used

    def is_retained(self) -> bool:
        """Whether the next group is still in a free slot."""
        slot = self.pool.find(self.group)
        return slot is not None and self.pool.is_free(slot)

    def pin(self) -> None:
        """Take that slot, without moving a byte."""
        slot = self.pool.find(self.group)
        assert slot is not None
        self.pool.pin(slot)
        self.started += 1
        self.fetched += 1

    def start(self) -> Slot:
        """Begin to fetch the next group; the slot for it."""
        slot = self.pool.take(self.group)
        self.started += 1
        return slot


def lines_of(order: list[GroupId], layers: Sequence[int], pools: Pools) -> dict[Kind, Line]:
    """A line of the given layers through each of ``pools``; none without layers."""
    return {kind: Line(cycle_of(order, kind, frozenset(layers)), pool) for kind, pool in pools.items() if layers}


@dataclass(frozen=True, slots=True)
class Balance:
    """How far one kind may run ahead of the other (``WSM_BALANCE_*``, ``WSM_PAIR_AHEAD``, ``WSM_KIND_AHEAD_CAP``)."""

    on: bool
    tolerance: int
    pair_ahead: int
    kind_ahead_cap: int

    @classmethod
    def of(cls, settings: Settings) -> Balance:
        return cls(settings.balance_prefetch, settings.balance_tol, settings.pair_ahead, settings.kind_ahead_cap)

    def allows(self, step: int, ahead: int, held_step: int, held_ahead: int) -> bool:
        """Whether the group at ``step`` may overtake the held-up one at ``held_step`` of the other kind.

        ``ahead`` and ``held_ahead`` count the groups of each kind fetched and not yet used.
        """
        layers = step // 2 - held_step // 2
        if self.on:
            return abs(ahead + 1 - held_ahead) <= self.tolerance and layers <= self.pair_ahead
        return layers <= self.kind_ahead_cap


@dataclass(frozen=True, slots=True)
class Head:
    """The next group of one kind: its step, whether it can be fetched now, and how many of its kind are ahead."""

    step: int
    ready: bool
    ahead: int


def choose(heads: Mapping[Kind, Head], balance: Balance) -> Kind | None:
    """The kind to fetch from next: the earlier step if it is ready, else the other if it may overtake."""
    line = sorted((heads[kind].step, kind) for kind in KINDS if kind in heads)
    for place, (_, kind) in enumerate(line):
        head = heads[kind]
        if not head.ready:
            continue
        if place == 0:
            return kind
        held = heads[line[0][1]]
        if balance.allows(head.step, head.ahead, held.step, held.ahead):
            return kind
    return None


class Residents:
    """The residents of both tiers, in the order of a pass.

    A CPU resident's home holds it from its read on; before that it may have a GPU resident in it that passes through.
    Where there are no pools, the last homes are kept open for that as long as GPU residents wait.

    Args:
        order: the groups of one pass, in order.
        gpu_homes, cpu_homes: the residents' own buffers.
        pools: slots in CPU memory that GPU residents may come through too; empty where there are none.
    """

    def __init__(self, order: Sequence[GroupId], gpu_homes: Homes, cpu_homes: Homes, pools: Pools) -> None:
        self._gpu_homes, self._cpu_homes, self._pools = gpu_homes, cpu_homes, pools
        self.unread = deque(group for group in order if group in gpu_homes or group in cpu_homes)
        self.unread_for_gpu = sum(group in gpu_homes for group in self.unread)
        self._on_their_way = 0

    def claim(self) -> ReadJob | None:
        """The first that has room, unless enough are on their way; what has none comes first again next time."""
        if self._on_their_way >= RESIDENTS_IN_FLIGHT:
            return None
        jobs = (self._claim(group) for group in tuple(self.unread))
        return next((job for job in jobs if job is not None), None)

    def arrived(self) -> None:
        """The bytes of one are in."""
        self._on_their_way -= 1

    def passed(self, job: CopyJob) -> None:
        """A GPU resident's copy is queued: what it came through is free."""
        pool = self._pool(job.group.kind)
        if pool.find(job.group) is job.source:
            pool.clear(job.source)
        else:
            job.source.group, job.source.state = None, "absent"

    def _claim(self, group: GroupId) -> ReadJob | None:
        for_gpu = group in self._gpu_homes
        if for_gpu:
            destination = self._claim_way_in(group)
        else:
            destination = self._claim_home(group, group) if not self._is_last_way_in(group) else None
        if destination is None:
            return None
        self.unread.remove(group)
        self.unread_for_gpu -= for_gpu
        self._on_their_way += 1
        return ReadJob(group, None, destination)

    def _claim_home(self, resident: GroupId, tenant: GroupId) -> Slot | None:
        """The home of a CPU resident, for ``tenant``, if nothing is in it."""
        home = self._cpu_homes[resident]
        if home.state != "absent":
            return None
        home.group, home.state = tenant, "loading"
        return home

    def _claim_way_in(self, group: GroupId) -> Slot | None:
        """What a GPU resident comes through: the slot that streamed groups leave, the last open home, or any slot."""
        pool = self._pool(group.kind)
        if pool.has_room() and not pool.has_empty(2):
            return pool.take(group)
        for later in reversed(self.unread):
            if later.kind == group.kind and later in self._cpu_homes:
                home = self._claim_home(later, group)
                if home is not None:
                    return home
        return pool.take(group) if pool.has_room() else None

    def _is_last_way_in(self, resident: GroupId) -> bool:
        """Whether a CPU resident's home has to stay open for the GPU residents that wait, there being no pool."""
        if len(self._pool(resident.kind)):
            return False
        waiting = [group for group in self.unread if group.kind == resident.kind]
        homes = sum(group in self._cpu_homes for group in waiting)
        return homes <= LOADING_SLOTS and homes < len(waiting)

    def _pool(self, kind: Kind) -> Pool:
        return self._pools.get(kind, _NO_POOL)
