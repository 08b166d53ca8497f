"""The weight streaming manager: hands a model its weights, group by group, wherever they lie."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType

import torch
from torch import Tensor

from wsm.engine.arena import PageLockedArena
from wsm.engine.device import Device, Event
from wsm.engine.jobs import CopyJob, ReadJob
from wsm.engine.link import PIECE_BYTES, Link
from wsm.engine.pool import Pool, Slot
from wsm.engine.telemetry import Telemetry
from wsm.engine.tiers import Tiers
from wsm.layout.groups import KINDS, GroupId, Kind, pass_order, views, without
from wsm.plan.placement import Placement
from wsm.settings import Settings
from wsm.store.source import GroupSource, read_blocking


class WeightStreamingManager:
    """Pages weights SSD -> page-locked CPU memory -> GPU ahead of the computation; a ``WeightSource`` for the model.

    Construction takes all the memory of the plan; :meth:`start` begins to load. Use as a context manager, or call
    :meth:`close`: it joins every thread and gives every page back.

    Args:
        plan: what is resident where, and the sizes of the pools.
        source: where group images come from; closed with the manager.
        device: the compute device.
        telemetry: receives every transfer and stall.
        link: shared with whatever else copies to the device.
        kept_on_cpu: the global tensor that stays in page-locked CPU memory, from where the device reads it.
        on_layer: called with a line about the tiers once a layer, from the computing thread.
        on_loaded: called with each resident group once it is in its tier, from a thread of the manager.

    Raises:
        DoesNotFit: if the CPU memory is refused (the device's own out-of-memory error passes through).
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
        self.plan, self.source, self.device, self.telemetry = plan, source, device, telemetry
        self.n_layers = plan.residency.n_layers
        self.order = pass_order(self.n_layers)
        self._known = frozenset(self.order)
        self.link = link or Link()
        self._kept_on_cpu = kept_on_cpu
        self._on_layer = on_layer
        self._threads: list[threading.Thread] = []
        self._views: dict[tuple[int, GroupId], dict[str, Tensor]] = {}
        self._globals: dict[str, Tensor] = {}
        self._together: dict[GroupId, dict[str, Tensor]] | None = None
        self.globals_s = 0.0
        self._arenas: list[PageLockedArena] = []
        self.page_locked_peak_bytes = 0
        self.numa_node: int | None = None
        self.populate_s = self.page_lock_s = 0.0
        try:
            self._tiers = self._allocate(settings)
        except BaseException:
            self._free_memory()
            raise
        self._tiers.on_loaded = on_loaded
        self._tiers.on_starved = telemetry.link_starved

    # -- memory

    def _allocate(self, settings: Settings) -> Tiers:
        plan, residency = self.plan, self.plan.residency
        layer_bytes = sum(self.source.slot_bytes(kind) for kind in KINDS)
        self.arena = self._new_arena((len(residency.cpu) + plan.cpu_slots) * layer_bytes)
        self._loading = self._new_arena(plan.loading_slots * layer_bytes)
        self._embedding = self._new_arena(self._embedding_bytes)
        gpu_homes = {g: Slot(self._gpu_buffer(g.kind), g) for g in self.order if g.layer in set(residency.gpu)}
        gpu_pools = {
            kind: Pool((self._gpu_buffer(kind) for _ in range(plan.gpu_slots)), retain=not settings.evict_finished)
            for kind in KINDS
            if plan.gpu_slots
        }
        cpu_pools = self._cpu_pools(self.arena, plan.cpu_slots, retain=settings.cpu_evict == "fifo")
        cpu_homes = {
            g: Slot(self.arena.take(self.source.slot_bytes(g.kind)), g)
            for g in self.order
            if g.layer in set(residency.cpu)
        }
        return Tiers(
            plan,
            settings,
            self.order,
            gpu_homes=gpu_homes,
            cpu_homes=cpu_homes,
            gpu_pools=gpu_pools,
            cpu_pools=cpu_pools,
            loading_pools=self._cpu_pools(self._loading, plan.loading_slots, retain=False),
        )

    @property
    def _embedding_bytes(self) -> int:
        """Bytes of the global that stays in CPU memory."""
        return sum(tensor.nbytes for tensor in self.source.layout(None).tensors if tensor.name == self._kept_on_cpu)

    def _new_arena(self, nbytes: int) -> PageLockedArena:
        arena = PageLockedArena(nbytes, self.device)
        self._arenas.append(arena)
        self.numa_node = self.numa_node if arena.numa_node is None else arena.numa_node
        self.populate_s += arena.populate_s
        self.page_lock_s += arena.register_s
        self.page_locked_peak_bytes = max(self.page_locked_peak_bytes, self.page_locked_bytes)
        return arena

    def _gpu_buffer(self, kind: Kind) -> Tensor:
        return torch.empty(self.source.slot_bytes(kind), dtype=torch.uint8, device=self.device.torch_device)

    def _cpu_pools(self, arena: PageLockedArena, slots: int, *, retain: bool) -> dict[Kind, Pool]:
        return {
            kind: Pool([arena.take(self.source.slot_bytes(kind)) for _ in range(slots)], retain=retain)
            for kind in KINDS
            if slots
        }

    @property
    def page_locked_bytes(self) -> int:
        """CPU memory held now, loading buffers included."""
        return sum(arena.nbytes for arena in self._arenas)

    @property
    def warnings(self) -> list[str]:
        """What went worse than it could while memory was taken."""
        return list(dict.fromkeys(warning for arena in self._arenas for warning in arena.warnings))

    def scratch(self) -> tuple[Tensor, Tensor]:
        """Page-locked CPU memory and a buffer on the device, for a probe before :meth:`start`; both ``uint8``."""
        largest = max(self._arenas, key=lambda arena: arena.nbytes)
        return largest.whole(), self._tiers.device_buffer()

    # -- life

    def start(self) -> None:
        """Load the globals, then let the reader and the pager run."""
        self._load_globals()
        self.source.on_read = self.telemetry.chunk_read
        self._started_at_s = time.perf_counter()
        for name, work in (("wsm-pager", self._page), ("wsm-reader", self._read)):
            thread = threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def wait_loaded(self) -> None:
        """Block until every resident is in its tier."""
        self._tiers.wait_loaded()

    def loaded(self) -> bool:
        """Whether every resident is in its tier."""
        return self._tiers.loaded()

    @property
    def residents_s(self) -> float | None:
        """Seconds from the start of the threads until every resident was in its tier; None before that."""
        loaded_at = self._tiers.loaded_at_s
        return None if loaded_at is None else loaded_at - self._started_at_s

    def wanted_groups(self) -> int:
        """Groups that are wanted on the GPU and whose copy has not been queued."""
        return self._tiers.wanted_groups()

    def stage(self) -> None:
        """Block until the plan's warm-up layers are on the GPU."""
        self._tiers.wait_staged(self.plan.staged_layers)

    def _load_globals(self) -> None:
        started = time.perf_counter()
        layout = self.source.layout(None)
        own = next((arena for arena in self._arenas if arena.nbytes >= layout.nbytes), None)
        arena = own or self._new_arena(layout.nbytes)
        image = arena.whole()[: layout.nbytes]
        read_blocking(self.source, None, image)
        kept = without(layout, self._kept_on_cpu) if self._kept_on_cpu else layout
        on_device = views(torch.empty(kept.nbytes, dtype=torch.uint8, device=self.device.torch_device), kept)
        stream = self.device.stream()
        for name, tensor in views(image, layout).items():
            if name in on_device:
                self.device.copy(on_device[name], tensor, stream)
            else:
                self._embedding.whole()[: tensor.nbytes].copy_(tensor.view(-1).view(torch.uint8))
                mapped = self.device.mapped(self._embedding.whole())[: tensor.nbytes]
                on_device[name] = mapped.view(tensor.dtype).view(tensor.shape)
        self.device.record(stream).synchronize()
        if own is None:
            self._drop(arena)
        self._globals = on_device
        self.globals_s = time.perf_counter() - started

    def _drop(self, arena: PageLockedArena) -> None:
        self._arenas.remove(arena)
        arena.close()

    def _free_memory(self) -> None:
        for arena in list(self._arenas):
            self._drop(arena)

    def stop(self) -> None:
        """Fetch nothing more and join every thread. The telemetry is complete after it; nothing can be acquired."""
        self._tiers.close()
        self.source.close()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self.device.synchronize()

    def close(self) -> None:
        """Stop, and free every page. May be called twice, and after a failure."""
        try:
            self.stop()
        finally:
            self._free_memory()
        self._globals, self._together = {}, None
        self._views.clear()
        self._tiers.release()

    def __enter__(self) -> WeightStreamingManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the model's side

    @property
    def globals(self) -> Mapping[str, Tensor]:
        """Embedding, final norm and head on the compute device."""
        return self._globals

    @property
    def next_step(self) -> int:
        """The place in the endless pass order that :meth:`acquire` has next."""
        return self._tiers.next_step

    @contextmanager
    def acquire(self, group: GroupId) -> Iterator[Mapping[str, Tensor]]:
        """The weights of ``group`` on the compute device, until the block ends.

        Groups are asked for in pass order; where a pass was broken off, the rest of it is passed over first.
        Waits on the host until the copy is queued, then makes the compute stream wait for it: no synchronisation.

        Raises:
            StoreError, DoesNotFit, RuntimeError: whatever failed on a thread of the manager, as the cause.
        """
        if group not in self._known:
            raise ValueError(f"{group} is no group of a model of {self.n_layers} layers")
        while self._tiers.expected() != group:
            with self._hold(self._tiers.expected()):
                pass
        with self._hold(group) as weights:
            if self._on_layer is not None and group.kind == KINDS[0]:
                self._on_layer(self._tiers.describe())
            yield weights

    @property
    def resident(self) -> bool:
        """Whether every group stays on the compute device."""
        return self.plan.residency.streamed_layers == 0

    @contextmanager
    def acquire_all(self) -> Iterator[Mapping[GroupId, Mapping[str, Tensor]]]:
        """The weights of a whole pass at once, where all are ``resident``; one record in the telemetry.

        Raises:
            ValueError: where some group passes through a slot.
            StoreError, DoesNotFit, RuntimeError: as :meth:`acquire`.
        """
        if not self.resident:
            raise ValueError("only resident groups can be had all at once")
        while self._tiers.expected() != self.order[0]:
            with self._hold(self._tiers.expected()):
                pass
        stream = self.device.compute_stream()
        asked = self.telemetry.mark(stream)
        step, slots = self._tiers.enter_all()
        if self._together is None:
            for slot in slots.values():
                assert slot.filled is not None
                slot.filled.synchronize()  # once: later passes have nothing to wait for, on whatever stream
            self._together = {group: self._tensors(slot, group) for group, slot in slots.items()}
        granted = self.telemetry.mark(stream)
        try:
            yield self._together
        finally:
            self.telemetry.used(None, step, asked, granted, self.telemetry.mark(stream))

    @contextmanager
    def _hold(self, group: GroupId) -> Iterator[Mapping[str, Tensor]]:
        stream = self.device.compute_stream()
        asked = self.telemetry.mark(stream)
        step, slot = self._tiers.enter()
        try:
            assert slot.filled is not None
            self.device.wait(stream, slot.filled)
            granted = self.telemetry.mark(stream)
            yield self._tensors(slot, group)
        finally:
            done = self.device.record(stream)
            self._tiers.leave(group, slot, done)
        self.telemetry.used(group, step, asked, granted, done)

    def _tensors(self, slot: Slot, group: GroupId) -> dict[str, Tensor]:
        key = id(slot), group
        if key not in self._views:
            self._views[key] = views(slot.buffer, self.source.layout(group))
        return self._views[key]

    # -- the threads

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            self.device.enter_thread()
            work()
        except BaseException as error:
            self._tiers.fail(error)

    def _read(self) -> None:
        while (job := self._tiers.next_read()) is not None:
            if job.destination.drained is not None:
                job.destination.drained.synchronize()
            self.telemetry.read_queued(job.group, job.step)
            self.source.read(job.group, job.destination.buffer, self._on_read(job), partial(self._tiers.arrived, job))

    def _on_read(self, job: ReadJob) -> Callable[[BaseException | None], None]:
        def done(failure: BaseException | None) -> None:
            try:
                self.telemetry.read_done(job.group)
                self._tiers.read(job, failure)
            except BaseException as error:  # of ``on_loaded``
                self._tiers.fail(error)

        return done

    def _page(self) -> None:
        stream = self.device.stream()
        while (job := self._tiers.next_copy()) is not None:
            end = self._copy(job, stream)
            if self._loading.nbytes and self._tiers.last_resident(job):
                end.synchronize()  # before it counts as loaded: the clock may start then
                self._drop(self._loading)
            self._tiers.copied(job, end)

    def _copy(self, job: CopyJob, stream: object) -> Event:
        """Queue one group's copy in pieces, each in its turn on the link; the event behind the last one.

        Pieces make one record as long as nothing comes between them: neither another's piece nor time without work, as
        far as the host sees it when it queues the next.
        """
        if job.destination.drained is not None:
            self.device.wait(stream, job.destination.drained)
        nbytes = self.source.layout(job.group).nbytes
        needed_at = -1 if job.step is None else job.step
        start, end, first = None, None, 0
        for offset in range(0, nbytes, PIECE_BYTES):
            piece = slice(offset, min(offset + PIECE_BYTES, nbytes))
            with self.link.turn(needed_at) as ahead:
                if end is None or ahead is not end:
                    self.telemetry.copied(job.group, job.step, offset - first, start, end)
                    start, first = self.telemetry.mark(stream), offset
                self.device.copy(job.destination.buffer[piece], job.source.buffer[piece], stream)
                end = self.device.record(stream)
                self.link.queued(end)
        assert end is not None
        self.telemetry.copied(job.group, job.step, nbytes - first, start, end)
        return end
