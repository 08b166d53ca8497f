"""KV on a device of its own: whole blocks there, each row's newest one in page-locked memory, where it grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from wsm.disk.io_threads import Piece
from wsm.engine.slots import Slot
from wsm.engine.telemetry import Telemetry
from wsm.errors import UnusableInput
from wsm.kv.device import Blocks, KVDevice, Move, blocks_of
from wsm.kv.schedule import Fetch, Write
from wsm.layout.groups import BLOCK
from wsm.layout.kv import KV_BLOCK_TOKENS, KVPlacement, Unit, runs_of
from wsm.plan.kv import DISK_SLOTS, tail_bytes
from wsm.settings import VerifyWhen

TAIL_BYTES = 8 << 20
"""Newest blocks that one thread copies at a time."""


class KVDisk:
    """Reads units into page-locked slots ahead of their fetch, and writes blocks as they fill.

    A unit lies on the device as ``[blocks, rows, n_kv_heads, block]``, not as in memory, where a head's blocks lie
    together: what all rows have of their first blocks is one stretch there, however full their last ones are.

    One thread asks for reads, another writes. ``take`` gives page-locked CPU memory, ``uint8``, so many bytes. Raises
    UnusableInput, DoesNotFit or StoreError as :class:`KVDevice`; reading and writing raise StoreError if they fail.
    """

    def __init__(
        self,
        placement: KVPlacement,
        path: str,
        weights: Sequence[str],
        take: Callable[[int], Tensor],
        telemetry: Telemetry,
        verify: VerifyWhen = "auto",
    ) -> None:
        layout = self.layout = placement.layout
        if layout.block_bytes % BLOCK:
            raise UnusableInput(
                f"--kv-device moves blocks of whole {BLOCK} bytes, this model's have {layout.block_bytes}: leave it out"
            )
        self._telemetry = telemetry
        ends = [0, *accumulate(layout.unit_bytes(unit) for unit in placement.disk)]
        self._offsets = dict(zip(placement.disk, ends, strict=False))
        # The newest blocks of each unit's rows, uint8 [rows, n_kv_heads, 256, 2, record].
        self.tails: dict[Unit, Tensor] = {}
        for unit in placement.disk:
            rows = len(layout.rows_of(unit.stretch))
            self.tails[unit] = take(tail_bytes(layout, rows)).view(layout.shape(rows, KV_BLOCK_TOKENS))
        self.slots = [Slot(take(layout.window_bytes)) for _ in range(DISK_SLOTS - 1)]  # on the way up
        self.down = take(layout.window_bytes)  # for a window on its way down
        # Their blocks, made once: all of them anew for each read would hold the interpreter for a millisecond.
        memory = [self.down, *(slot.buffer for slot in self.slots)]
        self._blocks = {part.data_ptr(): blocks_of(part, layout.block_bytes) for part in memory}
        # The first row and the blocks to bring of each unit next time, in CPU memory.
        self.wanted: dict[Unit, tuple[int, Tensor]] = {}
        self.nbytes = ends[-1]
        self.device = KVDevice(path, self.nbytes, weights=weights, unit=layout.block_bytes, verify=verify)
        self.warnings = self.device.warnings

    def blocks(self, memory: Tensor) -> Blocks:
        """Those of a slot or of ``down``, in the order in which they lie there."""
        return self._blocks[memory.data_ptr()]

    def in_order(self, memory: Tensor) -> Blocks:
        """Those of a slot or of ``down`` in the order in which a full part lies on the device."""
        blocks, apart = self.blocks(memory), self.layout.blocks
        return [block for first in range(apart) for block in blocks[first::apart]]

    def _offset(self, unit: Unit, block: int, head: int) -> int:
        """Where a block is on the device; ``head`` counts those of all rows."""
        heads = len(self.layout.rows_of(unit.stretch)) * self.layout.n_kv_heads
        return self._offsets[unit] + (block * heads + head) * self.layout.block_bytes

    def _whole(self, unit: Unit, memory: Tensor, counts: Sequence[int]) -> Iterator[Move]:
        """The first so many blocks of each row, which are in ``memory`` as a window has them."""
        heads, apart, window = self.layout.n_kv_heads, self.layout.blocks, self.blocks(memory)
        for block in range(max(counts, default=0)):
            for has_it, row, end in runs_of(count > block for count in counts):
                if has_it:
                    lies = slice(row * heads * apart + block, end * heads * apart, apart)
                    yield self._offset(unit, block, row * heads), window[lies]

    # -- up

    def read(self, fetch: Fetch) -> Future[None]:
        """Begin to read what a fetch brings into its slot."""
        slot = fetch.room.buffer
        if fetch.k:
            moves = list(self._chosen(fetch, slot))
        else:
            # Not a byte that this run has not written: a device keeps those of others, and they may be read as NaN.
            moves = list(self._whole(fetch.unit, slot, [length // KV_BLOCK_TOKENS for length in fetch.lengths]))
        started = time.perf_counter()
        read = self.device.read(moves, beside=self._add_tails(fetch, slot))
        read.add_done_callback(lambda _: self._tell("kv_read", fetch.unit, fetch.pass_no, moves, started))
        return read

    def _chosen(self, fetch: Fetch, slot: Tensor) -> Iterator[Move]:
        """The chosen whole blocks; the newest comes from memory, and what is masked stays as it is."""
        heads, k = self.layout.n_kv_heads, fetch.k
        first, wanted = self.wanted[fetch.unit]
        chosen = wanted.view(-1, k).tolist()
        compact = self.blocks(slot)
        whole = [length // KV_BLOCK_TOKENS for length in fetch.lengths]
        for number in range(k - 1):
            there = [
                blocks[number] if number < whole[first + place // heads] else None
                for place, blocks in enumerate(chosen)
            ]
            for block, begin, end in runs_of(there, first * heads):
                if block is not None:
                    yield self._offset(fetch.unit, block, begin), compact[begin * k + number : end * k : k]

    def _add_tails(self, fetch: Fetch, slot: Tensor) -> Iterator[Piece]:
        """Copies of the newest blocks, some rows each, by those who read: numpy's, which takes one thread."""
        tails = self.tails[fetch.unit].numpy()
        tokens = fetch.k * KV_BLOCK_TOKENS or self.layout.tokens
        shape = self.layout.shape(len(fetch.lengths), tokens)
        window = slot[: torch.Size(shape).numel()].view(shape).numpy()
        together = max(1, TAIL_BYTES // tails[0].nbytes)

        def place(row: int) -> tuple[int | None, int]:
            """Where a row's newest block begins in the window, None where it has none; and whose turn it is."""
            whole, newest = divmod(fetch.lengths[row], KV_BLOCK_TOKENS)
            begin = tokens - KV_BLOCK_TOKENS if fetch.k else whole * KV_BLOCK_TOKENS
            return begin if newest else None, row // together

        for (begin, _), row, end in runs_of(map(place, range(len(fetch.lengths)))):
            if begin is not None:
                yield partial(np.copyto, window[row:end, :, begin : begin + KV_BLOCK_TOKENS], tails[row:end])

    # -- down

    def write_window(self, write: Write) -> None:
        """The changed rows of a unit, which are in ``down``: whole blocks to the device, the rest to memory."""
        layout, rows = self.layout, len(write.after)
        window = self.down[: rows * layout.row_bytes].view(layout.shape(rows))
        whole = [after // KV_BLOCK_TOKENS if row in write.changed else 0 for row, after in enumerate(write.after)]
        self._write(write, list(self._whole(write.unit, self.down, whole)))
        for row in write.changed:
            if write.after[row] % KV_BLOCK_TOKENS:
                begin = whole[row] * KV_BLOCK_TOKENS
                self.tails[write.unit][row].copy_(window[row, :, begin : begin + KV_BLOCK_TOKENS])

    def write_full(self, write: Write, rows: Sequence[int]) -> None:
        """Blocks that a decode step has filled, from memory to the device."""
        heads, tails, size = self.layout.n_kv_heads, self.tails[write.unit], self.layout.block_bytes
        full = [row for row in rows if write.after[row] % KV_BLOCK_TOKENS == 0]
        places = [(row, self._offset(write.unit, write.before[row] // KV_BLOCK_TOKENS, row * heads)) for row in full]
        self._write(write, [(offset, blocks_of(tails[row], size)) for row, offset in places])

    def _write(self, write: Write, moves: Sequence[Move]) -> None:
        """All of them, and until all are done; the first failure is raised."""
        started = time.perf_counter()
        self.device.write(moves).result()
        self._tell("kv_write", write.unit, write.pass_no, moves, started)

    def _tell(self, tier: str, unit: Unit, pass_no: int, moves: Sequence[Move], started: float) -> None:
        nbytes = sum(len(blocks) for _, blocks in moves) * self.layout.block_bytes
        self._telemetry.kv_disk(tier, unit.layer, pass_no, nbytes, started, time.perf_counter())

    def let_go(self) -> None:
        """Use no memory any more, once no thread does; raises ThreadsStuck as :meth:`KVDevice.join`."""
        self.device.join()
        self.tails.clear()
        self._blocks.clear()

    def close(self) -> None:
        """:meth:`let_go`, and give the device back, which may raise KVDeviceError."""
        self.let_go()
        self.device.close()
