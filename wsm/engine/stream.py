"""The whole algorithm: what streams is read ahead, copied ahead, acquired, used and freed, all at the same time.

    reader thread   SSD -> CPU slot       _read_ahead   as far ahead as CPU slots are free
    pager thread    CPU slot -> GPU slot  _copy_ahead   as far ahead as GPU slots are free
    computation     GPU slot              _use          one group after the other

Each asks :class:`Tiers` for its next job, which comes when a slot is free for it and the bytes are in the tier above.
Then it waits for the slot's last user, has the bytes moved (by threads of the source, or on a stream of the device) and
tells :class:`Tiers`: the group is ready for the next of the three, and the slot that it came from is free again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from wsm.engine.device import PIECE_BYTES, Device, Event, Link
from wsm.engine.memory import WeightMemory
from wsm.engine.slots import CopyJob, ReadJob, Slot
from wsm.engine.telemetry import Telemetry
from wsm.engine.threads import Threaded
from wsm.engine.tiers import Tiers
from wsm.layout.groups import KINDS, GroupId, pass_order, views
from wsm.plan.placement import Placement
from wsm.settings import Settings
from wsm.store.source import ChunkRead, GroupSource


class WeightStreamingManager(Threaded):
    """Pages weights SSD -> page-locked CPU memory -> GPU ahead of the computation; a ``WeightSource`` for the model.

    Construction takes all the memory of the plan; :meth:`start` begins to load. Use as a context manager, or call
    :meth:`close`: it joins every thread and gives every page back.

    Raises DoesNotFit as :class:`WeightMemory`. From :meth:`start` on, ``globals`` are the embedding, the final norm and
    the head on the compute device.

    Args:
        source: where group images come from; closed with the manager.
        link: shared with whatever else copies to the device.
        kept_on_cpu: see :class:`WeightMemory`.
        on_layer: called with a line about the tiers once a layer, from the computing thread.
        on_loaded: called with each resident group once it is in its tier, from a thread of the manager.
    """

    def __init__(
        self,
        plan: Placement,
        source: GroupSource,
        device: Device,
        settings: Settings,
        telemetry: Telemetry,
        link: Link | None = None,
        *,
        kept_on_cpu: str | None = None,
        on_layer: Callable[[str], None] | None = None,
        on_loaded: Callable[[GroupId], None] | None = None,
    ) -> None:
        self.plan, self.source, self.telemetry = plan, source, telemetry
        self.n_layers = plan.residency.n_layers
        self.order = pass_order(self.n_layers)
        self.memory = WeightMemory(plan, source, device, settings, kept_on_cpu)
        try:
            self.tiers = Tiers(plan, settings, self.order, self.memory, telemetry.link_starved, self._tell_loaded)
        except BaseException:
            self.memory.close()
            raise
        super().__init__(self.tiers, device)
        self._link, self._on_layer, self._on_loaded = link or Link(), on_layer, on_loaded
        self._known = frozenset(self.order)
        self._views: dict[tuple[int, GroupId], dict[str, Tensor]] = {}
        self._together: dict[GroupId, dict[str, Tensor]] | None = None
        self.globals: Mapping[str, Tensor] = {}
        self.globals_s = 0.0

    # -- read ahead

    def _read_ahead(self) -> None:
        while (job := self.tiers.next(self.tiers.claim_read)) is not None:
            if job.destination.drained is not None:
                job.destination.drained.synchronize()  # the slot's last copy to the GPU
            read = self.source.read(job.group, job.destination.buffer)
            if job.step is None:
                read.arrived.add_done_callback(lambda _: self._guard(self.tiers.resident_arrived))
            read.checked.add_done_callback(partial(self._tell_read, job, read.chunks))

    def _tell_read(self, job: ReadJob, chunks: Sequence[ChunkRead], checked: Future[None]) -> None:
        def tell() -> None:
            self.telemetry.read_done(job.group, job.step, chunks)
            checked.result()  # raises what the read failed with
            self.tiers.read_done(job)

        self._guard(tell)

    def _tell_loaded(self, group: GroupId) -> None:
        self.telemetry.loading = not self.tiers.loaded()
        if self._on_loaded is not None:
            self._on_loaded(group)

    # -- copy ahead

    def _copy_ahead(self) -> None:
        stream = self.device.stream()
        while (job := self.tiers.next_copy()) is not None:
            if job.destination.drained is not None:
                self.device.wait(stream, job.destination.drained)  # the slot's last computation
            end = self._queue_pieces(job, stream)
            if job.last:
                self.memory.drop_loading(end)  # before it counts as loaded: the clock may start then
            self.tiers.copy_queued(job, end)

    def _queue_pieces(self, job: CopyJob, stream: object) -> Event:
        """Queue one group's copy in pieces, each in its turn on the link; the event behind the last one.

        Pieces make one record until the host finds, when it queues the next, another's piece or nothing before it.
        """
        nbytes = self.source.layout(job.group).nbytes
        needed_at = -1 if job.step is None else job.step
        start, end, first = None, None, 0
        for offset in range(0, nbytes, PIECE_BYTES):
            piece = slice(offset, min(offset + PIECE_BYTES, nbytes))
            with self._link.turn(needed_at) as ahead:
                if end is None or ahead is not end:
                    self.telemetry.copied(job.group, job.step, offset - first, start, end)
                    start, first = self.telemetry.mark(stream), offset
                self.device.copy(job.destination.buffer[piece], job.source.buffer[piece], stream)
                end = self.device.record(stream)
                self._link.queued(end)
        assert end is not None
        self.telemetry.copied(job.group, job.step, nbytes - first, start, end)
        return end

    # -- acquire, use, free

    @contextmanager
    def acquire(self, group: GroupId) -> Iterator[Mapping[str, Tensor]]:
        """The weights of ``group`` on the compute device, until the block ends.

        Groups are asked for in pass order; where a pass was broken off, the rest of it is passed over first.
        Waits on the host until the copy is queued, then makes the compute stream wait for it: no synchronisation.
        Raises whatever failed on a thread of the manager (see :meth:`SharedState._wait`), and ValueError for a group
        that the model does not have.
        """
        if group not in self._known:
            raise ValueError(f"{group} is no group of a model of {self.n_layers} layers")
        self._pass_over_to(group)
        with self._use(group) as weights:
            if self._on_layer is not None and group.kind == KINDS[0]:
                self._on_layer(self.tiers.describe())
            yield weights

    def _pass_over_to(self, group: GroupId) -> None:
        while (expected := self.tiers.expected()) != group:
            with self._use(expected):
                pass

    @contextmanager
    def _use(self, group: GroupId) -> Iterator[Mapping[str, Tensor]]:
        stream = self.device.compute_stream()
        asked = self.telemetry.mark(stream)
        step, slot = self.tiers.enter()
        try:
            assert slot.filled is not None
            self.device.wait(stream, slot.filled)  # the group's copy
            granted = self.telemetry.mark(stream)
            yield self._tensors(slot, group)
        finally:
            done = self.device.record(stream)
            self.tiers.leave(group, slot, done)
        self.telemetry.used(group, step, asked, granted, done)

    def _tensors(self, slot: Slot, group: GroupId) -> dict[str, Tensor]:
        key = id(slot), group
        if key not in self._views:
            self._views[key] = views(slot.buffer, self.source.layout(group))
        return self._views[key]

    @property
    def resident(self) -> bool:
        """Whether every group stays on the compute device."""
        return self.plan.residency.streamed_layers == 0

    @contextmanager
    def acquire_all(self) -> Iterator[Mapping[GroupId, Mapping[str, Tensor]]]:
        """The weights of a whole pass at once, where all are ``resident``; one record in the telemetry.

        Raises as :meth:`acquire`, and ValueError where some group passes through a slot.
        """
        if not self.resident:
            raise ValueError("only resident groups can be had all at once")
        self._pass_over_to(self.order[0])
        asked = self.telemetry.mark()
        step, slots = self.tiers.enter_all()
        if self._together is None:
            for slot in slots.values():
                assert slot.filled is not None
                slot.filled.synchronize()  # once: later passes have nothing to wait for, on whatever stream
            self._together = {group: self._tensors(slot, group) for group, slot in slots.items()}
        granted = self.telemetry.mark()
        try:
            yield self._together
        finally:
            self.telemetry.used(None, step, asked, granted, self.telemetry.mark())

    # -- life

    def start(self) -> None:
        """Load the globals, then let the reader and the pager run."""
        began = time.perf_counter()
        self.globals = self.memory.load_globals()
        self._started_at_s = time.perf_counter()
        self.telemetry.loading = not self.tiers.loaded()
        self.globals_s = self._started_at_s - began
        self._begin({"wsm-pager": self._copy_ahead, "wsm-reader": self._read_ahead})

    @property
    def residents_s(self) -> float | None:
        """Seconds from the start of the threads until every resident was in its tier; None before that."""
        loaded_at = self.tiers.loaded_at_s
        return None if loaded_at is None else loaded_at - self._started_at_s

    def stop(self) -> None:
        """Fetch nothing more and join every thread. The telemetry is complete after it; nothing can be acquired."""
        try:
            super().stop()
        finally:
            self.source.close()

    def _free_memory(self) -> None:
        self.globals, self._together = {}, None
        self._views.clear()
        self.memory.close()
