"""The I/O threads' ends: whatever breaks them off, nobody waits for ever."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import NoReturn

import pytest

from wsm.disk.io_threads import IOThreads

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
