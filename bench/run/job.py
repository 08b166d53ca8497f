"""A run of several ranks, from the start to the end of each: who joins, who prints, and why it ended.

A rank that fails tells the others why before it ends; one that cannot is missed by them. Either way every rank ends
with one sentence that names the rank to blame, and with its exit code.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from llama.parallel.watch import GRACE_S, LOST_S, START_S, Ending, RankFailed
from llama.parallel.world import ALONE, World
from wsm.errors import DoesNotFit, StoreError, UnusableInput
from wsm.settings import Ranks

if TYPE_CHECKING:
    from llama.parallel.ranks import TorchWorld

INTERRUPTED, INTERRUPTED_CODE = "interrupted", 130
SAME_END_S = 2.0
"""How long a rank waits to see whether all others fail in the same way."""


class Terminated(BaseException):
    """SIGTERM: torchrun ends all ranks of a host when one of them has ended."""


class Job:
    """One process's part in a run: one rank of several, or alone, when it only hands the exit code on."""

    world: World = ALONE

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self.size = ranks, ranks.size
        self._joined: TorchWorld | None = None

    @property
    def speaks(self) -> bool:
        """Whether this rank prints and writes what is the whole job's."""
        return self._ranks.rank == 0

    def refuse_other_ranks(self, verb: str) -> None:
        """Raises UnusableInput where several ranks were started for a verb that takes one process."""
        if self.size > 1:
            raise UnusableInput(
                f"{verb} takes one process, not {self.size} ranks: run it without torchrun"
                + (", with --tp for a store of several ranks" if verb == "pack" else "")
            )

    def check_tp(self, tp: int | None, argv: Sequence[str]) -> None:
        """Raises UnusableInput where ``--tp`` and the number of ranks disagree, with the command that mends it."""
        if tp is not None and tp != self.size:
            raise UnusableInput(
                f"--tp {tp} needs as many ranks, and there {'is 1' if self.size == 1 else f'are {self.size}'}: "
                + (f"torchrun --nproc-per-node {tp} " if tp > 1 else "")
                + f"bench_infer.py {shlex.join(argv)}"
            )

    def join(self) -> None:
        """Meet the other ranks.

        Raises:
            RankFailed: naming a rank that does not come.
            UnusableInput: where ranks cannot meet.
        """
        if self.size == 1:
            return
        from llama.parallel.ranks import join

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)
        self.world = self._joined = join(self._ranks, on_failure=self._interrupt, last_resort=self._last_resort)

    # -- while it runs

    def _on_signal(self, number: int, frame: FrameType | None) -> NoReturn:
        if self._joined is not None:
            self._joined.watch.check()
        raise Terminated

    def _interrupt(self, ending: Ending) -> None:
        """On the watch's thread: free the main thread from a collective, and make it raise."""
        self.world.abandon()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _last_resort(self, ending: Ending) -> None:
        """The main thread is stuck where no signal reaches it; the system takes back threads, files and memory."""
        if self._joined is not None:
            self._joined.watch.settle(ending)
            self._joined.watch.leave()
        _end_at_once(ending.code, ending.sentence)

    # -- the end

    def end(self, code: int, sentence: str | None, error: BaseException | None) -> tuple[int, str | None]:
        """The exit code and the sentence to print, with the other ranks' ends in view."""
        if self.size == 1:
            return code, sentence
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(number, signal.SIG_IGN)
        if self._joined is None:
            # Before the ranks have met, an error in the command is every rank's; one per host says it.
            return code, sentence if isinstance(error, RankFailed) or self._ranks.local_rank == 0 else None
        if code != 0:
            self._fail(self._joined, code, sentence, error)
        self._joined.watch.settle(None)
        self._leave(self._joined, START_S)
        self._joined.end()
        return code, sentence

    def _fail(self, world: TorchWorld, code: int, sentence: str | None, error: BaseException | None) -> NoReturn:
        ending = self._cause(error) or Ending(self._ranks.rank, world.watch.host, sentence or INTERRUPTED, code)
        world.watch.settle(ending)
        said: str | None = ending.sentence
        if ending.code == INTERRUPTED_CODE:  # Ctrl-C reaches all ranks of a terminal, in any order: said once a host
            own = isinstance(error, KeyboardInterrupt)
            said = None if error is None or self._ranks.local_rank else sentence if own else said
        elif ending.rank == self._ranks.rank:
            said = self._own(sentence, world.watch.endings(SAME_END_S))
        self._leave(world, GRACE_S)
        _end_at_once(ending.code, said)

    def _leave(self, world: TorchWorld, limit_s: float) -> None:
        if self._ranks.keeps_store:
            world.watch.wait_for_others(limit_s)  # they still read how the job ends
        world.watch.leave()

    def _cause(self, error: BaseException | None) -> Ending | None:
        """Another rank's end, where this one's follows from it."""
        from llama.parallel.ranks import CollectiveBroken

        assert self._joined is not None
        if isinstance(error, RankFailed):
            return error.ending
        if isinstance(error, CollectiveBroken | Terminated):
            return self._joined.watch.wait_for_failure(LOST_S + 2)
        own = (UnusableInput, DoesNotFit, StoreError, OSError, KeyboardInterrupt)
        return None if error is None or isinstance(error, own) else self._joined.watch.failure

    def _own(self, sentence: str | None, endings: Sequence[Ending | None]) -> str | None:
        """This rank's own sentence; where all fail alike, one of them says it, for the job."""
        if sentence is None:
            return None
        if all(ending is not None and ending.reason == sentence for ending in endings):
            return sentence if self.speaks else None
        return f"rank {self._ranks.rank} of {self._ranks.size}: {sentence}"


def _end_at_once(code: int, sentence: str | None) -> NoReturn:
    """Without the interpreter's end, where a broken process group's threads and destructors may wait for ever."""
    if sentence is not None:
        print(f"bench_infer.py: {sentence}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
