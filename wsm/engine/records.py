"""What is written down of a transfer, a wait and a use, and what such records come to inside a stretch of time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from wsm.layout.groups import GroupId
from wsm.store.source import ChunkRead

Interval = tuple[float, float]
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


@dataclass(slots=True)
class Records:
    """Records of every kind: ``reads`` are SSD -> CPU, ``copies`` CPU -> GPU, a group in as many parts as it was broken
    into; ``starved`` is when the link waited for reads, ``kv_waits`` when the computation waited for KV, ``drafts``
    when it was with the draft.
    """

    reads: list[Transfer] = field(default_factory=list)
    copies: list[Transfer] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    kv: list[KVTransfer] = field(default_factory=list)
    starved: list[Interval] = field(default_factory=list)
    kv_waits: list[Interval] = field(default_factory=list)
    collectives: list[Interval] = field(default_factory=list)
    decodings: list[Decoding] = field(default_factory=list)
    drafts: list[Interval] = field(default_factory=list)

    def __add__(self, other: Records) -> Records:
        """Those of two stretches, what is of both once."""
        names = [each.name for each in fields(self)]
        return Records(**{name: list(dict.fromkeys(getattr(self, name) + getattr(other, name))) for name in names})


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals, as disjoint intervals in order."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def length_s(intervals: Iterable[Interval]) -> float:
    """Seconds that intervals take, one after the other."""
    return sum(end - start for start, end in intervals)


def moved_bytes(transfers: Iterable[Transfer | KVTransfer | ChunkRead], window: Interval) -> float:
    """Bytes that moved inside ``window``, a transfer across its edge counted by its share of time."""
    total = 0.0
    for transfer in transfers:
        length = transfer.end - transfer.start
        inside = min(transfer.end, window[1]) - max(transfer.start, window[0])
        if inside > 0 or (length == 0 and window[0] <= transfer.start < window[1]):
            total += transfer.nbytes * (inside / length if length > 0 else 1.0)
    return total
