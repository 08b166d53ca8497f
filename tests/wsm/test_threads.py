"""Threads: a start without room and an end that does not come are sentences, and no wait outlives its thread."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from wsm import stop, threads
from wsm.engine.device import Device
from wsm.engine.threads import SharedState, Threaded
from wsm.errors import DoesNotFit, StoreError
from wsm.stop import Stopped


def test_a_thread_without_room_names_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(DoesNotFit, match=r"refused the thread wsm-io-3 .can't start new thread.: the limits here are "):
        threads.start(threading.Thread(name="wsm-io-3"))


def test_a_join_has_a_limit_and_names_who_did_not_end() -> None:
    over = threading.Event()
    held_up = threads.Thread(target=over.wait, name="wsm-io-3", daemon=True)
    threads.start(held_up)
    with pytest.raises(threads.ThreadsStuck, match=r"wsm-io-3 did not end within 0\.05 s"):
        threads.join([held_up, threads.Thread(name="never started")], 0.05)
    over.set()
    threads.join([held_up])


def test_ctrl_c_in_a_users_join_takes_no_living_thread_for_ended() -> None:
    over = threading.Event()
    held_up = threads.Thread(target=over.wait, name="wsm-io-3", daemon=True)
    threads.start(held_up)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            threads.join([held_up])
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(threads.ThreadsStuck):
        threads.join([held_up], 0.05)
    over.set()
    threads.join([held_up])
    assert not held_up.is_alive()


def test_a_wait_for_a_future_hears_a_wish() -> None:
    stop.ask(signal.SIGTERM)
    with pytest.raises(Stopped):
        stop.result(Future[None]())


class Part(Threaded):
    freed = False

    def begin(self, work: object) -> None:
        self._begin({"wsm-part": work})  # type: ignore[dict-item]

    def wait(self) -> None:
        self._state._wait(lambda: None)

    def _free_memory(self) -> None:
        self.freed = True


def test_a_wait_whose_thread_is_gone_ends() -> None:
    part = Part(SharedState("the part"), Device())
    part.begin(lambda: None)
    with pytest.raises(RuntimeError, match="the thread wsm-part of the part is gone"):
        part.wait()
    part.close()
    assert part.freed


def test_memory_that_a_stuck_thread_may_write_to_is_not_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(threads, "JOIN_S", 0.05)
    part = Part(SharedState("the part"), Device())
    part.begin(over.wait)
    with pytest.raises(threads.ThreadsStuck):
        part.close()
    assert not part.freed
    over.set()
    part.close()
    assert part.freed


def test_a_close_that_ctrl_c_breaks_off_frees_nothing_under_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    part = Part(SharedState("the part"), Device())
    part.begin(over.wait)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(threads, "join", lambda threads: signal.default_int_handler(signal.SIGINT, None))
        with pytest.raises(KeyboardInterrupt):
            part.close()
    assert not part.freed
    over.set()
    part.close()
    assert part.freed


def test_a_failure_counts_until_every_thread_has_ended_and_is_told_once() -> None:
    state = SharedState("the part")
    state.close()
    state.fail(StoreError("a write that was still to be made"))
    with pytest.raises(StoreError, match="still to be made"):
        state.raise_failure(unless_told=True)
    state.raise_failure(unless_told=True)
    other = SharedState("the part")
    other.close()
    other.end()
    other.fail(StoreError("a read that nobody waits for"))
    other.raise_failure()


def test_ctrl_c_in_a_users_program_leaves_no_lock_taken() -> None:
    """KeyboardInterrupt as Python raises it: at any instruction of the waiting thread, hundreds of times."""
    state, over = SharedState("the part"), time.monotonic() + 1.0
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    caught, main = 0, threading.main_thread().ident
    try:
        while time.monotonic() < over:
            timer = threading.Thread(target=signal.pthread_kill, args=(main, signal.SIGINT))
            try:
                timer.start()
                while True:
                    with state._lock:
                        state._wake()
                    state._sleep(stop.SimpleQueue())
            except KeyboardInterrupt:
                caught += 1
            timer.join()
            taken = threading.Thread(target=state.close, daemon=True)
            taken.start()
            taken.join(5)
            assert not taken.is_alive(), "the lock was left taken"
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught > 50


def test_nothing_waits_by_a_condition_on_the_main_thread() -> None:
    """Its Python code can be broken off between taking the lock and giving it back; Link's is threads' alone."""
    folder = Path(stop.__file__).parent
    found = [path.name for path in folder.rglob("*.py") if "threading.Condition" in path.read_text()]
    assert found == ["device.py"]


_LOOKING = """
import gc, sys, threading, time
import torch
from wsm.threads import Thread, start

def garbage():
    tensor = torch.zeros(1)
    tensor.itself = tensor  # a cycle, whose end lets go of the interpreter

def spawn():
    while time.monotonic() < end:
        thread = threading.Thread(target=garbage)
        thread.start()
        thread.join()

gc.set_threshold(1)
sys.setswitchinterval(1e-6)
end = time.monotonic() + 1
waiting = Thread(target=lambda: time.sleep(9), daemon=True)
start(waiting)
threading.Thread(target=spawn, daemon=True).start()
while time.monotonic() < end:
    garbage()
    assert not waiting.has_ended
print("alive")
"""


def test_to_ask_for_a_threads_end_locks_no_thread_that_starts() -> None:
    """With garbage collected and threads started all the while: `sys._current_frames` hung here at once."""
    done = subprocess.run([sys.executable, "-c", _LOOKING], capture_output=True, text=True, timeout=60)
    assert done.stdout == "alive\n", done.stderr
