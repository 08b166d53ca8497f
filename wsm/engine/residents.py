"""Residents that are still to be read: which comes next, and where its bytes go."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from wsm.engine.jobs import CopyJob, ReadJob
from wsm.engine.pool import Pool, Slot
from wsm.layout.groups import GroupId, Kind
from wsm.plan.placement import LOADING_SLOTS

RESIDENTS_IN_FLIGHT = 4
"""Reads of residents whose bytes are on their way: enough to keep the drive busy, few enough for a streamed group that
gets room to be read soon."""

Pools = Mapping[Kind, Pool]
Homes = Mapping[GroupId, Slot]
_NO_POOL = Pool((), retain=False)


class Residents:
    """The residents of both tiers, in the order of a pass. Not thread-safe: the tiers' lock guards it.

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
