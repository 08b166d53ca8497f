"""What to fetch next. Nothing here is thread-safe: the tiers' lock guards it.

Every tier is fed in one cyclic order, one line per kind. Within a kind nothing overtakes; between the two kinds
a later group may overtake one that is held up, within bounds. Residents are read once, in the order of the first pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from wsm.engine.slots import CopyJob, Homes, Pool, Pools, ReadJob, Slot
from wsm.layout.groups import GroupId, Kind
from wsm.plan.placement import LOADING_SLOTS
from wsm.settings import Settings

RESIDENTS_IN_FLIGHT = 4
"""Reads of residents whose bytes are on their way: enough to keep the drive busy, few enough for a streamed group that
gets room to be read soon."""
_NO_POOL = Pool((), retain=False)


@dataclass(slots=True)
class Line:
    """The groups of one kind that a tier has to be fed, again and again, and the slots that they pass through.

    Counts are of all passes and never go back: used <= fetched <= started.
    """

    groups: tuple[GroupId, ...]  # in pass order
    steps: tuple[int, ...]  # of each in the first pass; a step counts the groups of all kinds and passes
    steps_per_pass: int  # groups in a pass, fed or not
    pool: Pool
    started: int = 0  # fetches begun
    fetched: int = 0  # fetches that the next tier may count on
    used: int = 0  # groups that the next tier is through with

    @property
    def group(self) -> GroupId:
        """The group that is fetched next."""
        return self.groups[self.started % len(self.groups)]

    @property
    def step(self) -> int:
        """The step that it is fetched for."""
        passes, place = divmod(self.started, len(self.groups))
        return passes * self.steps_per_pass + self.steps[place]

    @property
    def ahead(self) -> int:
        """Groups begun and not used."""
        return self.started - self.used

    def pin(self) -> None:
        """Take the free slot that still holds the next group, without moving a byte."""
        self.pool.pin(self.group)
        self.started += 1
        self.fetched += 1

    def start(self) -> Slot:
        """Begin to fetch the next group; the slot for it."""
        slot = self.pool.take(self.group)
        self.started += 1
        return slot


def lines_of(order: Sequence[GroupId], layers: Sequence[int], pools: Pools) -> dict[Kind, Line]:
    """A line of the given layers of a pass through each of ``pools``; none without layers."""
    lines = {}
    for kind, pool in pools.items() if layers else ():
        steps = tuple(step for step, group in enumerate(order) if group.kind == kind and group.layer in layers)
        lines[kind] = Line(tuple(order[step] for step in steps), steps, len(order), pool)
    return lines


def choose(lines: Iterable[Line], ready: Callable[[Line], bool], settings: Settings) -> Line | None:
    """The line to fetch from next: the one with the earlier step if it is ready, else the other if it may overtake."""
    held: Line | None = None
    for line in sorted(lines, key=lambda line: line.step):
        if ready(line) and (held is None or _may_overtake(line, held, settings)):
            return line
        held = held or line
    return None


def _may_overtake(line: Line, held: Line, settings: Settings) -> bool:
    """How far one kind may run ahead of the other (``WSM_BALANCE_*``, ``WSM_PAIR_AHEAD``, ``WSM_KIND_AHEAD_CAP``)."""
    layers = line.step // 2 - held.step // 2
    if settings.balance_prefetch:
        return abs(line.ahead + 1 - held.ahead) <= settings.balance_tol and layers <= settings.pair_ahead
    return layers <= settings.kind_ahead_cap


class Residents:
    """The residents of both tiers, in the order of a pass.

    A CPU resident's home holds it from its read on; before that it may have a GPU resident in it that passes through.
    GPU residents may come through the CPU slots of ``pools`` too; where there are none, the last homes are kept open
    for that as long as GPU residents wait.
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
        if not for_gpu and self._is_last_way_in(group):
            return None
        destination = self._claim_way_in(group) if for_gpu else self._claim_home(group, group)
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
            is_home = later.kind == group.kind and later in self._cpu_homes
            if is_home and self._fits(group, later) and (home := self._claim_home(later, group)) is not None:
                return home
        return pool.take(group) if pool.has_room() else None

    def _fits(self, group: GroupId, resident: GroupId) -> bool:
        """Whether a GPU resident's image has room in the home of a CPU resident."""
        return self._gpu_homes[group].buffer.nbytes <= self._cpu_homes[resident].buffer.nbytes

    def _is_last_way_in(self, resident: GroupId) -> bool:
        """Whether a CPU resident's home has to stay open for the GPU residents that wait, there being no pool."""
        if self._pool(resident.kind).slots:
            return False
        waiting = [group for group in self.unread if group.kind == resident.kind]
        homes = sum(group in self._cpu_homes for group in waiting)
        return homes <= LOADING_SLOTS and homes < len(waiting)

    def _pool(self, kind: Kind) -> Pool:
        return self._pools.get(kind, _NO_POOL)
