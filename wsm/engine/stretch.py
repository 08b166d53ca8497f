"""What a stretch of a run comes to: sums, into which records are folded soon after they are made."""

from __future__ import annotations

import math
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from wsm.engine.records import KV_TIERS, Interval, KVTransfer, Records, Transfer, Use, length_s, merged, moved_bytes

Moves = Sequence[Transfer | KVTransfer]
TIERS = ("ssd_read", "weight_h2d", *KV_TIERS)
_BUSY = {"ssd": "ssd_read", "h2d": "weight_h2d", **{tier: tier for tier in KV_TIERS}}
"""How the tiers are called where it is their time that is meant."""


@dataclass(frozen=True, slots=True)
class PhaseStats:
    """What a phase (a stretch of the host's clock that covers whole passes) moved and waited for.

    ``bytes`` counts what its passes used, whenever it was fetched; ``bytes_moved`` what moved inside its stretch of
    time. Keys of both: ``ssd_read``, ``weight_h2d``, ``kv_h2d``, ``kv_d2h``, and of a KV device ``kv_read`` and
    ``kv_write``. ``stall_ms`` is the time that the next tier waited for this one: the link for the SSD's bytes, the
    computation for the link's weights (``h2d``) or KV (``kv``). ``idle_ms`` is the time that a tier did nothing,
    waited for or not; the link is idle while neither weights nor KV are copied, and ``compute`` between its passes:
    embedding, head, sampling and read-back, so its busy time, the stalls of ``h2d`` and ``kv`` and its idle time make
    up the phase. ``decoding_ms`` is the part of computing in which matrices were decoded, to ``decoded_bytes``.
    ``drafting_ms`` is the time in which a draft computed, ``drafting_link_ms`` the part of it in which the link copied.
    ``whole`` is the stretch's, where it was asked for. What was not measured is None.
    """

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
    drafting_ms: float | None = None
    drafting_link_ms: float | None = None
    whole: dict[str, MoveRate] = field(default_factory=dict)


class MoveRate(NamedTuple):
    """Moves over one tier, their bytes, and the seconds in which any of them was under way."""

    moves: int
    nbytes: int
    busy_s: float

    @property
    def MBps(self) -> float:
        return self.nbytes / self.busy_s / 1e6 if self.busy_s else math.inf


NOTHING_MOVED = MoveRate(0, 0, 0.0)


def together(rates: Sequence[MoveRate]) -> MoveRate:
    """All their moves as one rate; seconds in which those of two were under way count twice."""
    return MoveRate(sum(r.moves for r in rates), sum(r.nbytes for r in rates), sum(r.busy_s for r in rates))


class Cover:
    """Seconds that intervals cover, however many at a time; of those that are long over only the sum is kept."""

    __slots__ = ("_recent", "_settled", "_sum_s")

    def __init__(self) -> None:
        self._sum_s, self._settled = 0.0, -math.inf
        self._recent: list[Interval] = []

    def add(self, intervals: Iterable[Interval], window: Interval) -> None:
        """What of them is inside ``window``."""
        first, last = max(window[0], self._settled), window[1]
        inside = [(max(start, first), min(end, last)) for start, end in intervals if start < last and end > first]
        if inside:
            self._recent = merged([*self._recent, *inside])

    def settle(self, before: float) -> None:
        """Nothing comes any more that begins earlier."""
        self._settled = before
        if self._recent and self._recent[0][1] <= before:
            self._sum_s += length_s(span for span in self._recent if span[1] <= before)
            self._recent = [span for span in self._recent if span[1] > before]

    @property
    def ms(self) -> float:
        return 1e3 * (self._sum_s + length_s(self._recent))


class Stretch:
    """From ``start`` on, in seconds of the host's clock, until it is closed; its passes take ``steps`` and ``passes``.

    Args:
        step: the first place in the pass order that is its own; 0 where no weights are managed.
        pass_no: the number of its first pass since the model's start.
        seen: kinds of records that the run has had so far, one set for all its stretches.
        records: whether to keep every record of it, as a trace needs them.

    ``whole`` has of each of ``TIERS`` what began and ended inside; moves across its edges do not blur that rate.
    """

    def __init__(self, start: float, step: int, pass_no: int, seen: set[str], *, records: bool = False) -> None:
        self.window: Interval = (start, math.inf)
        self.steps, self.passes = range(step, sys.maxsize), range(pass_no, sys.maxsize)
        self.records = Records() if records else None
        self._rates = array("d")  # three numbers a pass, in as little memory as that
        self.collectives = 0
        self.collectives_cover = Cover()
        self._seen = seen
        self._bytes, self._moved = Counter[str](), dict.fromkeys(TIERS, 0.0)
        self._busy = {tier: Cover() for tier in (*TIERS, "link")}
        self.whole = dict.fromkeys(TIERS, NOTHING_MOVED)
        self._starved, self._kv_waits, self._held = Cover(), Cover(), Cover()
        self._drafts, self._link_or_draft = Cover(), Cover()
        self._waited_s = self._used_s = 0.0
        self._uses = 0
        self._decoding_s, self._decoded_bytes = 0.0, 0

    def close(self, end: float, step: int, pass_no: int) -> None:
        """It ends; ``step`` and ``pass_no`` are the next one's first."""
        self.window = self.window[0], end
        self.steps, self.passes = range(self.steps.start, step), range(self.passes.start, pass_no)

    def settle(self, before: float) -> None:
        """No record comes any more of anything that began earlier."""
        waits, drafts = (self._starved, self._kv_waits, self._held), (self._drafts, self._link_or_draft)
        for cover in (*self._busy.values(), *waits, *drafts, self.collectives_cover):
            cover.settle(before)

    # -- what is folded in

    def add(self, new: Records) -> None:
        """What of ``new`` concerns it: moved in its time, or belongs to its passes."""
        if (reads := self._add_moves("ssd_read", new.reads, self._own(new.reads))).moves:
            self._rates.extend(reads)
        self._add_moves("weight_h2d", new.copies, self._own(new.copies))
        for tier in KV_TIERS if new.kv else ():
            moves = [t for t in new.kv if t.tier == tier]
            self._add_moves(tier, moves, [t for t in moves if t.pass_no in self.passes])
        self._add_uses([use for use in new.uses if use.step in self.steps])
        on_link: list[Transfer | KVTransfer] = [*new.copies, *(t for t in new.kv if t.tier == "kv_h2d")]
        copying = [(t.start, t.end) for t in on_link]
        for cover, spans in (
            (self._busy["link"], copying),
            (self._drafts, new.drafts),
            (self._link_or_draft, [*copying, *new.drafts]),
            (self._starved, new.starved),
            (self._kv_waits, new.kv_waits),
        ):
            cover.add(spans, self.window)
        made = [found for found in new.decodings if self.window[0] <= found.start < self.window[1]]
        self._decoding_s += length_s((found.start, found.end) for found in made)
        self._decoded_bytes += sum(found.nbytes for found in made)
        ended_inside = [span for span in new.collectives if self.window[0] <= span[1] <= self.window[1]]
        self.collectives += len(ended_inside)
        self.collectives_cover.add(ended_inside, self.window)
        if self.records is not None:
            self._keep(self.records, new)

    def _own(self, moves: Sequence[Transfer]) -> list[Transfer]:
        """What its passes used. None is asked for first: a range looks through all its numbers for what is none."""
        return [t for t in moves if t.step is not None and t.step in self.steps]

    def _add_moves(self, tier: str, moves: Moves, own: Moves) -> MoveRate:
        """Gives those of ``moves`` that began and ended in its time."""
        self._bytes[tier] += sum(t.nbytes for t in own)
        self._moved[tier] += moved_bytes(moves, self.window)
        self._busy[tier].add(((t.start, t.end) for t in moves), self.window)
        # Moves that overlap those of another fold count twice in the time: the rate is never too high.
        whole = [t for t in moves if self.window[0] <= t.start and t.end <= self.window[1]]
        busy_s = length_s(merged((t.start, t.end) for t in whole))
        inside = MoveRate(len(whole), sum(t.nbytes for t in whole), busy_s)
        self.whole[tier] = together([self.whole[tier], inside])
        return inside

    def _add_uses(self, own: list[Use]) -> None:
        self._uses += len(own)
        self._waited_s += sum(use.granted - use.asked for use in own)
        self._used_s += sum(use.done - use.granted for use in own)
        self._held.add(((use.asked, use.done) for use in own), self.window)

    def _keep(self, kept: Records, new: Records) -> None:
        first, last = self.window

        def overlap(start: float, end: float) -> bool:
            return start < last and end > first

        for mine, moves in ((kept.reads, new.reads), (kept.copies, new.copies)):
            mine += [t for t in moves if overlap(t.start, t.end) or (t.step is not None and t.step in self.steps)]
        kept.uses += [use for use in new.uses if overlap(use.asked, use.done)]
        kept.kv += [t for t in new.kv if overlap(t.start, t.end)]
        kept.decodings += [found for found in new.decodings if overlap(found.start, found.end)]
        kept.kv_waits += [span for span in new.kv_waits if overlap(*span)]
        kept.drafts += [span for span in new.drafts if overlap(*span)]

    # -- what it comes to

    @property
    def read_rates(self) -> list[MoveRate]:
        """Of the reads inside, pass by pass."""
        reads, nbytes, busy_s = self._rates[::3], self._rates[1::3], self._rates[2::3]
        return [MoveRate(int(n), int(b), s) for n, b, s in zip(reads, nbytes, busy_s, strict=True)]

    def stats(self) -> PhaseStats:
        """To be asked when it is closed and all is folded in."""
        wall_ms, held_ms = 1e3 * (self.window[1] - self.window[0]), self._held.ms
        busy_ms = {name: self._busy[tier].ms or None for name, tier in _BUSY.items()}
        link_ms, kv_stall_ms = self._busy["link"].ms, self._kv_waits.ms
        waits = self._uses and "copies" in self._seen
        drafting_ms = self._drafts.ms if "drafts" in self._seen else None
        return PhaseStats(
            passes=len(self.passes),
            wall_ms=wall_ms,
            bytes={tier: self._bytes[tier] for tier in TIERS},
            bytes_moved={tier: round(moved) for tier, moved in self._moved.items()},
            busy_ms={**busy_ms, "compute": 1e3 * self._used_s - kv_stall_ms if self._uses else None},
            stall_ms={
                "ssd": self._starved.ms if "reads" in self._seen else None,
                "h2d": 1e3 * self._waited_s if waits else None,
                "kv": kv_stall_ms if "kv" in self._seen else None,
            },
            idle_ms={
                "ssd": None if busy_ms["ssd"] is None else wall_ms - busy_ms["ssd"],
                "h2d": wall_ms - link_ms if link_ms else None,
                "compute": wall_ms - held_ms if self._uses else None,
            },
            decoding_ms=1e3 * self._decoding_s if self._decoded_bytes else None,
            decoded_bytes=self._decoded_bytes,
            drafting_ms=drafting_ms,
            drafting_link_ms=None if drafting_ms is None else drafting_ms + link_ms - self._link_or_draft.ms,
        )
