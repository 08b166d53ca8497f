"""Which KV is where below the model: the state that the computation, the fetching and the writing thread share."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import add

from torch import Tensor

from wsm.engine.device import Event
from wsm.engine.slots import Slot
from wsm.engine.threads import SharedState
from wsm.layout.kv import KV_BLOCK_TOKENS, KVPlacement, Unit


@dataclass(frozen=True, slots=True)
class Fetch:
    """A unit to bring for a pass into ``room``: a window on the device, or a slot of CPU memory on the way there.

    ``lengths`` are the tokens to bring of each of its rows, 0 of one that has ended. Where ``k`` is not 0, so many
    blocks are brought of each row and head, those that ``wanted`` names: int64 ``[rows, n_kv_heads, k]`` on the device,
    for the rows from ``first`` on. ``staged`` is the slot that has the bytes of a unit on the disk.
    """

    unit: Unit
    pass_no: int
    room: Slot
    lengths: tuple[int, ...]
    k: int
    wanted: Tensor | None
    first: int
    epoch: int
    staged: Slot | None = None


@dataclass(frozen=True, slots=True)
class Write:
    """What a pass has added to a unit, to be put into its tier.

    ``before`` and ``after`` are the tokens of each row, equal where nothing is to be written. ``fresh`` has the new
    records, ``uint8 [changed rows, n_kv_heads, 2, record]``; where it is None, they are in ``window``. ``wanted`` as in
    :class:`Fetch`, for the next one.
    """

    unit: Unit
    pass_no: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    fresh: Tensor | None
    window: Slot | None
    done: Event
    changed: tuple[int, ...]
    wanted: Tensor | None


@dataclass(slots=True)
class _Progress:
    """How often a unit was entered and how many of those uses have reached its tier, since the start."""

    entered: int = 0
    applied: int = 0
    wanted: Tensor | None = None
    first: int = 0


@dataclass(slots=True)
class _Pass:
    """The passes that are fetched for: one that was begun, and those like it that may follow.

    ``fetched`` and ``used`` count units since ``origin``; they only grow, used <= fetched <= used + windows.
    """

    units: tuple[Unit, ...] = ()
    stretches: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    origin: int = 0
    k: int = 0
    decoding: bool = False
    staged: int = 0
    fetched: int = 0
    used: int = 0
    entered_before: dict[Unit, int] = field(default_factory=dict)

    def lengths(self, pass_no: int) -> tuple[list[int], list[int]]:
        """Tokens of all rows before and after a pass like the one that was begun."""
        grown = [(pass_no - self.origin) * (new - old) for old, new in zip(self.before, self.after, strict=True)]
        return list(map(add, self.before, grown)), list(map(add, self.after, grown))


class KVSchedule(SharedState):
    """One owner of every window, slot and unit. Everything below is read and written under ``_lock`` alone.

    Invariants:

    * Windows are filled and used in one order, that of the pass; a decode pass is expected to follow a decode pass.
    * A unit is fetched for a pass only when what all earlier passes added to it has reached its tier.
    * A window is free, being filled, filled, in use, or draining; nobody but its owner touches it.
    * A slot is free, being filled from the disk, filled (``_staged``), or being copied on.
    * The computation drops what is expected of coming passes by raising ``_epoch``, and does no more, since Ctrl-C may
      come at any point there: the thread that fills slots gives back those of older epochs.
    """

    def __init__(self, placement: KVPlacement, windows: Sequence[Slot], slots: Sequence[Slot]) -> None:
        super().__init__("the KV tiers")
        self._layout, self._disk = placement.layout, frozenset(placement.disk)
        self._windows, self._free, self._free_slots = tuple(windows), deque(windows), deque(slots)
        self._slots = len(slots)
        self._ready: deque[Fetch] = deque()
        self._in_use: dict[Unit, Fetch] = {}
        self._writes: deque[Write] = deque()
        self._writing: Write | None = None
        self._fetching: Fetch | None = None
        self._staged: dict[tuple[int, int, Unit], Slot] = {}
        self._units = {unit: _Progress() for unit in (*placement.cpu, *placement.disk)}
        self._pass = _Pass()
        self._epoch = 0
        self._ended: set[int] = set()
        self.passes = 0
        self.blocks_fetched = self.blocks_whole = 0

    # -- what the computation tells and asks

    def begin(self, stretches: Sequence[int], before: Sequence[int], after: Sequence[int], k: int) -> None:
        """A pass begins; what was fetched in expectation of another kind of pass is dropped.

        It uses these ``stretches`` of every layer, in order. Rows of the cache have so many tokens ``before`` and
        ``after`` it; ``k`` blocks of a row are brought where it has more, 0 for all.
        """
        decoding = all(after[row] - before[row] <= 1 for row in range(len(before)))
        with self._lock:
            self.passes += 1
            now = self._pass
            alike = (now.stretches, now.k) == (tuple(stretches), k) and now.decoding and decoding
            if (alike and now.lengths(self.passes - 1) == (list(before), list(after))) or not self._units:
                return
            self._epoch += 1
            self._free.extend(fetch.room for fetch in self._ready)
            self._ready.clear()
            layers = range(self._layout.n_layers)
            units = [Unit(layer, stretch) for layer in layers for stretch in stretches]
            used = tuple(unit for unit in units if unit in self._units)
            coming = _Pass(used, tuple(stretches), tuple(before), tuple(after), self.passes - 1, k, decoding)
            coming.entered_before = {unit: self._units[unit].entered for unit in used}
            self._pass = coming  # whole, whenever Ctrl-C comes
            self._wake()

    def enter(self, unit: Unit) -> Fetch:
        """The filled window of the unit that the pass has next (ValueError for another), once its copy is queued."""
        with self._lock:
            now = self._pass
            if not now.units or now.units[now.used % len(now.units)] != unit:
                raise ValueError(f"the KV of {unit} was asked for out of the order of the pass")

        def take() -> Fetch | None:
            if not self._ready:
                return None
            fetch = self._ready.popleft()
            now.used += 1
            self._units[unit].entered += 1
            self._in_use[unit] = fetch
            self._count_blocks(fetch)
            return fetch

        return self._wait(take)

    def leave(self, unit: Unit, done: Event, fresh: Tensor | None, wanted: Tensor | None) -> None:
        """The computation on the unit's window is queued up to ``done``."""
        with self._lock:
            fetch = self._in_use.pop(unit)
            before, after = self._lengths(unit, fetch.pass_no)
            changed = tuple(row for row, (old, new) in enumerate(zip(before, after, strict=True)) if new > old)
            fetch.room.drained = done
            if fresh is not None:
                self._free.append(fetch.room)
            window = fetch.room if fresh is None else None
            self._writes.append(Write(unit, fetch.pass_no, before, after, fresh, window, done, changed, wanted))
            progress = self._units[unit]
            progress.wanted, progress.first = wanted, changed[0] if changed else 0
            self._wake()

    def _lengths(self, unit: Unit, pass_no: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """:meth:`_Pass.lengths` of the unit's rows."""
        before, after = self._pass.lengths(pass_no)
        rows = self._layout.rows_of(unit.stretch)
        return tuple(before[row] for row in rows), tuple(after[row] for row in rows)

    def active(self, unit: Unit, row: int) -> bool:
        """Whether a row of the unit, counted from its first, may be asked for again."""
        return self._layout.rows_of(unit.stretch)[row] not in self._ended

    def end_row(self, row: int) -> None:
        """A row's KV will not be asked for again."""
        with self._lock:
            self._ended.add(row)

    def reset(self) -> None:
        """Every row is empty; a pass that was broken off is forgotten, what is being written goes on.

        Windows, and what is still to be written, are counted anew: Ctrl-C, between any two lines of :meth:`enter` or
        :meth:`leave`, may lose neither.
        """
        with self._lock:
            self._epoch += 1
            self._ready.clear()
            self._in_use.clear()
            self._ended.clear()
            self._pass = _Pass()
            writes = [*self._writes, *([self._writing] if self._writing else [])]
            elsewhere = [write.window for write in writes]
            elsewhere += [self._fetching.room] if self._fetching else []
            self._free = deque(window for window in self._windows if not any(window is held for held in elsewhere))
            for unit, progress in self._units.items():
                progress.entered = progress.applied + sum(write.unit == unit for write in writes)
            self.blocks_fetched = self.blocks_whole = 0
            self._wake()

    def wait_idle(self) -> None:
        """After :meth:`reset`: until no thread writes, fetches or stages any more."""

        def idle() -> bool | None:
            staging = len(self._free_slots) + len(self._staged) < self._slots
            return None if self._writes or self._writing or self._fetching or staging else True

        self._wait(idle)

    # -- what the fetching and the staging thread ask and tell

    def claim_fetch(self) -> Fetch | None:
        """A unit that can be fetched from CPU memory now, with a window."""
        now = self._pass
        fetch = self._fetch_at(now.fetched, self._free[0]) if now.units and self._free else None
        if fetch is not None and fetch.unit in self._disk:
            staged = self._staged.pop((fetch.epoch, fetch.pass_no, fetch.unit), None)
            fetch = None if staged is None else replace(fetch, staged=staged)
        if fetch is not None:
            self._free.popleft()
            now.fetched += 1
            self._fetching = fetch
        return fetch

    def claim_staging(self) -> Fetch | None:
        """The next unit of the disk, if it can be read now, with a slot."""
        for key in [key for key in self._staged if key[0] < self._epoch]:
            self._free_slots.append(self._staged.pop(key))
        now = self._pass
        now.staged = max(now.staged, now.fetched)
        while self._free_slots and now.staged < now.fetched + len(now.units):
            if now.units[now.staged % len(now.units)] in self._disk:
                fetch = self._fetch_at(now.staged, self._free_slots[0])
                if fetch is not None:
                    self._free_slots.popleft()
                    now.staged += 1
                return fetch
            now.staged += 1
        return None

    def staged(self, fetch: Fetch) -> None:
        """The unit's bytes are in the slot that it was claimed with."""
        with self._lock:
            self._staged[fetch.epoch, fetch.pass_no, fetch.unit] = fetch.room
            self._wake()

    def dropped(self, fetch: Fetch) -> bool:
        """Whether what it was made for is not expected any more."""
        with self._lock:
            return fetch.epoch < self._epoch

    def _fetch_at(self, place: int, room: Slot) -> Fetch | None:
        """The fetch at a place of the sequence since the pass was begun; None while it may not be made yet."""
        now = self._pass
        later, index = divmod(place, len(now.units))
        unit, pass_no = now.units[index], now.origin + later
        progress = self._units[unit]
        if (later and not now.decoding) or progress.applied < now.entered_before[unit] + later:
            return None
        before, _ = self._lengths(unit, pass_no)
        rows = self._layout.rows_of(unit.stretch)
        compact = now.k > 0 and -(-(max(before) + 1) // KV_BLOCK_TOKENS) > now.k
        lengths = tuple(0 if row in self._ended else length for row, length in zip(rows, before, strict=True))
        k = now.k if compact else 0
        return Fetch(unit, pass_no, room, lengths, k, progress.wanted, progress.first, self._epoch)

    def _count_blocks(self, fetch: Fetch) -> None:
        """For the share of the context that passes attend; the block that the new token begins is not one."""
        for length in fetch.lengths:
            blocks, begun = -(-length // KV_BLOCK_TOKENS), length % KV_BLOCK_TOKENS > 0
            self.blocks_whole += blocks
            self.blocks_fetched += min(blocks, fetch.k - 1 + begun) if fetch.k else blocks

    def fetched(self, fetch: Fetch, filled: Event) -> None:
        """The copy is queued up to its event ``filled``; nobody may want it any more."""
        with self._lock:
            fetch.room.filled, self._fetching = filled, None
            if fetch.staged is not None:
                fetch.staged.drained = filled
                self._free_slots.append(fetch.staged)
            if fetch.epoch == self._epoch:
                self._ready.append(fetch)
            else:
                self._free.append(fetch.room)
            self._wake()

    # -- what the writing thread asks and tells

    def next_write(self) -> Write | None:
        """Wait for something to write; None once closing, when all that a pass has added is written."""

        def claim() -> Write | None:
            self._writing = self._writes.popleft() if self._writes else None
            return self._writing

        return self.next(claim, to_the_end=True)

    def written(self, write: Write) -> None:
        """All that was added is in its tier, and its window, if it had one, has been read."""
        with self._lock:
            self._units[write.unit].applied += 1
            self._writing = None
            if write.window is not None:
                self._free.append(write.window)
            self._wake()
