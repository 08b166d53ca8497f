"""How a thread starts and how it ends: with a sentence where it cannot, and never waited for without a limit."""

from __future__ import annotations

import mmap
import os
import resource
import threading
import time
from collections.abc import Sequence

from wsm.errors import DoesNotFit

JOIN_S = 30.0
"""For threads that were told to end: far more than a read or a copy takes that is under way."""
_LOOK_S = 0.002
_ROOM = 48 << 20
"""Address space that a new thread may need at once: a stack of 8 MiB, and for its first objects."""
_LIMITS = (
    (resource.RLIMIT_AS, "ulimit -v", "{:.2f} GB of address space", 1e9),
    (resource.RLIMIT_DATA, "ulimit -d", "{:.2f} GB of data", 1e9),
    (resource.RLIMIT_NPROC, "ulimit -u", "{:.0f} threads of this user", 1),
)


class ThreadsStuck(RuntimeError):
    """Threads did not end in time. They may still use their memory and files, which nobody may free."""


class Thread(threading.Thread):
    """One that tells by itself when its work is over.

    KeyboardInterrupt in Python's own ``join`` or ``is_alive`` takes a living thread for one that has ended (bpo-45274).
    """

    _over = False

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._over = True

    @property
    def has_ended(self) -> bool:
        """Whether it was started, and is over or gone.

        The system is asked, not Python: ``sys._current_frames`` may collect garbage while it holds a lock that a
        starting thread waits for with the interpreter's own, and then neither goes on.
        """
        return self._over or (self.native_id is not None and not os.path.exists(f"/proc/self/task/{self.native_id}"))


def limits() -> str:
    """The limits of this process that can refuse it memory or threads, in words: what the user may raise."""
    found = ((command, what, unit, resource.getrlimit(which)[0]) for which, command, what, unit in _LIMITS)
    said = [f"{what.format(soft / unit)} (`{command}`)" for command, what, unit, soft in found if soft >= 0]
    return f"the limits here are {' and '.join(said)}" if said else "a container's or the system's own limit is reached"


def start(thread: threading.Thread) -> None:
    """Start it; raises DoesNotFit, naming the limits, where there is no room for it.

    The room is tried first: a thread that dies of hunger before its first line would be waited for by
    ``Thread.start`` for ever.
    """
    try:
        mmap.mmap(-1, _ROOM).close()
        thread.start()
    except (OSError, MemoryError, RuntimeError) as error:
        raise DoesNotFit(
            f"the system refused the thread {thread.name} ({error}): {limits()}; raise them, or set OMP_NUM_THREADS=1"
        ) from error


def join(threads: Sequence[Thread], limit_s: float | None = None) -> None:
    """Wait until all that were started have ended; raises ThreadsStuck, naming them, after ``JOIN_S`` (or a limit)."""
    limit_s = JOIN_S if limit_s is None else limit_s
    until = time.monotonic() + limit_s
    started = [thread for thread in threads if thread.ident is not None]
    for thread in started:
        while not thread.has_ended and time.monotonic() < until:
            time.sleep(_LOOK_S)
        if thread.has_ended:
            thread.join(max(0.0, until - time.monotonic()))  # its last lines
    if left := [thread.name for thread in started if not thread.has_ended]:
        raise ThreadsStuck(
            f"{', '.join(left)} did not end within {limit_s:g} s, held up by a drive or a device: see dmesg; "
            "their memory stays taken until this process ends"
        )
