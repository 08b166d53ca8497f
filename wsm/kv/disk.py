"""KV on a device of its own: whole blocks there, each row's newest one in page-locked memory, where it grows."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wsm.engine.device import Event
from wsm.engine.telemetry import Telemetry
from wsm.errors import UnusableInput
from wsm.kv.device import KVDevice, Move
from wsm.kv.schedule import Fetch, Write
from wsm.layout.groups import BLOCK
from wsm.layout.kv import KV_BLOCK_TOKENS, KVPlacement, Unit
from wsm.plan.kv import DISK_SLOTS


class _Slot(NamedTuple):
    buffer: Tensor
    drained: Event | None


class _Wake(NamedTuple):
    """For the staging thread: what was staged for passes before this epoch is not wanted any more."""

    epoch: int


class KVDisk:
    """Reads units into page-locked slots ahead of their fetch, and writes blocks as they fill.

    One thread stages (:meth:`stage`), one fetches (:meth:`staged`, :meth:`give_back`), one writes. The slots that are
    staged are shared under ``_lock``; the free ones wait in a queue.

    Args:
        take: page-locked CPU memory, ``uint8``, so many bytes.

    Raises:
        UnusableInput, DoesNotFit, StoreError: as :class:`KVDevice`.
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
        self.units = frozenset(placement.disk)
        self._offsets, end = dict[Unit, int](), 0
        for unit in placement.disk:
            self._offsets[unit] = end
            end += layout.unit_bytes(unit)
        rows = {unit: len(layout.rows_of(unit.stretch)) for unit in placement.disk}
        self._tails = {
            unit: take(count * layout.n_kv_heads * layout.block_bytes).view(layout.shape(count, KV_BLOCK_TOKENS))
            for unit, count in rows.items()
        }
        self._free: queue.SimpleQueue[_Slot | _Wake | None] = queue.SimpleQueue()
        for _ in range(DISK_SLOTS - 1):
            self._free.put(_Slot(take(layout.window_bytes), None))
        self._down = take(layout.window_bytes)
        self._lock = threading.Lock()
        self._staged: dict[tuple[int, int, Unit], Tensor] = {}
        self.wanted: dict[Unit, tuple[int, Tensor]] = {}
        self.taken: Tensor | None = None
        self._device = KVDevice(path, end, weights=weights)

    @property
    def warnings(self) -> list[str]:
        return self._device.warnings

    # -- up

    def free_slot(self) -> Tensor | None:
        """Wait for a slot whose last bytes have been copied on; None once closing."""
        slot = self._free.get()
        while isinstance(slot, _Wake):
            self.drop_older(slot.epoch)
            slot = self._free.get()
        if slot is None:
            return None
        if slot.drained is not None:
            slot.drained.synchronize()
        return slot.buffer

    def stage(self, fetch: Fetch, slot: Tensor) -> None:
        """Read what a fetch will bring into a slot.

        Raises:
            StoreError: if it cannot be read.
        """
        moves = list(self._chosen(fetch, slot) if fetch.k else self._whole(fetch, slot))
        self._move(moves, fetch.unit, fetch.pass_no, writing=False)
        self._add_tails(fetch, slot)
        with self._lock:
            self._staged[fetch.epoch, fetch.pass_no, fetch.unit] = slot

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

    def staged(self, fetch: Fetch) -> bool:
        """Whether a fetch's bytes are in a slot, or were never on the device; the slot is then :attr:`taken`.

        To be asked while nobody can drop what is expected of coming passes.
        """
        self.taken = None
        if fetch.unit not in self.units:
            return True
        with self._lock:
            self.taken = self._staged.pop((fetch.epoch, fetch.pass_no, fetch.unit), None)
        return self.taken is not None

    def give_back(self, slot: Tensor, drained: Event | None) -> None:
        """A slot's bytes have been copied on, up to ``drained``."""
        self._free.put(_Slot(slot, drained))

    def expect(self, epoch: int) -> None:
        """Nothing that was staged before ``epoch`` is wanted any more.

        For the computation's thread, which only leaves word: Ctrl-C may come at any point there, and loses no slot.
        """
        self._free.put(_Wake(epoch))

    def drop_older(self, epoch: int) -> None:
        """Give back what was staged for passes that will not come; for the staging thread."""
        with self._lock:
            old = [self._staged.pop(key) for key in list(self._staged) if key[0] < epoch]
        for slot in old:
            self.give_back(slot, None)

    # -- down

    @property
    def down(self) -> Tensor:
        """Page-locked memory that a whole window is copied to on its way down."""
        return self._down

    def write_window(self, write: Write) -> None:
        """The changed rows of a unit, which are in :attr:`down`: whole blocks to the device, the rest to memory.

        Raises:
            StoreError: if they cannot be written.
        """
        layout, rows = self.layout, len(write.after)
        window = self._down[: rows * layout.row_bytes].view(layout.shape(rows))
        whole = [after // KV_BLOCK_TOKENS if row in write.changed else 0 for row, after in enumerate(write.after)]
        runs = layout.runs([blocks * KV_BLOCK_TOKENS for blocks in whole], worth=1.0)
        moves = [
            (self._offsets[write.unit] + run.offset, self._down[run.offset : run.offset + run.nbytes]) for run in runs
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

    # -- life

    def stop(self) -> None:
        """Wake whoever waits for a slot."""
        self._free.put(None)

    def close(self) -> None:
        """Give the device back."""
        self._device.close()
        self._staged.clear()
        self._tails.clear()
