"""Encoding and decoding on threads that compute alone."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue

import torch

from wsm import threads
from wsm.formats.format import pieces

Piece = Callable[[], None]


def each_piece(do: Callable[[slice], None], total: int, device: torch.device, unit: int = 1) -> None:
    """``do`` each of :func:`wsm.formats.format.pieces`, in any order; on the CPU several at once."""
    parts = [partial(do, part) for part in pieces(total, device, unit)]
    if device.type == "cpu":
        spread(parts)
    else:
        for part in parts:
            part()


def spread(parts: Sequence[Piece]) -> None:
    """Do pieces of work on as many threads as torch has, each piece on one, and wait; the first failure is raised.

    Torch itself would cut every operation into shares and wait for the slowest, tens of thousands of times a matrix:
    where other processes want the CPU too, or several threads do this at once, each wait may take milliseconds.
    """
    count = min(torch.get_num_threads(), len(parts))
    if count < 2:
        for part in parts:
            part()
        return
    left, failures, inferring = SimpleQueue[Piece](), list[BaseException](), torch.is_inference_mode_enabled()
    for part in parts:
        left.put(part)

    def work() -> None:
        try:
            with torch.inference_mode(inferring), contextlib.suppress(Empty):
                _compute_alone()
                while not failures:
                    left.get_nowait()()
        except BaseException as error:
            failures.append(error)

    workers = [threads.Thread(target=work, name=f"wsm-spread-{number}", daemon=True) for number in range(count)]
    try:
        for worker in workers:
            threads.start(worker)
        for worker in workers:
            worker.join()
    except BaseException as error:
        failures.append(error)  # Ctrl-C too: they end after the pieces under way, and only then is it raised
        threads.join(workers)
    if failures:
        raise failures[0]


def _compute_alone() -> None:
    """Torch's own ``set_num_threads`` would count for all threads that begin later; OpenMP's is of this one alone."""
    torch.get_num_threads()  # a thread's first operation sets it: not after us
    with contextlib.suppress(AttributeError):  # torch was built without OpenMP
        ctypes.CDLL(None).omp_set_num_threads(1)
