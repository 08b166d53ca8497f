"""Bytes, busy time and stall time per tier, from events on the streams and the host's clock.

The engine's threads only append records. Once a pass, whoever measures has those that are over folded into the sums of
their stretch and let go (:meth:`Telemetry.fold`): measuring costs a few event records a group and no synchronisation,
and the memory that it takes does not grow with the run.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, Generic, TypeVar

from wsm.engine.device import Device, Event
from wsm.engine.records import Decoding, Interval, KVTransfer, Records, Transfer, Use
from wsm.engine.stretch import Stretch
from wsm.layout.groups import GroupId
from wsm.store.source import ChunkRead

T = TypeVar("T")
FOLDS_LATE = 4
"""A record comes at most so many folds after what it tells of began."""


class _Log(Generic[T]):
    """Records of one kind. Any thread may add, one at a time asks; an event is let go once its time is known."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pending: deque[tuple[tuple[Any, ...], Callable[..., T]]] = deque()
        self._known: list[T] = []

    def add(self, make: Callable[..., T], *events: object) -> None:
        """``make`` takes the times of ``events``, in seconds of the host's clock; None: nothing is kept."""
        if all(event is not None for event in events):
            self._pending.append((events, make))

    def __call__(self) -> list[T]:
        """Every record of what has ended, and was not taken."""
        while self._pending:
            events, make = self._pending[0]
            if events and not events[-1].query():
                break
            self._known.append(make(*map(self._device.seconds, events)))
            self._pending.popleft()
        return list(self._known)

    def take(self, is_over: Callable[[T], bool]) -> list[T]:
        """Those that are over; they are forgotten here."""
        known = self()
        self._known = [record for record in known if not is_over(record)]
        return [record for record in known if is_over(record)]


def _interval(start: float, end: float) -> Interval:
    return start, end


class Telemetry:
    """Collects records from every thread of the engine, and folds them into the sums of a stretch.

    ``load_reads`` are the residents' reads, and those that were under way meanwhile.

    Args:
        keep: whether to record at all; a model that serves for hours should not.
    """

    def __init__(self, device: Device, *, keep: bool = True) -> None:
        self._device, self._keep = device, keep
        self.reads, self.copies = _Log[Transfer](device), _Log[Transfer](device)
        self.uses, self.kv = _Log[Use](device), _Log[KVTransfer](device)
        self.starved, self.kv_waits = _Log[Interval](device), _Log[Interval](device)
        self.collectives, self.decodings = _Log[Interval](device), _Log[Decoding](device)
        self.drafts = _Log[Interval](device)
        self.loading = False
        self.load_reads: list[Transfer] = []
        self._loaded_at = 0.0
        self._seen: set[str] = set()
        self._stretches: deque[Stretch] = deque()
        self._folds: deque[float] = deque(maxlen=FOLDS_LATE)

    # -- recording

    def read_done(self, group: GroupId, step: int | None, chunks: Sequence[ChunkRead]) -> None:
        """A read of ``group`` has ended; ``chunks`` came from a drive."""
        if not chunks or not self._keep:
            return
        start, end = min(chunk.start for chunk in chunks), max(chunk.end for chunk in chunks)
        read = Transfer(group, step, sum(chunk.nbytes for chunk in chunks), start, end)
        self.reads.add(lambda: read)
        if step is None:
            self._loaded_at = max(self._loaded_at, end)
        if self.loading or start < self._loaded_at:
            self.load_reads.append(read)

    def copied(self, group: GroupId, step: int | None, nbytes: int, start: Event | None, end: Event | None) -> None:
        """Pieces of a group were copied to the device without a break; ``start`` is from :meth:`mark`."""
        self.copies.add(partial(Transfer, group, step, nbytes), start, end)

    def link_starved(self, start: float, end: float) -> None:
        """The link had room and no bytes for it."""
        if self._keep:
            self.starved.add(lambda: (start, end))

    def mark(self, stream: Any = None) -> Event | None:
        """An event behind everything queued on a stream, that of the computation where none is given.

        It is for the record alone; None where nothing is kept.
        """
        return self._device.record(stream or self._device.compute_stream()) if self._keep else None

    def used(
        self, group: GroupId | None, step: int, asked: Event | None, granted: Event | None, done: Event | None
    ) -> None:
        self.uses.add(partial(Use, group, step), asked, granted, done)

    def decoded(self, group: GroupId, nbytes: int, start: Event | None, end: Event | None) -> None:
        """Matrices were decoded between two marks of the computation."""
        self.decodings.add(partial(Decoding, group, nbytes), start, end)

    def drafted(self, start: Event | None, end: Event | None) -> None:
        """A draft computed between two marks of the computation."""
        self.drafts.add(_interval, start, end)

    def took(self, start: object, end: object) -> None:
        """The computation was with other ranks between two marks; waiting for the slowest of them counts."""
        self.collectives.add(_interval, start, end)

    def kv_moved(self, tier: str, layer: int, pass_no: int, nbytes: int, start: Event | None, end: Event) -> None:
        """A copy of KV to or from the device, for the ``pass_no``-th pass of the model."""
        if nbytes:
            self.kv.add(partial(KVTransfer, tier, layer, pass_no, nbytes), start, end)

    def kv_disk(self, tier: str, layer: int, pass_no: int, nbytes: int, start: float, end: float) -> None:
        """KV that was read from or written to its own device, in seconds of the host's clock."""
        if self._keep and nbytes:
            self.kv.add(partial(KVTransfer, tier, layer, pass_no, nbytes, start, end))

    def kv_waited(self, asked: Event | None, granted: Event | None) -> None:
        """The computation waited for KV, inside the use of an attn group."""
        self.kv_waits.add(_interval, asked, granted)

    # -- folding, by the thread that measures

    def begin(self, at: float, step: int, pass_no: int, *, records: bool = False) -> Stretch:
        """A new stretch from ``at`` on, in host seconds; the one before ends there.

        ``step`` is the place in the pass order that the computation has next, ``pass_no`` the next pass's number. With
        ``records`` the stretch keeps every record of it.
        """
        if self._stretches:
            self._stretches[-1].close(at, step, pass_no)
        self._stretches.append(Stretch(at, step, pass_no, self._seen, records=records))
        return self._stretches[-1]

    def fold(self, step: int = sys.maxsize, pass_no: int = sys.maxsize, at: float | None = None) -> None:
        """Add records to the sums of their stretches, and let go of them; ``at``, in host seconds, if it is not now.

        Of what has ended, that is what was done for the places before ``step`` and the passes before ``pass_no``: all
        stretches that those belong to have begun. To be asked once a pass, and at the end for everything.
        """
        taken = Records(
            reads=self.reads.take(lambda read: read.step is None or read.step < step),
            copies=self.copies.take(lambda copy: copy.step is None or copy.step < step),
            uses=self.uses.take(lambda use: use.step < step),
            kv=self.kv.take(lambda move: move.pass_no < pass_no),
            starved=self.starved.take(lambda _: True),
            kv_waits=self.kv_waits.take(lambda _: True),
            collectives=self.collectives.take(lambda _: True),
            decodings=self.decodings.take(lambda _: True),
            drafts=self.drafts.take(lambda _: True),
        )
        self._seen.update(field.name for field in fields(taken) if getattr(taken, field.name))
        for stretch in self._stretches:
            stretch.add(taken)
        before = self._folds[0] if len(self._folds) == FOLDS_LATE else 0.0
        for stretch in self._stretches:
            stretch.settle(before)
        while len(self._stretches) > 1 and self._stretches[0].window[1] < before:
            self._stretches.popleft()
        self._folds.append(time.perf_counter() if at is None else at)
