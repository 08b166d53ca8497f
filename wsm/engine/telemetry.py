"""Bytes, busy time and stall time per tier, from events on the streams and the host's clock.

The engine only appends records while it runs; they are resolved, once, when :meth:`Telemetry.phase` is asked and the
device is idle. So measuring costs a few event records a group and no synchronisation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from wsm.engine.device import Device, Event
from wsm.layout.groups import GroupId
from wsm.store.source import ChunkRead

Interval = tuple[float, float]
T = TypeVar("T")
KV_TIERS = ("kv_h2d", "kv_d2h", "kv_read", "kv_write")  # the last two: of --kv-device


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes that moved between two tiers, over ``[start, end]`` seconds of the host's clock.

    ``step`` is their place in the endless pass order; None while residents are loaded.
    """

    group: GroupId | None
    step: int | None
    nbytes: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Use:
    """A group, or all of a pass (None), waited for from ``asked`` to ``granted`` and computed with until ``done``."""

    group: GroupId | None
    step: int
    asked: float
    granted: float
    done: float


@dataclass(frozen=True, slots=True)
class Decoding:
    """Matrices of a group, decoded to ``nbytes`` on the computation's stream, over ``[start, end]`` seconds."""

    group: GroupId
    nbytes: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class KVTransfer:
    """KV that moved in one of ``KV_TIERS``, over ``[start, end]`` seconds, for the ``pass_no``-th pass of the model."""

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
    up the phase. ``decoding_ms`` is the part of computing in which matrices were decoded, to ``decoded_bytes``. What
    was not measured is None.
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
    decoding_ms: float | None = None
    decoded_bytes: int = 0


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals, as disjoint intervals in order."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def covered_ms(intervals: Iterable[Interval], window: Interval) -> float:
    """Milliseconds of ``window`` that ``intervals`` cover, however many at a time."""
    return 1e3 * sum(max(0.0, min(end, window[1]) - max(start, window[0])) for start, end in merged(intervals))


def moved_bytes(transfers: Iterable[Transfer | KVTransfer | ChunkRead], window: Interval) -> int:
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

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pending: deque[tuple[tuple[Any, ...], Callable[..., T]]] = deque()
        self._resolved: list[T] = []

    def add(self, make: Callable[..., T], *events: object) -> None:
        """``make`` takes the times of ``events``, in seconds of the host's clock; None: nothing is kept."""
        if all(event is not None for event in events):
            self._pending.append((events, make))

    def __call__(self) -> list[T]:
        """Every record so far; to be asked when the streams are idle."""
        while self._pending:
            events, make = self._pending[0]
            self._resolved.append(make(*map(self._device.seconds, events)))
            self._pending.popleft()
        return list(self._resolved)


def _interval(start: float, end: float) -> Interval:
    return start, end


class Telemetry:
    """Collects records from every thread of the engine, which append to lists; answers when the streams are idle.

    ``copies()`` are CPU -> GPU, a group in as many parts as it was broken into; ``uses()`` are the groups' stays under
    the computation, ``kv_waits()`` the stretches of time that it waited for KV.

    Args:
        keep: whether to record at all; a model that serves for hours should not.
    """

    def __init__(self, device: Device, *, keep: bool = True) -> None:
        self._device, self._keep = device, keep
        self.reads: list[Transfer] = []
        self.starved: list[Interval] = []
        self.copies = _Records[Transfer](device)
        self.uses = _Records[Use](device)
        self.kv_waits = _Records[Interval](device)
        self._kv_copies = _Records[KVTransfer](device)
        self._kv_disk: list[KVTransfer] = []
        self._collectives = _Records[Interval](device)
        self.decodings = _Records[Decoding](device)

    # -- recording

    def read_done(self, group: GroupId, step: int | None, chunks: Sequence[ChunkRead]) -> None:
        """A read of ``group`` has ended; ``chunks`` came from a drive."""
        if chunks and self._keep:
            start, end = min(chunk.start for chunk in chunks), max(chunk.end for chunk in chunks)
            self.reads.append(Transfer(group, step, sum(chunk.nbytes for chunk in chunks), start, end))

    def copied(self, group: GroupId, step: int | None, nbytes: int, start: Event | None, end: Event | None) -> None:
        """Pieces of a group were copied to the device without a break; ``start`` is from :meth:`mark`."""
        self.copies.add(partial(Transfer, group, step, nbytes), start, end)

    def link_starved(self, start: float, end: float) -> None:
        """The link had room and no bytes for it."""
        if self._keep:
            self.starved.append((start, end))

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

    def took(self, start: object, end: object) -> None:
        """The computation was with other ranks between two marks; waiting for the slowest of them counts."""
        self._collectives.add(_interval, start, end)

    def kv_moved(self, tier: str, layer: int, pass_no: int, nbytes: int, start: Event | None, end: Event) -> None:
        """A copy of KV to or from the device, for the ``pass_no``-th pass of the model."""
        if nbytes:
            self._kv_copies.add(partial(KVTransfer, tier, layer, pass_no, nbytes), start, end)

    def kv_disk(self, tier: str, layer: int, pass_no: int, nbytes: int, start: float, end: float) -> None:
        """KV that was read from or written to its own device, in seconds of the host's clock."""
        if self._keep and nbytes:
            self._kv_disk.append(KVTransfer(tier, layer, pass_no, nbytes, start, end))

    def kv_waited(self, asked: Event | None, granted: Event | None) -> None:
        """The computation waited for KV, inside the use of an attn group."""
        self.kv_waits.add(_interval, asked, granted)

    # -- answering, when the streams are idle

    def kv_transfers(self) -> list[KVTransfer]:
        """Every move of KV so far."""
        return self._kv_copies() + self._kv_disk

    def collectives(self, window: Interval) -> tuple[float, int]:
        """Milliseconds with other ranks in ``window`` (host seconds), and how many collectives ended in it."""
        inside = [span for span in self._collectives() if window[0] <= span[1] <= window[1]]
        return covered_ms(inside, window), len(inside)

    def phase(self, name: str, window: Interval, steps: range, passes: range) -> PhaseStats:
        """What happened in ``window`` (host seconds), whose passes took the ``steps`` of the pass order.

        ``steps`` are empty where no weights are managed; ``passes`` are the same by number since the model's start.
        """
        reads, copies = list(self.reads), self.copies()
        uses = [use for use in self.uses() if use.step in steps]
        kv = self.kv_transfers()
        decodings = [found for found in self.decodings() if window[0] <= found.start < window[1]]
        by_tier = {tier: [t for t in kv if t.tier == tier] for tier in KV_TIERS}

        def busy(moves: Iterable[Transfer | KVTransfer]) -> float | None:
            return covered_ms(((t.start, t.end) for t in moves), window) or None

        busy_ms = {tier: busy(moves) for tier, moves in by_tier.items()} | {"ssd": busy(reads), "h2d": busy(copies)}
        link_ms = busy((*copies, *by_tier["kv_h2d"]))
        wall_ms, kv_stall_ms = 1e3 * (window[1] - window[0]), covered_ms(self.kv_waits(), window)
        held_ms = covered_ms(((use.asked, use.done) for use in uses), window)
        computed_ms = 1e3 * sum(use.done - use.granted for use in uses) - kv_stall_ms
        return PhaseStats(
            name=name,
            passes=len(passes),
            wall_ms=wall_ms,
            bytes={
                "ssd_read": sum(t.nbytes for t in reads if t.step in steps),
                "weight_h2d": sum(t.nbytes for t in copies if t.step in steps),
                **{tier: sum(t.nbytes for t in moves if t.pass_no in passes) for tier, moves in by_tier.items()},
            },
            bytes_moved={
                "ssd_read": moved_bytes(reads, window),
                "weight_h2d": moved_bytes(copies, window),
                **{tier: moved_bytes(moves, window) for tier, moves in by_tier.items()},
            },
            busy_ms={**busy_ms, "compute": computed_ms if uses else None},
            stall_ms={
                "ssd": covered_ms(self.starved, window) if reads else None,
                "h2d": 1e3 * sum(use.granted - use.asked for use in uses) if uses and copies else None,
                "kv": kv_stall_ms if kv else None,
            },
            idle_ms={
                "ssd": None if busy_ms["ssd"] is None else wall_ms - busy_ms["ssd"],
                "h2d": None if link_ms is None else wall_ms - link_ms,
                "compute": wall_ms - held_ms if uses else None,
            },
            decoding_ms=1e3 * sum(found.end - found.start for found in decodings) if decodings else None,
            decoded_bytes=sum(found.nbytes for found in decodings),
        )
