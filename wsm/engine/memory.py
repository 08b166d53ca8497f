"""All memory that the weights of a plan take: page-locked arenas, the slots in them, and those on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wsm import stop
from wsm.engine.arena import PageLockedArena
from wsm.engine.device import Device, Event
from wsm.engine.slots import Homes, Pool, Pools, Slot
from wsm.layout.groups import KINDS, GroupId, GroupLayout, Kind, decoded_layout, pass_order, views, without
from wsm.plan.placement import Placement, cpu_home_bytes
from wsm.settings import Settings
from wsm.store.source import GroupSource


class WeightMemory:
    """Taken whole when it is made; given back by :meth:`close`, and where making it fails.

    Homes are the residents' own buffers, pools the slots that streamed groups pass through; GPU residents come through
    ``loading_pools`` where there is no other CPU memory. Raises DoesNotFit if the CPU memory is refused (the device's
    own out-of-memory error passes through). ``decoded_from`` is what residents are decoded out of, None where they are
    not.

    Args:
        source: says how large groups are, and reads the globals.
        kept_on_cpu: the global tensor that stays in page-locked CPU memory, from where the device reads it.
    """

    def __init__(
        self, plan: Placement, source: GroupSource, device: Device, settings: Settings, kept_on_cpu: str | None
    ) -> None:
        self._source, self._device, self._kept_on_cpu = source, device, kept_on_cpu
        self._decoded = plan.decoded
        self._arenas: list[PageLockedArena] = []
        self.page_locked_peak_bytes = 0
        self.populate_s = self.page_lock_s = 0.0
        try:
            self._allocate(plan, settings)
        except BaseException:
            self._free_arenas()
            raise

    def _allocate(self, plan: Placement, settings: Settings) -> None:
        order, residency = pass_order(plan.residency.n_layers), plan.residency
        layer_bytes = sum(self._source.slot_bytes(kind) for kind in KINDS)
        homes = cpu_home_bytes(plan, {group: self._source.layout(group) for group in order})
        arena = self._new_arena(sum(homes.values()) + plan.cpu_slots * layer_bytes)
        self._loading = self._new_arena(plan.loading_slots * layer_bytes)
        kept = (tensor.nbytes for tensor in self._source.layout(None).tensors if tensor.name == self._kept_on_cpu)
        self._embedding = self._new_arena(sum(kept))
        on_gpu = [group for group in order if group.layer in set(residency.gpu)]
        self.gpu_homes: Homes = {g: Slot(self._gpu_buffer(self.gpu_layout(g).nbytes), g) for g in on_gpu}
        self.gpu_pools: Pools = {
            kind: Pool(
                (self._gpu_buffer(self._source.slot_bytes(kind)) for _ in range(plan.gpu_slots)),
                retain=not settings.evict_finished,
            )
            for kind in KINDS
            if plan.gpu_slots
        }
        largest = max(self._source.slot_bytes(kind) for kind in KINDS)
        self.decoded_from = self._gpu_buffer(largest) if plan.decoded else None
        self.cpu_pools: Pools = self._pools_in(arena, plan.cpu_slots, retain=settings.cpu_evict == "fifo")
        self.cpu_homes: Homes = {g: Slot(arena.take(nbytes), g) for g, nbytes in homes.items()}
        self.loading_pools: Pools = self._pools_in(self._loading, plan.loading_slots, retain=False)

    def _new_arena(self, nbytes: int) -> PageLockedArena:
        arena = PageLockedArena(nbytes, self._device)
        self._arenas.append(arena)
        self.populate_s += arena.populate_s
        self.page_lock_s += arena.register_s
        self.page_locked_peak_bytes = max(self.page_locked_peak_bytes, self.page_locked_bytes)
        return arena

    def gpu_layout(self, group: GroupId) -> GroupLayout:
        """How a group lies on the device."""
        layout = self._source.layout(group)
        return decoded_layout(layout) if self._decoded else layout

    def _gpu_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device.torch_device)

    def _pools_in(self, arena: PageLockedArena, slots: int, *, retain: bool) -> dict[Kind, Pool]:
        return {
            kind: Pool([arena.take(self._source.slot_bytes(kind)) for _ in range(slots)], retain=retain)
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
        """The largest CPU and device memory there is, both ``uint8``, for a probe before anything is loaded."""
        on_gpu = (slot.buffer for slot in _slots(self.gpu_homes, self.gpu_pools))
        arenas = (arena.whole for arena in self._arenas)
        return max(arenas, key=lambda memory: memory.nbytes), max(on_gpu, key=lambda buffer: buffer.nbytes)

    def load_globals(self) -> Mapping[str, Tensor]:
        """Embedding, final norm and head on the device, read through any arena that is large enough.

        Raises StoreError or UnusableInput if they cannot be read.
        """
        layout, device = self._source.layout(None), self._device
        own = next((arena for arena in self._arenas if arena.nbytes >= layout.nbytes), None)
        arena = own or self._new_arena(layout.nbytes)
        image = arena.whole[: layout.nbytes]
        stop.beside(lambda: self._source.read(None, image).checked.result())
        kept = without(layout, self._kept_on_cpu) if self._kept_on_cpu else layout
        on_device = views(torch.empty(kept.nbytes, dtype=torch.uint8, device=device.torch_device), kept)
        stream = device.stream()
        for name, tensor in views(image, layout).items():
            if name in on_device:
                device.copy(on_device[name], tensor, stream)
            else:
                self._embedding.whole[: tensor.nbytes].copy_(tensor.view(-1).view(torch.uint8))
                mapped = device.mapped(self._embedding.whole)[: tensor.nbytes]
                on_device[name] = mapped.view(tensor.dtype).view(tensor.shape)
        device.record(stream).synchronize()
        if own is None:
            self._drop(arena)
        return on_device

    def drop_loading(self, end: Event) -> None:
        """Give back what only the loading of residents needed, after ``end`` of the last copy out of it."""
        if self._loading.nbytes or self.decoded_from is not None:
            end.synchronize()
        self.decoded_from = None
        if self._loading.nbytes:
            self._drop(self._loading)

    def _drop(self, arena: PageLockedArena) -> None:
        self._arenas.remove(arena)
        arena.close()

    def _free_arenas(self) -> None:
        for arena in list(self._arenas):
            self._drop(arena)

    def close(self) -> None:
        """Free every page, and let go of the device's memory: nobody may use a slot any more."""
        self._free_arenas()
        on_gpu, on_cpu = _slots(self.gpu_homes, self.gpu_pools), _slots(self.cpu_homes, self.cpu_pools)
        for slot in (*on_gpu, *on_cpu, *_slots({}, self.loading_pools)):
            slot.buffer = torch.empty(0, dtype=torch.uint8)
        self.decoded_from = None


def _slots(homes: Homes, pools: Pools) -> list[Slot]:
    return [*homes.values(), *(slot for pool in pools.values() for slot in pool.slots)]
