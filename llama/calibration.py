"""What a model's matrices are multiplied with: second moments of their inputs, gathered in one streamed prefill."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import TracebackType

import torch
from torch import Tensor

from llama.llm import LLaMA
from wsm import stop, threads
from wsm.errors import UnusableInput
from wsm.layout.groups import GroupId


class _Ended(BaseException):
    """Nobody wants more moments."""


class Calibration:
    """A prefill of ``llm`` over ``windows``, a group at a time; a context manager.

    With ``feedback`` the moments of an input are the mean products of each two of its channels, float32 ``[cols,
    cols]``, else the mean squares, ``[cols]``. Only one group's are held at a time: the prefill goes on when the next
    group is asked for.
    """

    def __init__(self, llm: LLaMA, windows: Sequence[Sequence[int]], *, feedback: bool) -> None:
        self._llm, self._windows, self._feedback = llm, windows, feedback
        self._tokens = sum(map(len, windows))
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._ready = SimpleQueue[tuple[GroupId, dict[str, Tensor]] | BaseException]()
        self._go_on = SimpleQueue[bool]()
        self._over = False
        self._thread = threads.Thread(target=self._prefill, name="wsm-calibrate", daemon=True)

    def moments(self, group: GroupId) -> dict[str, Tensor]:
        """Of every matrix of ``group``, by short name, on the compute device; to be asked for in pass order.

        For the main thread: a wish to stop is heard. Raises what the prefill raised.
        """
        self._go_on.put(True)
        while True:
            stop.check()
            with suppress(Empty):
                came = self._ready.get(timeout=stop.LOOK_S)
                break
        if isinstance(came, BaseException):
            raise came
        found, moments = came
        if found != group:
            raise ValueError(f"the moments of {found} come next, not those of {group}")
        return moments

    def __enter__(self) -> Calibration:
        threads.start(self._thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._go_on.put(False)
        threads.join([self._thread])

    # -- on the prefill's thread

    def _prefill(self) -> None:
        groups = self._llm.model.groups
        try:
            self._wait()
            self._llm.device.enter_thread()
            groups.observer = self
            self._llm.generate(self._windows, max_new_tokens=1, temperature=0, ignore_eos=True)
            self._ready.put(UnusableInput("the prefill is over: there are no more moments"))
        except _Ended:
            pass
        except BaseException as error:  # the packing thread's to raise
            self._ready.put(error)
        finally:
            groups.observer = None

    def saw(self, group: GroupId, names: Sequence[str], x: Tensor) -> None:
        """Add the inputs ``x [n, cols]`` of a product."""
        if self._over:
            raise _Ended
        wide, cols, key = x.float(), x.shape[1], tuple(names)
        if key not in self._sums:
            self._sums[key] = wide.new_zeros((cols, cols) if self._feedback else cols)
        if self._feedback:
            self._sums[key].addmm_(wide.t(), wide)
        else:
            self._sums[key] += wide.square().sum(0)

    def left(self, group: GroupId) -> None:
        """Hand over what came together, and wait until the next group is wanted."""
        moments = {name: sums.div_(self._tokens) for names, sums in self._sums.items() for name in names[:1]}
        moments |= {name: moments[names[0]] for names in self._sums for name in names[1:]}
        self._sums = {}
        if self._llm.inputs.device.type == "cuda":
            torch.cuda.current_stream(self._llm.inputs.device).synchronize()  # they are read on another thread's stream
        self._ready.put((group, moments))
        del moments
        self._wait()

    def _wait(self) -> None:
        if not self._go_on.get():
            raise _Ended
