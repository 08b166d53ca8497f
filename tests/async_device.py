"""A device whose streams are threads: work happens late, as on a GPU, so that a missing wait shows."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from wsm.engine.device import Event


class AsyncEvent:
    def __init__(self) -> None:
        self._happened = threading.Event()
        self.time_s = 0.0

    def happen(self) -> None:
        self.time_s = time.perf_counter()
        self._happened.set()

    def query(self) -> bool:
        return self._happened.is_set()

    def synchronize(self) -> None:
        self._happened.wait()


class AsyncStream:
    """Work in order, on a thread of its own."""

    def __init__(self) -> None:
        self.work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (work := self.work.get()) is not None:
            work()


class AsyncDevice:
    """Stands for a GPU in ordinary memory."""

    pinned = False

    def __init__(self, seed: int = 0) -> None:
        self.torch_device = torch.device("cpu")
        self._random = random.Random(seed)
        self.compute = AsyncStream()
        self._streams = [self.compute]

    def enter_thread(self) -> None:
        pass

    def stream(self) -> AsyncStream:
        self._streams.append(AsyncStream())
        return self._streams[-1]

    def compute_stream(self) -> AsyncStream:
        return self.compute

    def record(self, stream: AsyncStream) -> AsyncEvent:
        event = AsyncEvent()
        stream.work.put(event.happen)
        return event

    def wait(self, stream: AsyncStream, event: Event) -> None:
        stream.work.put(event.synchronize)

    def copy(self, destination: Tensor, source: Tensor, stream: AsyncStream) -> None:
        late_s = self._random.random() * 0.0008

        def work() -> None:
            time.sleep(late_s)
            destination.copy_(source)

        stream.work.put(work)

    def later(self, work: Callable[[], object]) -> None:
        """Compute on the compute stream."""
        self.compute.work.put(work)

    def run(self, stream: AsyncStream, work: Callable[[], object]) -> None:
        stream.work.put(work)

    def mapped(self, host: Tensor) -> Tensor:
        return host

    def seconds(self, event: Event) -> float:
        assert isinstance(event, AsyncEvent)
        assert event.query(), "asked for the time of an event that has not happened"
        return event.time_s

    def synchronize(self) -> None:
        for stream in list(self._streams):
            self.record(stream).synchronize()

    def end(self) -> None:
        """Let the streams' threads go."""
        for stream in self._streams:
            stream.work.put(None)
            stream.thread.join()
