"""Which group is where: the state that the computation, the pager and the reader share."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from wsm.engine.device import Event
from wsm.engine.jobs import CopyJob, ReadJob
from wsm.engine.pool import Slot
from wsm.engine.residents import Homes, Pools, Residents
from wsm.engine.schedule import Balance, Cycle, Head, choose, cycle_of
from wsm.engine.shared import SharedState
from wsm.layout.groups import KINDS, GroupId, Kind
from wsm.plan.placement import Placement
from wsm.settings import Settings


class Tiers(SharedState):
    """One state machine a group and tier: absent -> loading -> ready -> in_use -> ready or absent.

    Everything below is read and written under ``self._changed`` alone. Invariants:

    * A slot has one owner: the free line of its pool, the read or copy into it, the copy or computation out of it.
    * Ordinals of a kind never go back: used <= fetched <= started on the GPU, and copied <= started on the CPU.
    * While GPU residents wait to be read, streamed groups leave them one empty CPU slot a kind: so loading never
      waits for the computation, and the computation, which may wait for a resident, never waits for ever.

    Args:
        order: the groups of one pass, in order.
        gpu_homes, cpu_homes: the residents' own buffers.
        gpu_pools, cpu_pools: the slots that streamed groups pass through.
        loading_pools: slots that GPU residents come through where there is no other CPU memory.
    """

    def __init__(
        self,
        plan: Placement,
        settings: Settings,
        order: list[GroupId],
        *,
        gpu_homes: Homes,
        cpu_homes: Homes,
        gpu_pools: Pools,
        cpu_pools: Pools,
        loading_pools: Pools,
    ) -> None:
        super().__init__("the weight streaming manager")
        self._plan, self._settings, self._order = plan, settings, order
        self._balance = Balance.of(settings)
        self._gpu_homes, self._cpu_homes = gpu_homes, cpu_homes
        self._gpu_pools, self._cpu_pools = gpu_pools, cpu_pools
        self._loading_pools = loading_pools
        streamed = frozenset(plan.residency.cpu) | frozenset(plan.residency.ssd)
        self._gpu_cycles: dict[Kind, Cycle] = {k: cycle_of(order, k, streamed) for k in KINDS if gpu_pools}
        self._ssd_cycles: dict[Kind, Cycle] = {
            k: cycle_of(order, k, frozenset(plan.residency.ssd)) for k in KINDS if plan.residency.ssd
        }
        self._gpu_started = dict.fromkeys(KINDS, 0)
        self._gpu_fetched = dict.fromkeys(KINDS, 0)
        self._gpu_used = dict.fromkeys(KINDS, 0)
        self._ssd_started = dict.fromkeys(KINDS, 0)
        self._ssd_passed = dict.fromkeys(KINDS, 0)
        self._residents = Residents(order, gpu_homes, cpu_homes, loading_pools or cpu_pools)
        self._places = {group: place for place, group in enumerate(order)}
        self._to_load = len(self._residents.unread)
        self._gpu_to_load = self._residents.unread_for_gpu
        self._staged: deque[tuple[GroupId, Slot]] = deque()
        self._held: deque[tuple[int, Kind, Slot]] = deque()
        self._step = 0
        self._entered = -1
        self.on_loaded: Callable[[GroupId], None] | None = None
        self.loaded_at_s: float | None = None
        self.on_starved: Callable[[float, float], None] = lambda start, end: None

    # -- what the pager asks and tells

    def next_copy(self) -> CopyJob | None:
        """Wait for a copy that can be queued now and claim it; None once closing."""
        with self._changed:
            while not self._closing:
                job = self._resident_copy() or self._streamed_copy()
                if job is not None:
                    return job
                starved, since = self._starved(), time.perf_counter()
                self._changed.wait()
                if starved:
                    self.on_starved(since, time.perf_counter())
        return None

    def _starved(self) -> bool:
        """Whether the link could copy if only the bytes were there."""
        heads = (cycle.group(self._gpu_started[kind]) for kind, cycle in self._gpu_cycles.items())
        return any(
            self._gpu_pools[group.kind].has_room()
            and ((slot := self._cpu_slot(group)) is None or slot.state != "ready")
            for group in heads
        )

    def _resident_copy(self) -> CopyJob | None:
        if not self._staged:
            return None
        group, source = self._staged.popleft()
        source.state = "in_use"
        return CopyJob(group, None, source, self._gpu_homes[group])

    def _streamed_copy(self) -> CopyJob | None:
        self._pin_retained(self._gpu_cycles, self._gpu_pools, self._gpu_started, self._gpu_fetched)
        heads = {kind: self._copy_head(kind) for kind in self._gpu_cycles}
        kind = choose(heads, self._balance)
        if kind is None:
            return None
        group = self._gpu_cycles[kind].group(self._gpu_started[kind])
        source = self._cpu_slot(group)
        assert source is not None
        assert source.group == group  # a tenant that was ready has been copied before
        source.state = "in_use"
        self._gpu_started[kind] += 1
        return CopyJob(group, heads[kind].step, source, self._gpu_pools[kind].take(group))

    def _copy_head(self, kind: Kind) -> Head:
        ordinal = self._gpu_started[kind]
        source = self._cpu_slot(self._gpu_cycles[kind].group(ordinal))
        ready = source is not None and source.state == "ready" and self._gpu_pools[kind].has_room()
        return Head(self._gpu_cycles[kind].step(ordinal), ready, ordinal - self._gpu_used[kind])

    def _cpu_slot(self, group: GroupId) -> Slot | None:
        home = self._cpu_homes.get(group)
        return home if home is not None else self._cpu_pools[group.kind].find(group)

    def last_resident(self, job: CopyJob) -> bool:
        """Whether ``job`` brings the last of the GPU residents."""
        return job.step is None and self._gpu_to_load == 1

    def copied(self, job: CopyJob, end: Event) -> None:
        """The copy is queued up to its event ``end``."""
        with self._changed:
            job.destination.filled, job.destination.state = end, "ready"
            job.source.drained = end
            kind = job.group.kind
            if job.step is None:
                self._residents.passed(job)
                self._gpu_to_load -= 1
                self._loaded(job.group)
            else:
                self._gpu_fetched[kind] += 1
                if job.group in self._cpu_homes:
                    job.source.state = "ready"
                else:
                    self._held.append((job.step, kind, job.source))
                    self._free_passed()
            self._changed.notify_all()

    # -- what the reader asks and tells

    def next_read(self) -> ReadJob | None:
        """Wait for a read that has room now and claim it; None once closing."""
        with self._changed:
            while not self._closing:
                job = self._claim_read()
                if job is not None:
                    return job
                self._changed.wait()
        return None

    def _claim_read(self) -> ReadJob | None:
        """Residents of both tiers and streamed groups in the order of the first pass: one sweep over the store.

        A streamed group without room is passed over, and so is a resident; both come first again at the next claim.
        """
        unread, kind = self._residents.unread, self._next_streamed()
        if kind is not None and (not unread or self._ssd_step(kind) < self._places[unread[0]]):
            return self._streamed_read(kind)
        return self._residents.claim()

    def _ssd_step(self, kind: Kind) -> int:
        return self._ssd_cycles[kind].step(self._ssd_started[kind])

    def _next_streamed(self) -> Kind | None:
        """The kind whose next group may be read from the SSD now."""
        if not self._residents.unread_for_gpu:  # before that nothing has been kept: see _may_read
            self._pin_retained(self._ssd_cycles, self._cpu_pools, self._ssd_started, None)
        return choose({kind: self._read_head(kind) for kind in self._ssd_cycles}, self._balance)

    def _streamed_read(self, kind: Kind) -> ReadJob:
        step, group = self._ssd_step(kind), self._ssd_cycles[kind].group(self._ssd_started[kind])
        self._ssd_started[kind] += 1
        return ReadJob(group, step, self._cpu_pools[kind].take(group))

    def _read_head(self, kind: Kind) -> Head:
        step, ahead = self._ssd_step(kind), self._ssd_started[kind] - self._ssd_passed[kind]
        pool = self._cpu_pools[kind]
        room = pool.has_empty(2) if self._residents.unread_for_gpu else pool.has_room()
        return Head(step, room and ahead < self._plan.read_ahead_layers and self._may_read(step), ahead)

    def _may_read(self, step: int) -> bool:
        if self._residents.unread_for_gpu and step >= len(self._order):
            return False
        if not self._settings.cpu_rolling_mode:
            return step <= self._entered
        pass_now = max(self._entered, 0) // len(self._order)
        return self._settings.cpu_wrap_around or step // len(self._order) <= pass_now

    def arrived(self, job: ReadJob) -> None:
        """All bytes of a read are in their slot, to be checked."""
        with self._changed:
            if job.step is None:
                self._residents.arrived()
            self._changed.notify_all()

    def read(self, job: ReadJob, failure: BaseException | None) -> None:
        """All bytes of a read are in their slot and right (or never will be)."""
        if failure is not None:
            self.fail(failure)
            return
        with self._changed:
            job.destination.state = "ready"
            if job.step is None and job.group in self._gpu_homes:
                self._staged.append((job.group, job.destination))
            elif job.step is None:
                self._loaded(job.group)
            self._changed.notify_all()

    # -- what the computation asks and tells

    @property
    def next_step(self) -> int:
        return self._step

    def expected(self) -> GroupId:
        """The group that the pass order has next."""
        return self._order[self._step % len(self._order)]

    def enter(self) -> tuple[int, Slot]:
        """Step on to the expected group; wait until its copy has been queued and its event recorded."""
        with self._changed:
            step, group = self._step, self.expected()
            self._entered = step
            if self._ssd_cycles:
                self._free_passed()
                self._changed.notify_all()
            if group in self._gpu_homes:
                slot = self._gpu_homes[group]
                self._wait(lambda: slot.filled is not None)
            else:
                slot = self._fetched(group)
                self._gpu_used[group.kind] += 1
            # Nothing above this line has been used up, so a wait that was interrupted can simply be entered again.
            self._step, slot.state = step + 1, "in_use"
            return step, slot

    def enter_all(self) -> tuple[int, Homes]:
        """Step over a whole pass whose groups are all resident, once they are there; its first step and their slots."""
        with self._changed:
            self._wait(self.loaded)
            step = self._step
            self._entered = step + len(self._order) - 1
            self._step = self._entered + 1
            return step, self._gpu_homes

    def _fetched(self, group: GroupId) -> Slot:
        self._wait(lambda: self._gpu_fetched[group.kind] > self._gpu_used[group.kind])
        slot = self._gpu_pools[group.kind].find(group)
        assert slot is not None
        return slot

    def leave(self, group: GroupId, slot: Slot, done: Event) -> None:
        """The computation on ``slot`` is queued up to its event ``done``."""
        with self._changed:
            if group in self._gpu_homes:
                slot.state = "ready"
                return
            slot.drained = done
            self._gpu_pools[group.kind].free(slot)
            self._changed.notify_all()

    def _free_passed(self) -> None:
        """Free the CPU slots that were copied out and, with WSM_CPU_ROLL_SYNC, whose layer has been entered."""
        kept: deque[tuple[int, Kind, Slot]] = deque()
        for step, kind, slot in self._held:
            if self._settings.cpu_roll_sync and step - step % len(KINDS) > self._entered:
                kept.append((step, kind, slot))
            else:
                self._cpu_pools[kind].free(slot)
                self._ssd_passed[kind] += 1
        self._held = kept

    # -- shared pieces

    def _pin_retained(
        self,
        cycles: Mapping[Kind, Cycle],
        pools: Pools,
        started: dict[Kind, int],
        fetched: dict[Kind, int] | None,
    ) -> None:
        """Where the next group of a kind still lies in a free slot, take it without moving a byte."""
        for kind, cycle in cycles.items():
            while (slot := pools[kind].find(cycle.group(started[kind]))) is not None and pools[kind].is_free(slot):
                pools[kind].pin(slot)
                started[kind] += 1
                if fetched is not None:
                    fetched[kind] += 1
                self._changed.notify_all()

    def _loaded(self, group: GroupId) -> None:
        self._to_load -= 1
        if self._to_load == 0:
            self.loaded_at_s = time.perf_counter()
        if self.on_loaded is not None:
            self.on_loaded(group)

    def loaded(self) -> bool:
        """Whether every resident is in its tier."""
        return self._to_load == 0

    def wanted_groups(self) -> int:
        """Slots that are to be filled ahead of the computation and whose copy has not been queued."""
        with self._changed:
            slots = [slot for pool in self._gpu_pools.values() for slot in pool.slots]
            return sum(slot.state in ("absent", "loading") for slot in slots)

    def wait_loaded(self) -> None:
        with self._changed:
            self._wait(self.loaded)

    def wait_staged(self, layers: int) -> None:
        """Wait until the first ``layers`` of the coming pass are on the GPU, as far as they come unasked."""
        if not self._settings.cpu_rolling_mode:
            layers = min([layers, *self._plan.residency.ssd])
        resident = [group for group in self._order if group.layer < layers and group in self._gpu_homes]
        wanted = dict.fromkeys(KINDS, 0)
        for kind, cycle in self._gpu_cycles.items():
            wanted[kind] = min(sum(group.layer < layers for group in cycle.groups), len(self._gpu_pools[kind]))
        with self._changed:
            self._wait(
                lambda: (
                    all(self._gpu_homes[group].filled is not None for group in resident)
                    and all(self._gpu_fetched[kind] - self._gpu_used[kind] >= wanted[kind] for kind in KINDS)
                )
            )

    def device_buffer(self) -> Tensor:
        """The largest slot or resident's buffer on the device."""
        slots = [slot for pool in self._gpu_pools.values() for slot in pool.slots] or list(self._gpu_homes.values())
        return max((slot.buffer for slot in slots), key=lambda buffer: buffer.nbytes)

    def release(self) -> None:
        """Let go of the memory of every slot, once nobody uses it."""
        pools = (*self._gpu_pools.values(), *self._cpu_pools.values(), *self._loading_pools.values())
        slots = [slot for pool in pools for slot in pool.slots]
        for slot in (*slots, *self._gpu_homes.values(), *self._cpu_homes.values()):
            slot.buffer = torch.empty(0, dtype=torch.uint8)

    def describe(self) -> str:
        """One line: what the pools of each tier hold (``*`` in use, ``…`` loading)."""
        with self._changed:
            gpu = " ".join(_names(self._gpu_pools))
            cpu = " ".join(_names(self._cpu_pools))
            heads = [self._ssd_cycles[k].group(self._ssd_started[k]) for k in self._ssd_cycles]
        residents = len(self._plan.residency.gpu), len(self._plan.residency.cpu)
        return (
            f"GPU: {gpu or '-'} (+{residents[0]} resident layers) | CPU: {cpu or '-'} (+{residents[1]} resident layers)"
            f" | SSD: next {' '.join(str(group) for group in sorted(heads)) or '-'}"
        )


def _names(pools: Pools) -> Iterator[str]:
    marks = {"in_use": "*", "loading": "…", "ready": "", "absent": ""}
    entries = sorted(entry for pool in pools.values() for entry in pool.contents())
    return (f"{group}{marks[state]}" for group, state in entries)
