"""How much KV stays on the device, and where the rest goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

from wsm.layout.groups import BLOCK, round_up
from wsm.layout.kv import KV_BLOCK_TOKENS, WINDOWS, KVLayout, KVPlacement, Unit
from wsm.plan.hardware import MIB
from wsm.plan.inputs import PlanInputs
from wsm.plan.memory import MemoryKind, MemoryLine, allocator_bytes
from wsm.plan.placement import spread

DISK_SLOTS = 4
"""Units in page-locked memory between ``--kv-device`` and the GPU: three on their way up (one is read, one waits for
the link, one is copied on), one on its way down."""
KV_WAIT_MS = 0.45
"""How long the link stands still in a decode pass for each layer with KV below the device: fetched, attended to and
written back. 0.42 to 0.55 ms were measured on an H100, with 8 rows and with 32 (docs/LOG.md)."""


@dataclass(frozen=True, slots=True)
class KVCosts:
    """What the tiers of KV take beside it; ``bounds_row_bytes``: of one row and layer, 0 where no blocks are chosen."""

    bounds_row_bytes: int
    on_gpu: bool
    kv_device: str | None

    @classmethod
    def of(cls, inputs: PlanInputs) -> KVCosts:
        layout = inputs.kv_layout(1)
        bounds = math.prod(layout.bounds_shape(1, inputs.config.head_dim)) * inputs.dtype.itemsize
        return cls(bounds if 0 < inputs.topk_blk < layout.blocks else 0, inputs.hardware.has_gpu, inputs.kv_device)

    def on_device(self, nbytes: int) -> int:
        """What a tensor of so many bytes takes of the device."""
        return allocator_bytes(nbytes) if self.on_gpu else nbytes

    def windows(self, layout: KVLayout) -> int:
        """The windows; and small tensors of the choice of blocks and of what is written back."""
        return WINDOWS * self.on_device(layout.window_bytes) + (16 * MIB if self.on_gpu else 0)


def place_kv(layout: KVLayout, gpu_room: int | None, cpu_room: int, costs: KVCosts) -> KVPlacement:
    """All of it on the device if it fits; else as many units as do, spread evenly over the pass, the rest below.

    Below the device, page-locked CPU memory comes first, then ``--kv-device`` if there is one; without it all the
    rest is given to the CPU's memory, whether that has room or not. ``gpu_room`` and ``cpu_room`` are the bytes of each
    budget that nothing else takes; None for no limit.
    """
    everywhere = KVPlacement(layout)
    if gpu_room is None or costs.on_device(everywhere.gpu_bytes) <= gpu_room:
        return everywhere
    unit, fresh, tail = layout.window_bytes, fresh_bytes(layout), tail_bytes(layout, layout.stretch_rows)
    bounds = min(layout.batch, layout.stretch_rows) * costs.bounds_row_bytes
    rounding = 2 * MIB if costs.on_gpu else 0  # the parts that stay are one tensor
    beside = costs.windows(layout) + rounding + len(layout.units()) * bounds
    _, below = _split(layout.units(), min(len(layout.units()) - 1, (gpu_room - beside) // max(1, unit - bounds)))
    if costs.kv_device is None or fresh + len(below) * unit <= cpu_room:
        return KVPlacement(layout, cpu=below)
    room = cpu_room - fresh - DISK_SLOTS * unit - len(below) * tail
    cpu, disk = _split(below, min(len(below), room // max(1, unit - tail)))
    return KVPlacement(layout, cpu=cpu, disk=disk)


def _split(units: Sequence[Unit], stay: int) -> tuple[tuple[Unit, ...], tuple[Unit, ...]]:
    """``stay`` of the units (none if it is negative), spread evenly over them, and the others; both in order."""
    kept = bytearray(len(units))
    for place in spread(range(len(units)), max(0, stay)):
        kept[place] = True
    return tuple(compress(units, kept)), tuple(unit for unit, here in zip(units, kept, strict=True) if not here)


def fresh_bytes(layout: KVLayout) -> int:
    """Page-locked memory for the new tokens of one layer and stretch on their way down."""
    return round_up(layout.stretch_rows * layout.n_kv_heads * layout.token_bytes, BLOCK)


def tail_bytes(layout: KVLayout, rows: int) -> int:
    """Page-locked memory of a unit on ``--kv-device``: the newest block of each row, which grows."""
    return rows * layout.n_kv_heads * layout.block_bytes


def kv_gpu_lines(kv: KVPlacement, costs: KVCosts) -> list[MemoryLine]:
    """What KV takes of the device's memory."""
    layout, on_device = kv.layout, costs.on_device(kv.gpu_bytes)
    if not kv.below:
        return [MemoryLine(MemoryKind.KV, f"KV, {layout.batch} x {layout.tokens} tokens", on_device)]
    whole, rows = len(layout.units()), min(layout.batch, layout.stretch_rows)
    parts = f"KV, {whole - len(kv.below)} of {whole} parts (a layer, {rows} rows)"
    lines = [
        MemoryLine(MemoryKind.KV, parts, on_device),
        MemoryLine(MemoryKind.KV_WINDOWS, f"KV windows, {WINDOWS} parts", costs.windows(layout)),
    ]
    if bounds := layout.rows_in(kv.below) * costs.bounds_row_bytes:
        lines.append(MemoryLine(MemoryKind.KV_BOUNDS, "KV block bounds", bounds))
    return lines


def kv_cpu_lines(kv: KVPlacement) -> list[MemoryLine]:
    """What KV takes of the CPU's memory, all of it page-locked."""
    layout = kv.layout
    if not kv.below:
        return []
    # Each part begins on a page; of some head sizes it does not end on one.
    homes = sum(round_up(layout.unit_bytes(unit), BLOCK) for unit in kv.cpu)
    parts = f"KV, {len(kv.cpu)} of {len(layout.units())} parts"
    lines = [MemoryLine(MemoryKind.KV, parts, homes + fresh_bytes(layout))]
    if kv.disk:
        parts = f"KV on --kv-device, {len(kv.disk)} parts: newest blocks, slots"
        beside = DISK_SLOTS * layout.window_bytes + tail_bytes(layout, layout.rows_in(kv.disk))
        lines.append(MemoryLine(MemoryKind.KV_DISK, parts, beside))
    return lines


def kv_device_bytes(kv: KVPlacement, length: int, topk: int = 0) -> int:
    """Bytes of whole blocks on ``--kv-device`` where every row has ``length`` tokens; with ``topk``, of chosen ones."""
    blocks = length // KV_BLOCK_TOKENS
    if 0 < topk < -(-(length + 1) // KV_BLOCK_TOKENS):
        blocks = topk - 1  # the newest one is in memory
    return kv.layout.rows_in(kv.disk) * kv.layout.n_kv_heads * blocks * kv.layout.block_bytes


def kv_bytes_per_pass(kv: KVPlacement, length: int, topk: int) -> int:
    """Bytes that a decode pass brings to the device where every row has ``length`` tokens."""
    layout = kv.layout
    rows = layout.rows_in(kv.below)
    if 0 < topk < -(-(length + 1) // KV_BLOCK_TOKENS):
        return rows * layout.n_kv_heads * topk * layout.block_bytes
    return rows * sum(run.nbytes for run in layout.runs([length]))
