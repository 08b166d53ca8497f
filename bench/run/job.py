"""How a verb ends, alone or as one rank of several: the exit codes, and who joins, who prints. Imports no torch.

A rank that fails tells the others why before it ends; one that cannot is missed by them. Either way every rank ends
with one sentence that names the rank to blame, and with its exit code.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from bench.options.program import called, lacks
from bench.run.signals import exit_code, name_of
from llama.parallel.watch import GRACE_S, LOST_S, START_S, Ending, RankFailed
from llama.parallel.world import ALONE, World
from wsm import stop
from wsm.errors import DoesNotFit, StoreError, UnusableInput
from wsm.settings import Ranks
from wsm.stop import Stopped
from wsm.threads import ThreadsStuck, limits

if TYPE_CHECKING:
    from llama.parallel.ranks import TorchWorld

DONE, FAILED, UNUSABLE, TOO_LARGE, BAD_STORE = 0, 1, 2, 3, 4
_CODES: Mapping[type[BaseException], int] = {
    UnusableInput: UNUSABLE,
    ModuleNotFoundError: UNUSABLE,
    DoesNotFit: TOO_LARGE,
    StoreError: BAD_STORE,
    OSError: UNUSABLE,
}
SAME_END_S = 2.0
"""How long a rank waits to see whether all others fail in the same way."""


class Job:
    """One process's part in a run: one rank of several, or alone, when it only hands the exit code on."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self.size = ranks, ranks.size
        self.speaks = ranks.rank == 0  # this rank prints and writes what is the whole job's
        self.world: World = ALONE
        self._joined: TorchWorld | None = None

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
                + shlex.join([*called(tp), *argv])
            )

    def join(self) -> None:
        """Meet the other ranks; raises RankFailed, naming one that does not come, and UnusableInput where none can."""
        if self.size == 1:
            return
        from llama.parallel.ranks import join

        self.world = self._joined = join(self._ranks, on_failure=self._interrupt, last_resort=self._last_resort)

    # -- while it runs

    def blame(self, wish: Stopped) -> None:
        """Raises RankFailed where a stop is wished because another rank has failed.

        Such a failure may be seen late: torchrun ends all ranks of a host at once when one of them has ended.
        """
        if self._joined is not None:
            if wish.number == signal.SIGTERM:
                self._joined.watch.wait_for_failure(LOST_S + 2)
            self._joined.watch.check()

    def _interrupt(self, ending: Ending) -> None:
        """On the watch's thread: free the main thread from a collective, and make it stop."""
        stop.ask(signal.SIGTERM)
        self.world.abandon()

    def _last_resort(self, ending: Ending) -> None:
        """The main thread is stuck where no signal reaches it; the system takes back threads, files and memory."""
        if self._joined is not None:
            self._joined.watch.settle(ending)
            self._joined.watch.leave()
        _end_at_once(ending.code, ending.sentence)

    # -- the end

    def end(self, code: int, error: BaseException | None) -> tuple[int, str | None]:
        """The exit code (``code`` if no error came) and the sentence to print, the other ranks' ends in view."""
        sentence = None
        if error is not None:
            code, sentence = _code_of(error), _sentence_of(error)
        if isinstance(error, ThreadsStuck):
            _end_at_once(code, sentence)
        if self.size == 1:
            return code, sentence
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
        ending = self._cause(error) or Ending(self._ranks.rank, world.watch.host, sentence or "interrupted", code)
        world.watch.settle(ending)
        said: str | None = ending.sentence
        if ending.code > 128:  # Ctrl-C reaches all ranks of a terminal, in any order: said once a host
            own = isinstance(error, Stopped)
            said = None if error is None or self._ranks.local_rank else sentence if own else said
        elif ending.rank == self._ranks.rank:
            # Where all fail alike, one of them says it, for the job.
            alike = all(end is not None and end.reason == sentence for end in world.watch.endings(SAME_END_S))
            said = f"rank {self._ranks.rank} of {self._ranks.size}: {sentence}"
            if alike:
                said = sentence if self.speaks else None
        self._leave(world, GRACE_S)
        _end_at_once(ending.code, said)

    def _leave(self, world: TorchWorld, limit_s: float) -> None:
        if self._ranks.keeps_store:
            world.watch.wait_for_others(limit_s)  # they still read how the job ends
        world.watch.leave()

    def _cause(self, error: BaseException | None) -> Ending | None:
        """Another rank's end, where this one's follows from it."""
        assert self._joined is not None
        if isinstance(error, RankFailed):
            return error.ending
        if _broke_a_collective(error) or (isinstance(error, Stopped) and error.number == signal.SIGTERM):
            return self._joined.watch.wait_for_failure(LOST_S + 2)
        return None if error is None or isinstance(error, (*_CODES, Stopped)) else self._joined.watch.failure


def _broke_a_collective(error: BaseException | None) -> bool:
    """Also where a capture that the collective was in says afterwards, in its own words, that it is of no use."""
    from llama.parallel.ranks import CollectiveBroken

    while error is not None and not isinstance(error, CollectiveBroken):
        error = error.__cause__ or error.__context__
    return error is not None


def _end_at_once(code: int, sentence: str | None) -> NoReturn:
    """Without the interpreter's end, where a broken process group's threads and destructors may wait for ever."""
    if sentence is not None:
        print(f"bench_infer.py: {sentence}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _code_of(error: BaseException) -> int:
    """The exit code of what ended a verb."""
    if isinstance(error, RankFailed):
        return error.ending.code
    if isinstance(error, Stopped):
        return exit_code(error.number)
    if _ran_out(error) or _was_refused(error):
        return TOO_LARGE
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), FAILED)


def _ran_out(error: BaseException) -> bool:
    """Whether it is torch's error of a GPU without memory; where that was raised, torch is imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _was_refused(error: BaseException) -> bool:
    """Whether the system refused CPU memory or a thread: Python's own error, torch's, or the loader's of a library."""
    if isinstance(error, UnusableInput | StoreError):
        return False
    if isinstance(error, OSError):
        return error.errno in (errno.ENOMEM, errno.EAGAIN)
    said = ("can't allocate memory", "can't start new thread", "failed to map segment", "annot allocate memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in said)


def is_foreseen(error: BaseException) -> bool:
    """Whether a sentence says it all; anything else is a fault of this program, and its traceback is wanted."""
    return isinstance(error, (*_CODES, RuntimeError, Stopped)) or _was_refused(error)


def _sentence_of(error: BaseException) -> str:
    """What the user reads."""
    if isinstance(error, ModuleNotFoundError):
        return lacks(error.name)
    if _ran_out(error):
        return (
            f"the GPU ran out of memory: {str(error).splitlines()[0]} "
            "Lower --gpu-cached-layers, then --group-prefetch-depth, then --batch-size"
        )
    if _was_refused(error) and not isinstance(error, DoesNotFit):
        what = (str(error).splitlines() or [type(error).__name__])[0]
        return f"the system refused memory or a thread ({what}): {limits()}; raise them, or make the run smaller"
    if isinstance(error, Stopped):
        said = "interrupted" if error.number == signal.SIGINT else f"ended by {name_of(error.number)}"
        return f"{said}; nothing half-written was left"
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    return str(error) or type(error).__name__
