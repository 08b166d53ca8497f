"""What one call of the system is given, and the I/O threads' ends: whatever breaks them off, nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NoReturn

import pytest

from wsm.disk import io_threads
from wsm.disk.io_threads import IOThreads, transfer_fully
from wsm.layout.groups import BLOCK

CLOSED = RuntimeError("closed")


def test_a_close_that_was_broken_off_can_be_done_again() -> None:
    """Jobs that wait end on the closing thread, where Ctrl-C may come."""
    threads, begun, go_on = IOThreads(1, "test"), threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        go_on.wait(10)

    held = threads.submit([hold])
    assert begun.wait(10)

    def interrupt(_: Future[None]) -> NoReturn:
        raise KeyboardInterrupt

    threads.submit([lambda: None]).add_done_callback(interrupt)
    behind = threads.submit([lambda: None])
    with pytest.raises(KeyboardInterrupt):
        threads.close(CLOSED)
    go_on.set()
    again = threading.Thread(target=threads.close, args=(CLOSED,), daemon=True)
    again.start()
    again.join(10)
    assert not again.is_alive()
    assert held.exception(10) is None
    assert behind.exception(10) is CLOSED


def test_a_job_ends_once_with_its_first_failure_and_the_next_is_not_harmed() -> None:
    threads, error = IOThreads(2, "test"), OSError("the drive")

    def fail() -> None:
        raise error

    failed = threads.submit([fail, fail, fail])
    assert failed.exception(10) is error
    assert threads.submit([lambda: None]).exception(10) is None
    threads.close(CLOSED)
    threads.close(CLOSED)
    with pytest.raises(RuntimeError):
        threads.submit([lambda: None])


@pytest.mark.parametrize(
    ("parts", "calls"),
    [
        pytest.param([1] * 4, [(4, 4)], id="both limits just kept"),
        pytest.param([1] * 5, [(4, 4), (1, 1)], id="more parts than a call takes"),
        pytest.param([2, 2, 3], [(3, 6), (1, 1)], id="more bytes than a call takes"),
        pytest.param([13], [(1, 6), (1, 6), (1, 1)], id="one part of more bytes"),
    ],
)
def test_a_call_is_given_no_more_parts_and_bytes_than_it_may(
    parts: list[int], calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses more parts (IOV_MAX). Sizes here are in blocks."""
    monkeypatch.setattr(io_threads, "MOST_PARTS", 4)
    monkeypatch.setattr(io_threads, "MOST_BYTES", 6 * BLOCK)
    seen, places = list[tuple[int, int]](), list[int]()

    def transfer(file: int, asked: Sequence[memoryview], offset: int) -> int:
        nbytes = sum(map(len, asked))
        seen.append((len(asked), nbytes // BLOCK))
        places.append(offset)
        return nbytes

    transfer_fully(transfer, 0, [memoryview(bytes(n * BLOCK)) for n in parts], BLOCK, lambda at, _: OSError(at))
    assert seen == calls
    assert places == [BLOCK * (1 + sum(n for _, n in calls[:before])) for before in range(len(calls))]
