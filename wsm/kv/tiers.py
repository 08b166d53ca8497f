"""KV below the device: fetched for the next layer while this one computes, written back as it grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from wsm.engine.arena import PageLockedArena
from wsm.engine.device import PIECE_BYTES, Device, Event, Link
from wsm.engine.slots import Slot
from wsm.engine.telemetry import Telemetry
from wsm.engine.threads import Threaded
from wsm.kv.disk import KVDisk
from wsm.kv.gather import Gather, gather_on
from wsm.kv.schedule import Fetch, KVSchedule, Write
from wsm.layout.kv import KV_BLOCK_TOKENS, WINDOWS, KVPlacement, Run, Unit, runs_of
from wsm.plan.kv import fresh_bytes, kv_cpu_lines
from wsm.plan.memory import total
from wsm.settings import Settings


class KVTiers(Threaded):
    """Keeps KV in page-locked CPU memory and on a disk, as the placement says, and brings it in the order of use.

    Construction takes all the memory, or raises DoesNotFit; the threads start with it. Close it, also after a failure.

    Args:
        link: shared with the weights: whoever needs its bytes sooner goes first.
        wanted: how many weight groups are wanted on the device and not there yet (``WSM_KV_THROTTLE_*``).
        disk: the path of the device for what the placement puts on one, and the weights' files, which it must not be.
    """

    def __init__(
        self,
        placement: KVPlacement,
        device: Device,
        settings: Settings,
        telemetry: Telemetry,
        link: Link,
        wanted: Callable[[], int],
        disk: tuple[str, Sequence[str]] | None = None,
    ) -> None:
        self.layout, self.telemetry = placement.layout, telemetry
        self._settings, self._link, self._wanted_groups = settings, link, wanted
        self.pauses = 0
        self._below = frozenset((*placement.cpu, *placement.disk))
        self._arena = PageLockedArena(total(kv_cpu_lines(placement)), device)
        self._disk: KVDisk | None = None
        self._windows: list[Slot] = []
        try:
            self._homes = {unit: self._arena.take(self.layout.unit_bytes(unit)) for unit in placement.cpu}
            self._fresh = self._arena.take(fresh_bytes(self.layout))
            if placement.disk:
                assert disk is not None
                self._disk = KVDisk(placement, *disk, self._arena.take, telemetry, settings.verify_weights)
            # Zeros: what a mask hides counts nothing times its value, and nothing times NaN is NaN.
            nbytes, where = self.layout.window_bytes, device.torch_device
            self._windows += [Slot(torch.zeros(nbytes, dtype=torch.uint8, device=where)) for _ in range(WINDOWS)]
            self.schedule = KVSchedule(placement, self._windows, self._disk.slots if self._disk is not None else ())
        except BaseException:
            self._free_memory()
            raise
        super().__init__(self.schedule, device)
        works = {"wsm-kv-in": self._fetch_all, "wsm-kv-out": self._write_all}
        try:
            self._begin(works if self._disk is None else {**works, "wsm-kv-read": self._stage_all})
        except BaseException:
            self.close()
            raise

    def _free_memory(self) -> None:
        for window in self._windows:
            window.buffer = torch.empty(0, dtype=torch.uint8)
        if self._disk is not None:
            self._disk.let_go()
        self._homes = {}
        self._arena.close()
        if self._disk is not None:
            self._disk.close()  # last: it may fail

    @property
    def disk(self) -> KVDisk | None:
        """What is kept on a device of its own; None where nothing is."""
        return self._disk

    def scratch(self) -> tuple[Tensor, Tensor]:
        """Page-locked memory and a window, for a probe that leaves zeros there, before anything is kept."""
        slots = [slot.buffer for slot in self._disk.slots] if self._disk is not None else []
        return max([*self._homes.values(), *slots], key=lambda memory: memory.nbytes), self._windows[0].buffer

    @property
    def page_locked_bytes(self) -> int:
        return self._arena.nbytes

    @property
    def warnings(self) -> list[str]:
        return [*self._arena.warnings, *(self._disk.warnings if self._disk is not None else ())]

    @property
    def fraction_fetched(self) -> float | None:
        """Blocks brought, of those that the rows had, since the last reset; None where none were needed."""
        whole = self.schedule.blocks_whole
        return self.schedule.blocks_fetched / whole if whole else None

    def clear(self) -> None:
        """Zeros wherever KV may be in memory, after :meth:`KVSchedule.reset`; of a drive only what is new is read."""
        self.schedule.wait_idle()
        self.device.synchronize()  # what was queued, too
        for memory in (self._arena.whole, *(window.buffer for window in self._windows)):
            memory.zero_()
        self.device.synchronize()

    # -- the model's side

    def holds(self, layer: int, stretch: int) -> bool:
        """Whether this KV is below the device."""
        return Unit(layer, stretch) in self._below

    def enter(self, layer: int, stretch: int) -> tuple[Tensor, bool]:
        """The pass's next KV, ``uint8 [rows, n_kv_heads, tokens, 2, record]``, and whether it is chosen blocks alone.

        Waits on the host until the fetch is queued, then makes the compute stream wait for it. Raises as
        :meth:`KVSchedule.enter`.
        """
        asked = self.telemetry.mark()
        fetch = self.schedule.enter(Unit(layer, stretch))
        assert fetch.room.filled is not None
        self.device.wait(self.device.compute_stream(), fetch.room.filled)
        self.telemetry.kv_waited(asked, self.telemetry.mark())
        return self._view(fetch), fetch.k > 0

    def _view(self, fetch: Fetch) -> Tensor:
        rows = len(self.layout.rows_of(fetch.unit.stretch))
        shape = self.layout.shape(rows, fetch.k * KV_BLOCK_TOKENS)
        return fetch.room.buffer[: torch.Size(shape).numel()].view(shape)

    def leave(self, layer: int, stretch: int, fresh: Tensor | None, wanted: Tensor | None) -> None:
        """All that this pass computes with the entered window is queued.

        ``fresh`` is one new token a row, ``uint8 [rows, n_kv_heads, 2, record]``, None where the window itself holds
        what is new; ``wanted`` are blocks to bring next time, int64 ``[rows, n_kv_heads, k]``, if they are chosen.
        """
        done = self.device.record(self.device.compute_stream())
        self.schedule.leave(Unit(layer, stretch), done, fresh, wanted)

    # -- the threads

    def _stage_all(self) -> None:
        """Have units of the disk read ahead of their fetch, a slot each; the next is asked for before one has come."""
        assert self._disk is not None
        while (fetch := self.schedule.next(self.schedule.claim_staging)) is not None:
            if fetch.room.drained is not None:
                fetch.room.drained.synchronize()  # the slot's last copy to the device
            self._disk.read(fetch).add_done_callback(partial(self._tell_staged, fetch))

    def _tell_staged(self, fetch: Fetch, read: Future[None]) -> None:
        def tell() -> None:
            if not self.schedule.dropped(fetch):  # else its blocks may be written anew by now, and nobody wants them
                read.result()  # raises what the read failed with
            self.schedule.staged(fetch)

        self._guard(tell)

    def _fetch_all(self) -> None:
        stream = self.device.stream()
        while (fetch := self.schedule.next(self.schedule.claim_fetch)) is not None:
            if fetch.room.drained is not None:
                # The window's last reader. Not on the stream: pieces that wait there would hold the link up for all.
                fetch.room.drained.synchronize()
            needed_at = 2 * (fetch.pass_no * self.layout.n_layers + fetch.unit.layer)
            for nbytes, copies in _pieces(self._copies(fetch)):
                with self._link.turn(needed_at):
                    start = self.telemetry.mark(stream)
                    for copy in copies:
                        copy(stream)
                    end = self.device.record(stream)
                    self._link.queued(end)
                self.telemetry.kv_moved("kv_h2d", fetch.unit.layer, fetch.pass_no, nbytes, start, end)
            self.schedule.fetched(fetch, self.device.record(stream))

    def _copies(self, fetch: Fetch) -> Iterator[tuple[int, Work]]:
        """What to queue for a fetch, a piece each: its bytes, and what queues it on a stream."""
        if not fetch.k:
            return self._whole(fetch, self.layout.runs(fetch.lengths))
        if fetch.staged is None:
            return self._chosen(fetch)
        row = fetch.k * KV_BLOCK_TOKENS * self.layout.token_bytes * self.layout.n_kv_heads
        return self._whole(fetch, [Run(begin * row, (end - begin) * row) for begin, end in _still_there(fetch)])

    def _whole(self, fetch: Fetch, runs: Sequence[Run]) -> Iterator[tuple[int, Work]]:
        """Copies of runs of bytes, from the unit's home or from a slot that holds the same."""
        home = self._homes[fetch.unit] if fetch.staged is None else fetch.staged.buffer
        window = fetch.room.buffer
        for run in runs:
            end = run.offset + run.nbytes
            for offset in range(run.offset, end, PIECE_BYTES):
                part = slice(offset, min(offset + PIECE_BYTES, end))
                yield part.stop - offset, partial(self.device.copy, window[part], home[part])

    def _chosen(self, fetch: Fetch) -> Iterator[tuple[int, Work]]:
        """The chosen blocks of neighbouring rows, read by a kernel from page-locked memory: no host knows which."""
        layout, wanted, words = self.layout, fetch.wanted, word_of(self.layout.record_bytes)
        window = self._view(fetch).view(words).view(len(fetch.lengths), layout.n_kv_heads * fetch.k, -1)
        home = self.device.mapped(self._homes[fetch.unit]).view(words)
        home = home.view(len(fetch.lengths), layout.n_kv_heads * layout.blocks, -1)
        assert wanted is not None
        most = max(1, PIECE_BYTES // window[0].nbytes)
        for begin, end in _still_there(fetch):
            for row in range(begin, end, most):
                part = slice(row, min(row + most, end))
                chosen = wanted[part.start - fetch.first : part.stop - fetch.first]
                gather = partial(self._gather, home[part], chosen, window[part])
                yield window[part].nbytes, partial(self.device.run, work=gather)

    @cached_property
    def _gather(self) -> Gather:
        return gather_on(self.device)

    def _write_all(self) -> None:
        stream = self.device.stream()
        while (write := self.schedule.next_write()) is not None:
            self._throttle()
            self.device.wait(stream, write.done)
            start = self.telemetry.mark(stream)
            rows = [row for row in write.changed if self.schedule.active(write.unit, row)]
            nbytes = self._write_fresh(write, stream) if write.fresh is not None else self._write_window(write, stream)
            end = self.device.record(stream)
            end.synchronize()
            self.telemetry.kv_moved("kv_d2h", write.unit.layer, write.pass_no, nbytes, start, end)
            self._settle(write, rows, end, stream)
            self.schedule.written(write)

    def _on_host(self, small: Tensor, stream: Any) -> Tensor:
        """A small tensor's values, through a stream that is idle: nothing that is queued elsewhere is waited for."""
        found = list[Tensor]()
        self.device.run(stream, lambda: found.append(small.cpu()))
        self.device.record(stream).synchronize()
        return found[0]

    def _settle(self, write: Write, rows: Sequence[int], end: Event, stream: Any) -> None:
        """From page-locked memory to where it stays."""
        on_disk = self._disk if self._disk is not None and write.unit in self._disk.tails else None
        if on_disk is not None and write.wanted is not None:
            on_disk.wanted[write.unit] = write.changed[0], self._on_host(write.wanted, stream)
        if write.window is not None:
            write.window.drained = end
            if on_disk is not None:
                on_disk.write_window(write)
        elif rows:
            if on_disk is None:
                home = self._homes[write.unit].view(self.layout.shape(len(write.before)))
                self._scatter(write, rows, home, [write.before[row] for row in rows])
            else:
                places = [write.before[row] % KV_BLOCK_TOKENS for row in rows]
                self._scatter(write, rows, on_disk.tails[write.unit], places)
                on_disk.write_full(write, rows)

    def _throttle(self) -> None:
        """Let the weights go first where many are wanted: one pause, then the write, so nothing waits for ever."""
        pause_ms = self._settings.kv_throttle_ms
        if pause_ms and not self.schedule.closing and self._wanted_groups() >= self._settings.kv_throttle_threshold:
            self.pauses += 1
            time.sleep(pause_ms / 1e3)

    def _write_window(self, write: Write, stream: Any) -> int:
        """Whole rows from the window to their home; the bytes."""
        assert write.window is not None
        home = self._homes[write.unit] if self._disk is None or write.unit in self._homes else self._disk.down
        window = write.window.buffer
        lengths = [after if after > before else 0 for before, after in zip(write.before, write.after, strict=True)]
        runs = self.layout.runs(lengths)
        for run in runs:
            part = slice(run.offset, run.offset + run.nbytes)
            self.device.copy(home[part], window[part], stream)
        return sum(run.nbytes for run in runs)

    def _write_fresh(self, write: Write, stream: Any) -> int:
        """One copy of every row's new token to page-locked memory; the bytes."""
        assert write.fresh is not None
        flat = write.fresh.reshape(-1)
        self.device.copy(self._fresh[: flat.numel()], flat, stream)
        return flat.numel()

    def _scatter(self, write: Write, rows: Sequence[int], home: Tensor, places: Sequence[int]) -> None:
        """The new tokens, which are in page-locked memory by now, to their ``places`` in those rows that go on.

        ``home`` is ``uint8 [rows of the unit, n_kv_heads, tokens, 2, record]``.
        """
        layout, words = self.layout, word_of(self.layout.record_bytes)
        fresh = self._fresh[: len(write.changed) * layout.n_kv_heads * layout.token_bytes].view(words)
        fresh = fresh.view(len(write.changed), layout.n_kv_heads, 2, -1)
        order = {row: place for place, row in enumerate(write.changed)}
        taken = torch.tensor([order[row] for row in rows])
        home.view(words)[torch.tensor(rows), :, torch.tensor(places)] = fresh[taken]


Work = Callable[[Any], None]


def word_of(record_bytes: int) -> torch.dtype:
    """The widest type that a record is whole words of: what bytes are moved by kernels as."""
    return torch.int64 if record_bytes % 8 == 0 else torch.uint8


def _still_there(fetch: Fetch) -> Iterator[tuple[int, int]]:
    """Neighbouring rows whose blocks were chosen and that have not ended: the first, and the one behind the last."""
    assert fetch.wanted is not None
    chosen = fetch.lengths[fetch.first : fetch.first + len(fetch.wanted)]
    return ((begin, end) for there, begin, end in runs_of(map(bool, chosen), fetch.first) if there)


def _pieces(copies: Iterator[tuple[int, Work]]) -> Iterator[tuple[int, list[Work]]]:
    """Copies taken together until they make a piece of the link."""
    total, together = 0, list[Work]()
    for nbytes, work in copies:
        if total and total + nbytes > PIECE_BYTES:
            yield total, together
            total, together = 0, []
        total += nbytes
        together.append(work)
    if together:
        yield total, together
