"""The link to the device: one queue, shared piece by piece by whoever copies."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

from wsm.engine.device import Event

PIECE_BYTES = 64 << 20
"""A copy's unit: large enough for the link's full rate, small enough for no one to wait long behind it."""
PIECES_QUEUED = 4


class Link:
    """Turns to queue a copy of one piece: whoever needs its bytes soonest goes next, and few pieces are queued at once.

    A device's copy engine is one queue, so what is queued cannot be overtaken. Two things are shared, under
    ``_changed``: the line of those who wait, and whose turn it is; the events of queued pieces belong to that one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: list[tuple[int, int]] = []
        self._taken = False
        self._number = count()
        self._queued: deque[Event] = deque()

    @contextmanager
    def turn(self, needed_at: int) -> Iterator[Event | None]:
        """The right to queue one piece, which must be told to :meth:`queued` before the block ends.

        Yields the event behind the piece that was queued last, None if that is over: the link has nothing to do then.

        Args:
            needed_at: the place in the endless pass order that the bytes are for; the smaller goes first.
        """
        ticket = needed_at, next(self._number)
        with self._changed:
            self._line.append(ticket)
            self._changed.wait_for(lambda: not self._taken and min(self._line) == ticket)
            self._line.remove(ticket)
            self._taken = True
        try:
            while len(self._queued) >= PIECES_QUEUED:
                self._queued.popleft().synchronize()
            yield self._queued[-1] if self._queued and not self._queued[-1].query() else None
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()

    def queued(self, end: Event) -> None:
        """A piece is queued up to its event ``end``."""
        self._queued.append(end)
