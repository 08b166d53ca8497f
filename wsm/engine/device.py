"""Streams, events, copies and the link: one class of device for the CPU, one for CUDA."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from wsm.errors import DoesNotFit

PIECE_BYTES = 64 << 20
"""A copy's unit: large enough for the link's full rate, small enough for no one to wait long behind it."""
PIECES_QUEUED = 4


class Event(Protocol):
    """A point in a stream's work."""

    def query(self) -> bool:
        """Whether the work before it is done."""

    def synchronize(self) -> None:
        """Block the calling thread until the work before it is done."""


class CpuEvent:
    """Has happened once it is recorded."""

    __slots__ = ("time_s",)

    def __init__(self) -> None:
        self.time_s = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """There is nothing to wait for."""


class Device:
    """What the engine needs of a compute device; here of the CPU, so that all its paths run on any machine.

    All work is done on return: a stream (None) is in order because one thread owns it. :class:`CudaDevice` queues it.
    """

    pinned = False
    """Whether copies need page-locked memory."""
    torch_device = torch.device("cpu")
    """Where tensors of the GPU tier are."""

    def enter_thread(self) -> None:
        """To be called first on every thread of the engine's own that uses the device."""

    def current(self) -> AbstractContextManager[object]:
        """For a caller's thread: in it kernels and new streams are this device's, after it the caller's again."""
        return nullcontext()

    def stream(self) -> Any:
        """A new stream for copies."""

    def compute_stream(self) -> Any:
        """The stream that the calling thread's computations run on."""

    def record(self, stream: Any) -> Event:
        """A new event behind everything queued on ``stream``."""
        return CpuEvent()

    def wait(self, stream: Any, event: Event) -> None:
        """Make later work on ``stream`` wait for ``event``, which must have been recorded."""

    def copy(self, destination: Tensor, source: Tensor, stream: Any) -> None:
        """Queue a copy on ``stream``."""
        destination.copy_(source)

    def run(self, stream: Any, work: Callable[[], object]) -> None:
        """Queue what ``work`` computes on ``stream``."""
        work()

    def mapped(self, host: Tensor) -> Tensor:
        """``uint8`` CPU memory as the device sees it: kernels read it over the link, without a copy.

        Raises DoesNotFit where the memory is not page-locked.
        """
        return host

    def seconds(self, event: Any) -> float:
        """When a finished ``event`` happened, on the host's ``time.perf_counter`` clock."""
        return float(event.time_s)

    def synchronize(self) -> None:
        """Block until all streams of the device are idle."""


class CudaDevice(Device):
    """One CUDA device; events carry times and put a waiting host thread to sleep."""

    pinned = True

    def __init__(self, device: torch.device) -> None:
        index = device.index if device.index is not None else torch.cuda.current_device()
        self.torch_device = torch.device("cuda", index)
        # CUDA gives elapsed times in float32 milliseconds: a run of an hour is timed to 0.25 ms.
        self.synchronize()
        self._base = torch.cuda.Event(enable_timing=True)
        self._base.record(torch.cuda.current_stream(self.torch_device))
        self._base.synchronize()
        self._base_s = time.perf_counter()

    def enter_thread(self) -> None:
        torch.cuda.set_device(self.torch_device)

    def current(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.torch_device)

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.torch_device)

    def compute_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.torch_device)

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(stream)
        return event

    def wait(self, stream: torch.cuda.Stream, event: Any) -> None:
        stream.wait_event(event)

    def copy(self, destination: Tensor, source: Tensor, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            destination.copy_(source, non_blocking=True)

    def run(self, stream: torch.cuda.Stream, work: Callable[[], object]) -> None:
        with torch.cuda.stream(stream):
            work()

    def mapped(self, host: Tensor) -> Tensor:
        if not host.is_pinned():
            raise DoesNotFit(
                "--embedding cpu, and --topk-blk where KV lies below the GPU, need page-locked memory, and CUDA "
                "refused to lock it; leave the first out and set --topk-blk 0"
            )
        # The protocol by which torch takes CUDA memory of others: page-locked memory has one address.
        memory = {"shape": (host.nbytes,), "typestr": "|u1", "data": (host.data_ptr(), False), "version": 3}
        return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=memory), device=self.torch_device)

    def seconds(self, event: Any) -> float:
        return self._base_s + float(self._base.elapsed_time(event)) / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)


def open_device(device: torch.device) -> Device:
    """The engine's view of ``device``."""
    return CudaDevice(device) if device.type == "cuda" else Device()


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

        ``needed_at`` is the place in the endless pass order that the bytes are for; the smaller goes first. Yields the
        event behind the piece that was queued last, None if that is over: the link has nothing to do then.
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
