"""Signs of life: who counts as lost, when, and what the others are told; with a fake clock and a store in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from llama.parallel import watch
from llama.parallel.watch import Beat, Ending, RankFailed, Roll, Watch


class MemoryStore:
    """The store of a job whose ranks are threads of one process; ``gone``: nobody answers any more."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.gone = False

    def _answer(self) -> None:
        if self.gone:
            raise RuntimeError("connection refused")

    def set(self, key: str, value: str) -> None:
        self._answer()
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        self._answer()
        return all(key in self.values for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self._answer()
        return [self.values[key].encode() for key in keys]


# -- the roll


def test_a_rank_whose_count_stands_still_is_lost_after_the_limit_and_not_before() -> None:
    roll = Roll(0, 3, lost_s=10)
    assert roll.read([Beat(1, "a"), Beat(1, "b"), Beat(1, "c")], 100.0) is None
    assert roll.read([Beat(1, "a"), Beat(1, "b"), Beat(9, "c")], 110.0) is None
    found = roll.read([Beat(1, "a"), Beat(1, "b"), Beat(10, "c")], 110.1)
    assert found is not None
    assert (found.rank, found.host, found.code) == (1, "b", 1)
    assert found.sentence.startswith("rank 1 on b: no sign of life for 10 s")


def test_a_rank_does_not_miss_itself_nor_one_that_has_ended() -> None:
    roll = Roll(0, 2, lost_s=10)
    for now_s in (0.0, 100.0):
        assert roll.read([Beat(1, "a"), Beat(1, "b", "ended")], now_s) is None


def test_what_a_rank_says_of_itself_comes_before_anothers_silence() -> None:
    roll, ending = Roll(0, 3, lost_s=10), Ending(2, "c", "the drive is gone", 4)
    roll.read([Beat(1, "a"), Beat(1, "b"), Beat(1, "c")], 0.0)
    assert roll.read([Beat(1, "a"), Beat(1, "b"), Beat(1, "c", "ended", ending)], 60.0) == ending


# -- the watch


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "BEAT_S", 0.02)
    monkeypatch.setattr(watch, "LOST_S", 0.4)
    monkeypatch.setattr(watch, "GRACE_S", 0.2)


class Group:
    """Watches of several ranks on one store, and what they reported."""

    def __init__(self, size: int) -> None:
        self.store = MemoryStore()
        self.failures: dict[int, Ending] = {}
        self.last_resorts: dict[int, Ending] = {}
        self.watches = [self._watch(rank, size) for rank in range(size)]

    def _watch(self, rank: int, size: int) -> Watch:
        def failed(ending: Ending) -> None:
            self.failures[rank] = ending

        def last(ending: Ending) -> None:
            self.last_resorts[rank] = ending

        return Watch(self.store, rank, size, f"host{rank}", on_failure=failed, last_resort=last)

    def start(self) -> None:
        threads = [threading.Thread(target=each.start, args=(5.0,)) for each in self.watches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def close(self) -> None:
        for each in self.watches:
            each.close()


@pytest.fixture
def three(quick: None) -> Iterator[Group]:
    group = Group(3)
    group.start()
    yield group
    group.close()


def until(happened: object, limit_s: float = 5.0) -> None:
    assert callable(happened)
    end = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_living_ranks_find_nothing_to_blame(three: Group) -> None:
    assert three.watches[0].wait_for_failure(0.8) is None
    assert three.watches[0].hosts == ["host0", "host1", "host2"]


def test_a_silent_rank_is_found_by_all_others_and_the_last_resort_follows(three: Group) -> None:
    three.watches[1].close()
    until(lambda: set(three.failures) >= {0, 2})
    assert {ending.rank for ending in three.failures.values()} == {1}
    until(lambda: set(three.last_resorts) >= {0, 2})
    with pytest.raises(RankFailed, match="rank 1 on host1"):
        three.watches[0].check()


def test_a_rank_that_settles_in_time_meets_no_last_resort(three: Group) -> None:
    three.watches[1].settle(Ending(1, "host1", "no such file", 2))
    until(lambda: set(three.failures) >= {0, 2})
    for rank in (0, 2):
        three.watches[rank].settle(three.failures[rank])
    time.sleep(0.5)
    assert three.last_resorts == {}
    assert [ending and ending.code for ending in three.watches[0].endings(1.0)] == [2, 2, 2]


def test_an_ending_comes_back_from_its_text_even_where_it_names_a_path_that_is_no_text(three: Group) -> None:
    ending = Ending(1, "host1", "no such file: \udce9", 2)
    three.watches[1].settle(ending)
    assert three.watches[0].wait_for_failure(2.0) == ending
    assert three.watches[0].hosts == ["host0", "host1", "host2"]


def test_ranks_that_ended_well_are_not_missed(three: Group) -> None:
    for each in three.watches[1:]:
        each.settle(None)
        each.leave()
    assert three.watches[0].wait_for_failure(0.8) is None
    started = time.monotonic()
    three.watches[0].wait_for_others(5.0)
    assert time.monotonic() - started < 1


def test_a_store_that_answers_no_more_is_a_failure_too(three: Group) -> None:
    three.store.gone = True
    until(lambda: len(three.failures) == 3)
    assert "the job's store has not answered" in three.failures[2].sentence


def test_a_rank_that_does_not_come_is_named(quick: None) -> None:
    group = Group(2)
    with pytest.raises(RankFailed, match=r"rank 1 on .*did not start within 0.1 s"):
        group.watches[0].start(0.1)
