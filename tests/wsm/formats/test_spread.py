"""Work spread over threads that compute alone: all of it is done, a failure is told, and nobody else is changed."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch

import wsm.formats.format as formats
from tests.wsm.formats.matrices import matrix
from wsm.errors import DoesNotFit, UnusableInput
from wsm.formats import registry
from wsm.formats.spread import each_piece, spread

pytestmark = pytest.mark.usefixtures("three_threads")


def working() -> list[str]:
    """The workers that are alive; threads of other tests may end at any time, so their number tells nothing."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("wsm-spread")]


def test_each_piece_is_computed_by_one_thread_and_nobody_else_s_threads_change() -> None:
    found, later = list[int](), list[int]()
    spread([lambda: found.append(torch.get_num_threads())] * 5)
    other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert (found, later, torch.get_num_threads()) == ([1] * 5, [3], 3)


def test_pieces_are_all_done_once_whatever_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CPU_PIECE", 10)
    for total in (0, 1, 10, 99):
        done = torch.zeros(total, dtype=torch.int64)
        each_piece(lambda part, done=done: done[part].add_(1), total, done.device)  # type: ignore[misc]
        assert done.tolist() == [1] * total


def test_the_first_failure_is_raised_when_nobody_works_any_more() -> None:
    def fail() -> None:
        raise UnusableInput("this piece")

    with pytest.raises(UnusableInput, match="this piece"):
        spread([fail, *[lambda: None] * 9])
    assert working() == []


def test_ctrl_c_is_raised_when_nobody_works_any_more() -> None:
    """Else they would read files that the caller closes, and fill memory that it uses again."""
    begun, ended, main = list[int](), list[int](), threading.get_ident()

    def piece() -> None:
        begun.append(1)
        if len(begun) == 3:
            signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.05)
        ended.append(1)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            spread([piece] * 100)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(begun) == len(ended) < 100
    assert working() == []


def test_threads_that_the_system_refuses_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    start, begun = threading.Thread.start, list[threading.Thread]()

    def refused(self: threading.Thread) -> None:
        if begun:
            raise RuntimeError("can't start new thread")
        begun.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(DoesNotFit, match="the system refused the thread wsm-spread-1"):
        spread([lambda: None] * 3)
    assert not begun[0].is_alive()


@pytest.mark.parametrize("name", ["exact", "int4", "int8", "fp8", "fp8-tensor"])
def test_planes_are_the_same_on_any_number_of_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CPU_PIECE", 1 << 16)
    weight = matrix((192, 1024), torch.bfloat16)
    weight[5:9] *= 2.0**-70  # escapes of `exact`
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(registry.get(name).encode(weight))
    for planes in found[1:]:
        assert planes is not None
        assert found[0] is not None
        assert planes.keys() == found[0].keys()
        assert all(torch.equal(planes[plane].view(torch.uint8), found[0][plane].view(torch.uint8)) for plane in planes)


def test_what_a_format_cannot_hold_is_refused_from_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CPU_PIECE", 1 << 16)
    weight = matrix((192, 1024), torch.bfloat16)
    weight[190, 3] = float("nan")
    for name in ("int4", "fp8"):
        with pytest.raises(UnusableInput, match=r"NaN|finite"):
            registry.get(name).encode(weight)
