"""Reading group images tensor by tensor from a checkpoint: what their futures promise."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llama.names import Cut
from tests.stores import CountingCheckpoint, aligned
from wsm.errors import StoreError
from wsm.layout.groups import GroupId
from wsm.store.source import CheckpointSource

FFN1 = GroupId(1, "ffn")


class Held(CountingCheckpoint):
    """Each tensor is read by ``answer``, which is told its number."""

    def __init__(self, answer: Callable[[int], None]) -> None:
        super().__init__()
        self._answer, self._lock = answer, threading.Lock()

    def read_into(self, name: str, out: Tensor, cut: Cut | None = None) -> None:
        with self._lock:
            self.names.append(name)
            number = len(self.names) - 1
        self._answer(number)


def source_of(answer: Callable[[int], None], threads: int) -> CheckpointSource:
    return CheckpointSource(Held(answer), torch.bfloat16, threads=threads)


def test_a_failed_read_ends_when_nothing_writes_into_the_buffer_any_more() -> None:
    """And with the first failure; the tensors that were not begun are left out."""
    release, slow_over = threading.Event(), threading.Event()

    def answer(number: int) -> None:
        if number == 0:
            assert release.wait(10)
            slow_over.set()
        else:
            raise ZeroDivisionError(number)

    source, over = source_of(answer, threads=2), list[bool]()
    read = source.read(FFN1, aligned(source.slot_bytes("ffn")))
    read.arrived.add_done_callback(lambda _: over.append(slow_over.is_set()))
    with pytest.raises(concurrent.futures.TimeoutError):
        read.checked.exception(0.05)
    release.set()
    with pytest.raises(ZeroDivisionError, match="1"):
        read.checked.result(10)
    source.close()
    assert over == [True]
    assert read.chunks == []


def test_closing_ends_every_read_with_a_store_error() -> None:
    began, release = threading.Event(), threading.Event()

    def answer(number: int) -> None:
        began.set()
        assert release.wait(10)

    source = source_of(answer, threads=1)
    reads = [source.read(FFN1, aligned(source.slot_bytes("ffn"))) for _ in range(3)]
    assert began.wait(10)
    closing = threading.Thread(target=source.close)
    closing.start()
    for read in reads[1:]:
        with pytest.raises(StoreError, match="closed before"):
            read.checked.result(10)
    assert not reads[0].checked.done()
    release.set()
    closing.join(10)
    assert isinstance(reads[0].checked.exception(0), StoreError)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("wsm-load")]
    with pytest.raises(RuntimeError, match="closed"):
        source.read(FFN1, aligned(source.slot_bytes("ffn")))
