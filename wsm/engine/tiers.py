"""Which group is where: the state that the computation, the pager and the reader share."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from wsm.engine.device import Event
from wsm.engine.memory import WeightMemory
from wsm.engine.schedule import Line, Residents, choose, lines_of
from wsm.engine.slots import CopyJob, Homes, Pools, ReadJob, Slot
from wsm.engine.threads import SharedState
from wsm.layout.groups import KINDS, GroupId
from wsm.plan.placement import Placement
from wsm.settings import Settings


class Tiers(SharedState):
    """One state machine per group and tier: absent -> loading -> ready -> in_use -> ready or absent.

    A streamed group passes through six methods: :meth:`claim_read` and :meth:`read_done` of the reader,
    :meth:`next_copy` and :meth:`copy_queued` of the pager, :meth:`enter` and :meth:`leave` of the computation.

    Everything below is read and written under ``self._lock`` alone. Invariants:

    * A slot has one owner: the free line of its pool, the read or copy into it, the copy or computation out of it.
    * Ordinals of a kind never go back: see :class:`Line`.
    * While GPU residents wait to be read, streamed groups leave them one empty CPU slot of each kind: so loading never
      waits for the computation, and the computation, which may wait for a resident, never waits for ever.

    ``next_step`` is the place in the endless pass order that the computation has next.

    Args:
        order: the groups of one pass, in order.
        on_starved: called with the start and end of each wait of the link for bytes, in seconds of the host's clock.
        on_loaded: called with each resident group once it is in its tier, under the lock.
    """

    def __init__(
        self,
        plan: Placement,
        settings: Settings,
        order: list[GroupId],
        memory: WeightMemory,
        on_starved: Callable[[float, float], None],
        on_loaded: Callable[[GroupId], None] | None,
    ) -> None:
        super().__init__("the weight streaming manager")
        self._plan, self._settings, self._order = plan, settings, order
        self._gpu_homes, self._cpu_homes = memory.gpu_homes, memory.cpu_homes
        self._gpu_pools, self._cpu_pools = memory.gpu_pools, memory.cpu_pools
        self._to_gpu = lines_of(order, (*plan.residency.cpu, *plan.residency.ssd), memory.gpu_pools)
        self._to_cpu = lines_of(order, plan.residency.ssd, memory.cpu_pools)
        self._residents = Residents(order, memory.gpu_homes, memory.cpu_homes, memory.loading_pools or memory.cpu_pools)
        self._places = {group: place for place, group in enumerate(order)}
        self._to_load = len(self._residents.unread)
        self._gpu_to_load = self._residents.unread_for_gpu
        self._staged: deque[tuple[GroupId, Slot]] = deque()
        self._held: deque[tuple[int, Line, Slot]] = deque()
        self.next_step = 0
        self._entered = -1
        self._on_loaded, self._on_starved = on_loaded, on_starved
        self.loaded_at_s: float | None = None

    # -- the reader's side

    def claim_read(self) -> ReadJob | None:
        """A read that has room now: residents and streamed groups in the order of the first pass, one sweep.

        A streamed group without room is passed over, and so is a resident; both come first again at the next claim.
        """
        unread, line = self._residents.unread, self._next_streamed()
        if line is not None and (not unread or line.step < self._places[unread[0]]):
            group, step = line.group, line.step
            return ReadJob(group, step, line.start())
        return self._residents.claim()

    def _next_streamed(self) -> Line | None:
        """The line whose next group may be read from the SSD now."""
        if not self._residents.unread_for_gpu:  # before that nothing has been kept: see _can_read
            self._pin_retained(self._to_cpu.values())
        return choose(self._to_cpu.values(), self._can_read, self._settings)

    def _can_read(self, line: Line) -> bool:
        step, loading = line.step, self._residents.unread_for_gpu
        room = line.pool.has_empty(2) if loading else line.pool.has_room()
        if not room or line.ahead >= self._plan.read_ahead_layers or (loading and step >= len(self._order)):
            return False
        if not self._settings.cpu_rolling_mode:
            return step <= self._entered
        pass_now = max(self._entered, 0) // len(self._order)
        return self._settings.cpu_wrap_around or step // len(self._order) <= pass_now

    def resident_arrived(self) -> None:
        """All bytes of a resident's read are in their slot, to be checked: the next may be on its way."""
        with self._lock:
            self._residents.arrived()
            self._wake()

    def read_done(self, job: ReadJob) -> None:
        """All bytes of a read are in their slot, and right."""
        with self._lock:
            job.destination.state = "ready"
            if job.step is not None:
                self._to_cpu[job.group.kind].fetched += 1
            elif job.group in self._gpu_homes:
                self._staged.append((job.group, job.destination))
            else:
                self._loaded(job.group)
            self._wake()

    # -- the pager's side

    def next_copy(self) -> CopyJob | None:
        """Wait for a copy that can be queued now and claim it; None once closing."""
        starved_since: float | None = None

        def claim() -> CopyJob | None:
            nonlocal starved_since
            if starved_since is not None:
                self._on_starved(starved_since, time.perf_counter())
            job = self._resident_copy() or self._streamed_copy()
            starved_since = time.perf_counter() if job is None and self._starved() else None
            return job

        return self.next(claim)

    def _starved(self) -> bool:
        """Whether the link could copy if only the bytes were there."""
        return any(line.pool.has_room() and not self._is_there(line.group) for line in self._to_gpu.values())

    def _resident_copy(self) -> CopyJob | None:
        if not self._staged:
            return None
        group, source = self._staged.popleft()
        source.state = "in_use"
        return CopyJob(group, None, source, self._gpu_homes[group], last=self._gpu_to_load == 1)

    def _streamed_copy(self) -> CopyJob | None:
        self._pin_retained(self._to_gpu.values())
        line = choose(self._to_gpu.values(), self._can_copy, self._settings)
        if line is None:
            return None
        group, step, source = line.group, line.step, self._cpu_slot(line.group)
        assert source is not None
        assert source.group == group  # a tenant that was ready has been copied before
        source.state = "in_use"
        return CopyJob(group, step, source, line.start())

    def _can_copy(self, line: Line) -> bool:
        return self._is_there(line.group) and line.pool.has_room()

    def _is_there(self, group: GroupId) -> bool:
        """Whether a group can be copied from CPU memory."""
        slot = self._cpu_slot(group)
        return slot is not None and slot.state == "ready"

    def _cpu_slot(self, group: GroupId) -> Slot | None:
        home = self._cpu_homes.get(group)
        return home if home is not None else self._cpu_pools[group.kind].find(group)

    def copy_queued(self, job: CopyJob, end: Event) -> None:
        """The copy is queued up to its event ``end``."""
        with self._lock:
            job.destination.filled, job.destination.state = end, "ready"
            job.source.drained = end
            if job.step is None:
                self._residents.passed(job)
                self._gpu_to_load -= 1
                self._loaded(job.group)
            else:
                self._to_gpu[job.group.kind].fetched += 1
                if job.group in self._cpu_homes:
                    job.source.state = "ready"
                else:
                    self._held.append((job.step, self._to_cpu[job.group.kind], job.source))
                    self._free_passed()
            self._wake()

    # -- the computation's side

    def expected(self) -> GroupId:
        """The group that the pass order has next."""
        return self._order[self.next_step % len(self._order)]

    def enter(self) -> tuple[int, Slot]:
        """Step on to the expected group; wait until its copy has been queued and its event recorded."""
        with self._lock:
            step, group = self.next_step, self.expected()
            self._entered = step
            if self._to_cpu:
                self._free_passed()
                self._wake()

        def take() -> Slot | None:
            # No wait uses anything up, so one that was interrupted can simply be entered again.
            if group in self._gpu_homes:
                slot: Slot | None = self._gpu_homes[group]
                if slot is None or slot.filled is None:
                    return None
            else:
                line = self._to_gpu[group.kind]
                if line.fetched <= line.used:
                    return None
                slot = line.pool.find(group)
                assert slot is not None
                line.used += 1
            self.next_step, slot.state = step + 1, "in_use"
            return slot

        return step, self._wait(take)

    def enter_all(self) -> tuple[int, Homes]:
        """Step over a whole pass whose groups are all resident, once they are there; its first step and their slots."""
        self.wait_loaded()
        with self._lock:
            step = self.next_step
            self._entered = step + len(self._order) - 1
            self.next_step = self._entered + 1
            return step, self._gpu_homes

    def leave(self, group: GroupId, slot: Slot, done: Event) -> None:
        """The computation on ``slot`` is queued up to its event ``done``."""
        with self._lock:
            if group in self._gpu_homes:
                slot.state = "ready"
                return
            slot.drained = done
            self._gpu_pools[group.kind].free(slot)
            self._wake()

    # -- shared pieces

    def _free_passed(self) -> None:
        """Free the CPU slots that were copied out and, with WSM_CPU_ROLL_SYNC, whose layer has been entered."""
        kept: deque[tuple[int, Line, Slot]] = deque()
        for step, line, slot in self._held:
            if self._settings.cpu_roll_sync and step - step % len(KINDS) > self._entered:
                kept.append((step, line, slot))
            else:
                line.pool.free(slot)
                line.used += 1
        self._held = kept

    def _pin_retained(self, lines: Iterable[Line]) -> None:
        """Where the next group of a kind is still in a free slot, take it without moving a byte."""
        for line in lines:
            while line.pool.keeps(line.group):
                line.pin()
                self._wake()

    def _loaded(self, group: GroupId) -> None:
        self._to_load -= 1
        if self._to_load == 0:
            self.loaded_at_s = time.perf_counter()
        if self._on_loaded is not None:
            self._on_loaded(group)

    def loaded(self) -> bool:
        """Whether every resident is in its tier."""
        return self._to_load == 0

    def wanted_groups(self) -> int:
        """Slots that are to be filled ahead of the computation and whose copy has not been queued."""
        with self._lock:
            slots = [slot for pool in self._gpu_pools.values() for slot in pool.slots]
            return sum(slot.state in ("absent", "loading") for slot in slots)

    def wait_loaded(self) -> None:
        """Wait until every resident is in its tier."""
        self._wait(lambda: self.loaded() or None)

    def wait_staged(self) -> None:
        """Wait until the plan's warm-up layers are on the GPU, as far as they come unasked."""
        layers = self._plan.staged_layers
        if not self._settings.cpu_rolling_mode:
            layers = min([layers, *self._plan.residency.ssd])
        resident = [slot for group, slot in self._gpu_homes.items() if group.layer < layers]

        def staged(line: Line) -> bool:
            wanted = min(sum(group.layer < layers for group in line.groups), len(line.pool.slots))
            return line.fetched - line.used >= wanted

        def all_staged() -> bool | None:
            resident_there = all(slot.filled is not None for slot in resident)
            return (resident_there and all(map(staged, self._to_gpu.values()))) or None

        self._wait(all_staged)

    def describe(self) -> str:
        """One line: what the pools of each tier hold (``*`` in use, ``…`` loading)."""
        with self._lock:
            gpu, cpu = _names(self._gpu_pools), _names(self._cpu_pools)
            heads = sorted(line.group for line in self._to_cpu.values())
        residency = self._plan.residency
        return (
            f"GPU: {gpu} (+{len(residency.gpu)} resident layers) | CPU: {cpu} (+{len(residency.cpu)} resident layers)"
            f" | SSD: next {' '.join(map(str, heads)) or '-'}"
        )


def _names(pools: Pools) -> str:
    """The groups that the slots hold, in pass order."""
    marks = {"in_use": "*", "loading": "…", "ready": "", "absent": ""}
    held = sorted((slot.group, slot.state) for pool in pools.values() for slot in pool.slots if slot.group is not None)
    return " ".join(f"{group}{marks[state]}" for group, state in held) or "-"
