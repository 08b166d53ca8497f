"""Bytes, busy time and stall time per tier, from events on the streams and the host's clock.

The engine only appends records while it runs; they are resolved, once, when :meth:`Telemetry.phase` is asked and the
device is idle. So measuring costs a few event records a group and no synchronisation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from wsm.engine.device import Device, Event
from wsm.layout.groups import GroupId
from wsm.store.source import ChunkRead

Interval = tuple[float, float]
T = TypeVar("T")
KV_TIERS = ("kv_h2d", "kv_d2h", "kv_read", "kv_write")


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes that moved between two tiers, over ``[start, end]`` seconds of the host's clock.

    ``step`` is the place in the endless pass order that the bytes were for; None while residents are loaded.
    """

    group: GroupId | None
    step: int | None
    nbytes: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Use:
    """One group's stay under the computation: waited from ``asked`` to ``granted``, computed until ``done``.

    ``group`` is None for a pass whose groups were all used at once.
    """

    group: GroupId | None
    step: int
    asked: float
    granted: float
    done: float


@dataclass(frozen=True, slots=True)
class KVTransfer:
    """KV that moved over ``[start, end]`` seconds of the host's clock, for the ``pass_no``-th pass of the model.

    ``tier`` is ``kv_h2d``, ``kv_d2h``, ``kv_read`` or ``kv_write``, the last two of ``--kv-device``.
    """

    tier: str
    layer: int
    pass_no: int
    nbytes: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class PhaseStats:
    """What a phase (a stretch of the host's clock that covers whole passes) moved and waited for.

    ``bytes`` counts what its passes used, whenever it was fetched; ``bytes_moved`` what moved inside its stretch of
    time. Keys of both: ``ssd_read``, ``weight_h2d``, ``kv_h2d``, ``kv_d2h``, and of a KV device ``kv_read`` and
    ``kv_write``. ``stall_ms`` is the time that the next tier waited for this one: the link for the SSD's bytes, the
    computation for the link's weights (``h2d``) or KV (``kv``). ``idle_ms`` is the time that a tier did nothing,
    waited for or not; the link is idle while neither weights nor KV are copied, and ``compute`` between its passes:
    embedding, head, sampling and read-back, so its busy time, the stalls of ``h2d`` and ``kv`` and its idle time make
    up the phase. A figure that was not measured is None.
    """

    name: str
    passes: int
    wall_ms: float
    bytes: dict[str, int]
    bytes_moved: dict[str, int]
    busy_ms: dict[str, float | None]
    stall_ms: dict[str, float | None]
    idle_ms: dict[str, float | None]
    flops: int = 0
    hbm_bytes: int = 0


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals, as disjoint intervals in order."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def overlap_s(intervals: Iterable[Interval], window: Interval) -> float:
    """Seconds of ``window`` that disjoint ``intervals`` cover."""
    return sum(max(0.0, min(end, window[1]) - max(start, window[0])) for start, end in intervals)


def moved_bytes(transfers: Iterable[Transfer | KVTransfer], window: Interval) -> int:
    """Bytes that moved inside ``window``, a transfer across its edge counted by its share of time."""
    total = 0.0
    for transfer in transfers:
        length = transfer.end - transfer.start
        inside = min(transfer.end, window[1]) - max(transfer.start, window[0])
        if inside > 0 or (length == 0 and window[0] <= transfer.start < window[1]):
            total += transfer.nbytes * (inside / length if length > 0 else 1.0)
    return round(total)


class _Records(Generic[T]):
    """What is known once its events are resolved; an event is let go then. Any thread may add, one at a time asks."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Sequence[Event], Callable[..., T]]] = deque()
        self._resolved: list[T] = []

    def add(self, events: Sequence[Event], make: Callable[..., T]) -> None:
        """``make`` takes the times of ``events``, in seconds of the host's clock."""
        self._pending.append((events, make))

    def resolved(self, device: Device) -> list[T]:
        while self._pending:
            events, make = self._pending[0]
            self._resolved.append(make(*(device.seconds(event) for event in events)))
            self._pending.popleft()
        return list(self._resolved)


class Telemetry:
    """Collects records from every thread of the engine, which append to lists; answers once a run is over.

    Args:
        keep: whether to record at all; a model that serves for hours should not.
    """

    def __init__(self, device: Device, *, keep: bool = True) -> None:
        self._device, self._keep = device, keep
        self.reads: list[Transfer] = []
        self.starved: list[Interval] = []
        self._copies = _Records[Transfer]()
        self._uses = _Records[Use]()
        self._kv_copies = _Records[KVTransfer]()
        self._kv_disk: list[KVTransfer] = []
        self._kv_waits = _Records[Interval]()

    # -- recording

    def read(self, group: GroupId, step: int | None, chunks: Sequence[ChunkRead]) -> None:
        """A read of ``group`` has ended; ``chunks`` came from a drive."""
        if chunks and self._keep:
            start, end = min(chunk.start for chunk in chunks), max(chunk.end for chunk in chunks)
            self.reads.append(Transfer(group, step, sum(chunk.nbytes for chunk in chunks), start, end))

    def copied(self, group: GroupId, step: int | None, nbytes: int, start: Event | None, end: Event | None) -> None:
        """Pieces of a group were copied to the device without a break; ``start`` is from :meth:`mark`."""
        if start is not None and end is not None:
            self._copies.add((start, end), lambda *times: Transfer(group, step, nbytes, *times))

    def link_starved(self, start: float, end: float) -> None:
        """The link had room and no bytes for it."""
        if self._keep:
            self.starved.append((start, end))

    def mark(self, stream: Any) -> Event | None:
        """An event behind everything queued on ``stream``, for the record alone; None where nothing is kept."""
        return self._device.record(stream) if self._keep else None

    def used(
        self, group: GroupId | None, step: int, asked: Event | None, granted: Event | None, done: Event | None
    ) -> None:
        if asked is not None and granted is not None and done is not None:
            self._uses.add((asked, granted, done), lambda *times: Use(group, step, *times))

    def kv_moved(self, tier: str, layer: int, pass_no: int, nbytes: int, start: Event | None, end: Event) -> None:
        """A copy of KV to or from the device, for the ``pass_no``-th pass of the model."""
        if start is not None and nbytes:
            self._kv_copies.add((start, end), lambda *times: KVTransfer(tier, layer, pass_no, nbytes, *times))

    def kv_disk(self, tier: str, layer: int, pass_no: int, nbytes: int, start: float, end: float) -> None:
        """KV that was read from or written to its own device, in seconds of the host's clock."""
        if self._keep and nbytes:
            self._kv_disk.append(KVTransfer(tier, layer, pass_no, nbytes, start, end))

    def kv_waited(self, asked: Event | None, granted: Event | None) -> None:
        """The computation waited for KV, inside the use of an attn group."""
        if asked is not None and granted is not None:
            self._kv_waits.add((asked, granted), lambda begun, ended: (begun, ended))

    # -- answering, when the streams are idle

    def copies(self) -> list[Transfer]:
        """Every copy CPU -> GPU so far, a group in as many parts as it was broken into."""
        return self._copies.resolved(self._device)

    def uses(self) -> list[Use]:
        """Every group's stay under the computation so far."""
        return self._uses.resolved(self._device)

    def kv_transfers(self) -> list[KVTransfer]:
        """Every move of KV so far."""
        return self._kv_copies.resolved(self._device) + list(self._kv_disk)

    def kv_waits(self) -> list[Interval]:
        """Every stretch of time that the computation waited for KV."""
        return self._kv_waits.resolved(self._device)

    def phase(self, name: str, window: Interval, steps: range, passes: range) -> PhaseStats:
        """What happened in ``window`` (host seconds), whose passes took the ``steps`` of the pass order.

        Args:
            steps: empty where no weights are managed.
            passes: the same passes by their number since the model's start.
        """
        reads = list(self.reads)
        copies, uses = self.copies(), [use for use in self.uses() if use.step in steps]
        kv = self.kv_transfers()
        by_tier = {tier: [t for t in kv if t.tier == tier] for tier in KV_TIERS}
        spans = {tier: merged((t.start, t.end) for t in moves) for tier, moves in by_tier.items()}
        spans["ssd"] = merged((t.start, t.end) for t in reads)
        spans["h2d"] = merged((t.start, t.end) for t in copies)
        wall_s, held = window[1] - window[0], merged((use.asked, use.done) for use in uses)
        busy_s = {tier: overlap_s(found, window) or None for tier, found in spans.items()}
        link_s = overlap_s(merged((*spans["h2d"], *spans["kv_h2d"])), window) or None
        kv_stall_s = overlap_s(merged(self.kv_waits()), window)
        return PhaseStats(
            name=name,
            passes=len(passes),
            wall_ms=wall_s * 1e3,
            bytes={
                "ssd_read": _for_steps(reads, steps),
                "weight_h2d": _for_steps(copies, steps),
                **{tier: sum(t.nbytes for t in moves if t.pass_no in passes) for tier, moves in by_tier.items()},
            },
            bytes_moved={
                "ssd_read": moved_bytes(reads, window),
                "weight_h2d": moved_bytes(copies, window),
                **{tier: moved_bytes(moves, window) for tier, moves in by_tier.items()},
            },
            busy_ms={
                **{tier: None if seconds is None else seconds * 1e3 for tier, seconds in busy_s.items()},
                "compute": (sum(use.done - use.granted for use in uses) - kv_stall_s) * 1e3 if uses else None,
            },
            stall_ms={
                "ssd": overlap_s(merged(self.starved), window) * 1e3 if reads else None,
                "h2d": sum(use.granted - use.asked for use in uses) * 1e3 if uses and copies else None,
                "kv": kv_stall_s * 1e3 if kv else None,
            },
            idle_ms={
                "ssd": None if busy_s["ssd"] is None else (wall_s - busy_s["ssd"]) * 1e3,
                "h2d": None if link_s is None else (wall_s - link_s) * 1e3,
                "compute": (wall_s - overlap_s(held, window)) * 1e3 if uses else None,
            },
        )


def _for_steps(transfers: Sequence[Transfer], steps: range) -> int:
    return sum(transfer.nbytes for transfer in transfers if transfer.step is not None and transfer.step in steps)


class CollectiveTimes:
    """Records where the computation is with other ranks; waiting for the slowest of them counts.

    Args:
        keep: whether to record at all, as for :class:`Telemetry`.
    """

    def __init__(self, device: Device, *, keep: bool = True) -> None:
        self._device, self._keep = device, keep
        self._taken: list[tuple[Event, Event]] = []

    def mark(self) -> Event | None:
        """A point in the compute stream; None where nothing is kept."""
        return self._device.record(self._device.compute_stream()) if self._keep else None

    def took(self, start: object, end: object) -> None:
        """A collective ran between two marks."""
        if start is not None and end is not None:
            self._taken.append((start, end))  # type: ignore[arg-type]  # marks of this very object

    def within(self, window: Interval) -> tuple[float, int]:
        """Milliseconds in ``window`` (host seconds), and how many collectives ended in it."""
        spans = [(self._device.seconds(start), self._device.seconds(end)) for start, end in self._taken]
        inside = [span for span in spans if window[0] <= span[1] <= window[1]]
        return 1e3 * overlap_s(merged(inside), window), len(inside)
