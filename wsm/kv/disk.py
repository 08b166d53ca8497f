"""KV on a device of its own: whole blocks there, each row's newest one in page-locked memory, where it grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from wsm.engine.slots import Slot
from wsm.engine.telemetry import Telemetry
from wsm.errors import UnusableInput
from wsm.kv.device import KVDevice, Move
from wsm.kv.schedule import Fetch, Write
from wsm.layout.groups import BLOCK
from wsm.layout.kv import KV_BLOCK_TOKENS, KVPlacement, Unit
from wsm.plan.kv import DISK_SLOTS


class KVDisk:
    """Reads units into page-locked slots ahead of their fetch, and writes blocks as they fill.

    One thread reads, another writes.

    Args:
        take: page-locked CPU memory, ``uint8``, so many bytes.

    Raises:
        UnusableInput, DoesNotFit, StoreError: as :class:`KVDevice`.

    Attributes:
        slots: for units on their way up.
        down: room for a window on its way down, ``uint8``.
        wanted: the first row and the blocks to bring of each unit next time, in CPU memory.
    """

    def __init__(
        self,
        placement: KVPlacement,
        path: str,
        weights: Sequence[str],
        take: Callable[[int], Tensor],
        telemetry: Telemetry,
    ) -> None:
        layout = self.layout = placement.layout
        if layout.block_bytes % BLOCK:
            raise UnusableInput(
                f"--kv-device moves blocks of whole {BLOCK} bytes, this model's have {layout.block_bytes}: leave it out"
            )
        self._telemetry = telemetry
        ends = [0, *accumulate(layout.unit_bytes(unit) for unit in placement.disk)]
        self._offsets = dict(zip(placement.disk, ends, strict=False))
        rows = {unit: len(layout.rows_of(unit.stretch)) for unit in placement.disk}
        self._tails = {
            unit: take(count * layout.n_kv_heads * layout.block_bytes).view(layout.shape(count, KV_BLOCK_TOKENS))
            for unit, count in rows.items()
        }
        self.slots = [Slot(take(layout.window_bytes)) for _ in range(DISK_SLOTS - 1)]
        self.down = take(layout.window_bytes)
        self.wanted: dict[Unit, tuple[int, Tensor]] = {}
        self._device = KVDevice(path, ends[-1], weights=weights)

    @property
    def warnings(self) -> list[str]:
        return self._device.warnings

    def holds(self, unit: Unit) -> bool:
        return unit in self._offsets

    # -- up

    def read(self, fetch: Fetch) -> None:
        """Read what a fetch brings into its slot.

        Raises:
            StoreError: if it cannot be read.
        """
        slot = fetch.room.buffer
        moves = list(self._chosen(fetch, slot) if fetch.k else self._whole(fetch, slot))
        self._move(moves, fetch.unit, fetch.pass_no, writing=False)
        self._add_tails(fetch, slot)

    def _whole(self, fetch: Fetch, slot: Tensor) -> Iterator[Move]:
        blocks = [length // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS for length in fetch.lengths]
        # Not a byte that this run has not written: a device keeps those of others, and they may be read as NaN.
        for run in self.layout.runs(blocks, worth=1.0):
            yield self._offsets[fetch.unit] + run.offset, slot[run.offset : run.offset + run.nbytes]

    def _chosen(self, fetch: Fetch, slot: Tensor) -> Iterator[Move]:
        """A piece for each chosen whole block; the newest comes from memory, and what is masked stays as it is."""
        layout, size = self.layout, self.layout.block_bytes
        first, wanted = self.wanted[fetch.unit]
        compact = slot[: len(fetch.lengths) * layout.n_kv_heads * fetch.k * size].view(-1, size)
        for place, heads in enumerate(wanted.tolist()):
            row = first + place
            whole = fetch.lengths[row] // KV_BLOCK_TOKENS
            for head, blocks in enumerate(heads):
                base = self._offsets[fetch.unit] + row * layout.row_bytes + head * layout.head_bytes
                target = (row * layout.n_kv_heads + head) * fetch.k
                for number, block in enumerate(blocks[: min(whole, fetch.k - 1)]):
                    yield base + block * size, compact[target + number]

    def _add_tails(self, fetch: Fetch, slot: Tensor) -> None:
        tails = self._tails[fetch.unit]
        tokens = fetch.k * KV_BLOCK_TOKENS or self.layout.tokens
        shape = self.layout.shape(len(fetch.lengths), tokens)
        window = slot[: torch.Size(shape).numel()].view(shape)
        for row, length in enumerate(fetch.lengths):
            begin = tokens - KV_BLOCK_TOKENS if fetch.k else length // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS
            if length % KV_BLOCK_TOKENS:
                window[row, :, begin : begin + KV_BLOCK_TOKENS].copy_(tails[row])

    # -- down

    def write_window(self, write: Write) -> None:
        """The changed rows of a unit, which are in ``down``: whole blocks to the device, the rest to memory.

        Raises:
            StoreError: if they cannot be written.
        """
        layout, rows = self.layout, len(write.after)
        window = self.down[: rows * layout.row_bytes].view(layout.shape(rows))
        whole = [after // KV_BLOCK_TOKENS if row in write.changed else 0 for row, after in enumerate(write.after)]
        runs = layout.runs([blocks * KV_BLOCK_TOKENS for blocks in whole], worth=1.0)
        moves = [
            (self._offsets[write.unit] + run.offset, self.down[run.offset : run.offset + run.nbytes]) for run in runs
        ]
        self._move(moves, write.unit, write.pass_no, writing=True)
        for row in write.changed:
            if write.after[row] % KV_BLOCK_TOKENS:
                begin = whole[row] * KV_BLOCK_TOKENS
                self._tails[write.unit][row].copy_(window[row, :, begin : begin + KV_BLOCK_TOKENS])

    def tails(self, unit: Unit) -> Tensor:
        """The newest blocks of a unit's rows, ``uint8 [rows, n_kv_heads, 256, 2, record]``."""
        return self._tails[unit]

    def write_full(self, write: Write, rows: Sequence[int]) -> None:
        """Blocks that a decode step has filled, from memory to the device.

        Raises:
            StoreError: if they cannot be written.
        """
        layout, tails = self.layout, self._tails[write.unit]
        full = [row for row in rows if write.after[row] % KV_BLOCK_TOKENS == 0]
        moves = [
            (
                self._offsets[write.unit]
                + row * layout.row_bytes
                + head * layout.head_bytes
                + write.before[row] // KV_BLOCK_TOKENS * layout.block_bytes,
                tails[row, head],
            )
            for row in full
            for head in range(layout.n_kv_heads)
        ]
        self._move(moves, write.unit, write.pass_no, writing=True)

    def _move(self, moves: Sequence[Move], unit: Unit, pass_no: int, *, writing: bool) -> None:
        """All of them, and until all are done; the first failure is raised."""
        if not moves:
            return
        started = time.perf_counter()
        (self._device.write if writing else self._device.read)(moves).result()
        nbytes = sum(memory.nbytes for _, memory in moves)
        tier = "kv_write" if writing else "kv_read"
        self._telemetry.kv_disk(tier, unit.layer, pass_no, nbytes, started, time.perf_counter())

    def close(self) -> None:
        """Give the device back."""
        self._device.close()
        self._tails.clear()
