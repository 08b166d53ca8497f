"""Decoding on threads that compute alone."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from functools import partial

import torch

from wsm.disk.io_threads import IOThreads, Piece


def spread(pieces: Sequence[Piece], name: str) -> None:
    """Do the pieces of work on as many threads as torch has, each piece on one, and wait; the first failure is raised.

    Torch itself would cut every operation into shares and wait for the slowest, some 50 000 times a matrix: where other
    processes want the CPU too, each wait takes milliseconds. The threads are called ``name`` and a number.
    """
    count = min(torch.get_num_threads(), len(pieces))
    if count < 2:
        for piece in pieces:
            piece()
        return
    with IOThreads(count, name) as threads:
        threads.submit(partial(_alone, piece) for piece in pieces).result()


def _alone(piece: Piece) -> None:
    """Torch's own ``set_num_threads`` would count for all threads that begin later; OpenMP's is of this one alone."""
    torch.get_num_threads()  # a thread's first operation sets it: not after us
    with contextlib.suppress(AttributeError):  # torch was built without OpenMP
        ctypes.CDLL(None).omp_set_num_threads(1)
    piece()
