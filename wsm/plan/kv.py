"""How much KV stays on the device, and where the rest goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

from wsm.layout.groups import BLOCK, round_up
from wsm.layout.kv import KV_BLOCK_TOKENS, WINDOWS, KVLayout, KVPlacement, Unit
from wsm.plan.memory import MIB, MemoryLine, allocator_bytes
from wsm.plan.placement import spread

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
        return layout.rows_in(units) * self.bounds_row_bytes


def place_kv(layout: KVLayout, gpu_room: int | None, cpu_room: int, costs: KVCosts) -> KVPlacement:
    """All of it on the device if it fits; else as many units as do, spread evenly over the pass, the rest below.

    Below the device, page-locked CPU memory comes first, then ``--kv-device`` if there is one; without it all the
    rest is given to the CPU's memory, whether that has room or not.

    Args:
        gpu_room: bytes that nothing else takes of the GPU's budget; None for no limit.
        cpu_room: likewise of the CPU's.
    """
    everywhere = KVPlacement(layout)
    if gpu_room is None or _on_device(everywhere, costs) <= gpu_room:
        return everywhere
    most = layout.window_bytes
    bounds = min(layout.batch, layout.stretch_rows) * costs.bounds_row_bytes
    rounding = 2 * MIB if costs.on_gpu else 0  # the parts that stay are one tensor
    beside = _windows(layout, costs) + _slack(costs) + rounding + layout.n_units * bounds
    stay = max(0, min(layout.n_units - 1, (gpu_room - beside) // max(1, most - bounds)))
    _, below = _split(layout.units(), stay)
    if costs.kv_device is None:
        return KVPlacement(layout, cpu=below)
    return _with_disk(layout, below, cpu_room)


def _split(units: Sequence[Unit], stay: int) -> tuple[tuple[Unit, ...], tuple[Unit, ...]]:
    """``stay`` of the units, spread evenly over them, and the others."""
    if not stay:
        return (), tuple(units)
    chosen = bytearray(len(units))
    for place in spread(range(len(units)), stay):
        chosen[place] = 1
    return tuple(compress(units, chosen)), tuple(unit for unit, here in zip(units, chosen, strict=True) if not here)


def _with_disk(layout: KVLayout, below: tuple[Unit, ...], cpu_room: int) -> KVPlacement:
    fresh, unit, tail = fresh_bytes(layout), layout.window_bytes, tail_bytes(layout, layout.stretch_rows)
    if fresh + len(below) * unit <= cpu_room:
        return KVPlacement(layout, cpu=below)
    room = cpu_room - fresh - DISK_SLOTS * unit - len(below) * tail
    stay = max(0, min(len(below), room // max(1, unit - tail)))
    cpu, disk = _split(below, stay)
    return KVPlacement(layout, cpu=cpu, disk=disk)


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
    """Small tensors of the choice of blocks and of what is written back."""
    return 16 * MIB if costs.on_gpu else 0


def _on_device(kv: KVPlacement, costs: KVCosts) -> int:
    nbytes = kv.gpu_bytes
    return allocator_bytes(nbytes) if costs.on_gpu else nbytes


def kv_lines(kv: KVPlacement, costs: KVCosts) -> tuple[list[MemoryLine], list[MemoryLine]]:
    """What KV takes of the device's memory, and of the CPU's."""
    layout, below = kv.layout, (*kv.cpu, *kv.disk)
    if not below:
        return [MemoryLine(f"KV, {layout.batch} x {layout.tokens} tokens", _on_device(kv, costs))], []
    whole, rows = layout.n_units, min(layout.batch, layout.stretch_rows)
    gpu = [
        MemoryLine(f"KV, {kv.on_gpu} of {whole} parts (a layer, {rows} rows)", _on_device(kv, costs)),
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
    return DISK_SLOTS * kv.layout.window_bytes + tail_bytes(kv.layout, kv.layout.rows_in(kv.disk))


def kv_bytes_per_pass(kv: KVPlacement, length: int, topk: int) -> int:
    """Bytes that a decode pass brings to the device where every row has ``length`` tokens."""
    layout = kv.layout
    rows = layout.rows_in((*kv.cpu, *kv.disk))
    if 0 < topk < -(-(length + 1) // KV_BLOCK_TOKENS):
        return rows * layout.n_kv_heads * topk * layout.block_bytes
    return rows * sum(run.nbytes for run in layout.runs([length]))
