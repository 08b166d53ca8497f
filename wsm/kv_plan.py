"""How much KV stays on the device, and where the rest goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wsm.budget import MIB, MemoryLine, allocator_bytes
from wsm.groups import BLOCK, round_up
from wsm.kv_layout import KV_BLOCK_TOKENS, WINDOWS, KVLayout, KVPlacement, Unit
from wsm.placement import spread

DISK_SLOTS = 3
"""Units in page-locked memory between ``--kv-device`` and the GPU: two on their way up, one on its way down."""


@dataclass(frozen=True, slots=True)
class KVCosts:
    """What the tiers of KV take beside it.

    ``bounds_row_bytes`` are what the choice of blocks keeps on the device of one row and layer, 0 where none are
    chosen.
    """

    bounds_row_bytes: int
    on_gpu: bool
    kv_device: str | None

    def bounds(self, layout: KVLayout, units: Sequence[Unit]) -> int:
        return sum(len(layout.rows_of(unit.stretch)) for unit in units) * self.bounds_row_bytes


def place_kv(layout: KVLayout, gpu_room: int | None, cpu_room: int, costs: KVCosts) -> KVPlacement:
    """All of it on the device if it fits; else as many units as do, spread evenly over the pass, the rest below.

    Below the device, page-locked CPU memory comes first, then ``--kv-device`` if there is one; without it all the
    rest is given to the CPU's memory, whether that has room or not.

    Args:
        gpu_room: bytes that nothing else takes of the GPU's budget; None for no limit.
        cpu_room: likewise of the CPU's.
    """
    units = layout.units()
    everywhere = KVPlacement(layout)
    if gpu_room is None or _on_device(everywhere, costs) <= gpu_room:
        return everywhere
    most = layout.window_bytes
    bounds = min(layout.batch, layout.stretch_rows) * costs.bounds_row_bytes
    beside = _windows(layout, costs) + _slack(costs) + len(units) * bounds
    stay = max(0, min(len(units) - 1, (gpu_room - beside) // max(1, most - bounds)))
    here = set(spread(range(len(units)), stay)) if stay else set[int]()
    below = [unit for place, unit in enumerate(units) if place not in here]
    if costs.kv_device is None:
        return KVPlacement(layout, cpu=tuple(below))
    return _with_disk(layout, below, cpu_room)


def _with_disk(layout: KVLayout, below: list[Unit], cpu_room: int) -> KVPlacement:
    fresh, unit, tail = fresh_bytes(layout), layout.window_bytes, tail_bytes(layout, layout.stretch_rows)
    if fresh + len(below) * unit <= cpu_room:
        return KVPlacement(layout, cpu=tuple(below))
    room = cpu_room - fresh - DISK_SLOTS * unit - len(below) * tail
    stay = max(0, min(len(below), room // max(1, unit - tail)))
    places = set(spread(range(len(below)), stay)) if stay else set[int]()
    cpu = tuple(unit for place, unit in enumerate(below) if place in places)
    return KVPlacement(layout, cpu=cpu, disk=tuple(unit for place, unit in enumerate(below) if place not in places))


def fresh_bytes(layout: KVLayout) -> int:
    """Page-locked memory for the new tokens of one layer and stretch on their way down."""
    return round_up(layout.stretch_rows * layout.n_kv_heads * layout.token_bytes, BLOCK)


def tail_bytes(layout: KVLayout, rows: int) -> int:
    """Page-locked memory of a unit on ``--kv-device``: the newest block of each row, which grows."""
    return rows * layout.n_kv_heads * layout.block_bytes


def _windows(layout: KVLayout, costs: KVCosts) -> int:
    window = layout.window_bytes
    return WINDOWS * (allocator_bytes(window) if costs.on_gpu else window)


def _slack(costs: KVCosts) -> int:
    """Small tensors of the choice, and the allocator's rounding."""
    return 16 * MIB if costs.on_gpu else 0


def _on_device(kv: KVPlacement, costs: KVCosts) -> int:
    nbytes = kv.bytes_of(kv.gpu)
    return allocator_bytes(nbytes) if costs.on_gpu else nbytes


def kv_lines(kv: KVPlacement, costs: KVCosts) -> tuple[list[MemoryLine], list[MemoryLine]]:
    """What KV takes of the device's memory, and of the CPU's."""
    layout, below = kv.layout, (*kv.cpu, *kv.disk)
    if not below:
        return [MemoryLine(f"KV, {layout.batch} x {layout.tokens} tokens", _on_device(kv, costs))], []
    whole, rows = len(layout.units()), min(layout.batch, layout.stretch_rows)
    gpu = [
        MemoryLine(f"KV, {len(kv.gpu)} of {whole} parts (a layer, {rows} rows)", _on_device(kv, costs)),
        MemoryLine(f"KV windows, {WINDOWS} parts", _windows(layout, costs) + _slack(costs)),
    ]
    if bounds := costs.bounds(layout, below):
        gpu.append(MemoryLine("KV block bounds", bounds))
    cpu = [MemoryLine(f"KV, {len(kv.cpu)} of {whole} parts", _homes(kv) + fresh_bytes(layout))]
    if kv.disk:
        cpu.append(MemoryLine(f"KV on --kv-device, {len(kv.disk)} parts: newest blocks, slots", _beside_disk(kv)))
    return gpu, cpu


def page_locked_bytes(kv: KVPlacement) -> int:
    """Page-locked CPU memory of all that lies below the device."""
    return _homes(kv) + fresh_bytes(kv.layout) + _beside_disk(kv)


def _homes(kv: KVPlacement) -> int:
    """Each part begins on a page; of some head sizes it does not end on one."""
    return sum(round_up(kv.layout.unit_bytes(unit), BLOCK) for unit in kv.cpu)


def _beside_disk(kv: KVPlacement) -> int:
    if not kv.disk:
        return 0
    tails = sum(tail_bytes(kv.layout, len(kv.layout.rows_of(unit.stretch))) for unit in kv.disk)
    return DISK_SLOTS * kv.layout.window_bytes + tails


def kv_bytes_per_pass(kv: KVPlacement, length: int, topk: int) -> int:
    """Bytes that a decode pass brings to the device where every row has ``length`` tokens."""
    layout = kv.layout
    rows = sum(len(layout.rows_of(unit.stretch)) for unit in (*kv.cpu, *kv.disk))
    if 0 < topk < -(-(length + 1) // KV_BLOCK_TOKENS):
        return rows * layout.n_kv_heads * topk * layout.block_bytes
    return rows * sum(run.nbytes for run in layout.runs([length]))
