"""When ``auto`` goes on checking every read."""

from __future__ import annotations

import time

import pytest

from wsm.disk import checks
from wsm.disk.checks import SAMPLE_BYTES, Checks


@pytest.mark.parametrize(("read_s", "rule"), [(2.0, "always"), (0.5, "first")])
def test_auto_goes_on_checking_where_the_drive_is_slower_than_the_checks(
    monkeypatch: pytest.MonkeyPatch, read_s: float, rule: str
) -> None:
    clock = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr(time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(time, "thread_time", lambda: clock["cpu"])

    def check() -> None:
        clock["cpu"] += 1.0

    asked, half = Checks("auto"), SAMPLE_BYTES // 2
    for decided in (None, rule):
        assert asked.rule is None
        assert asked.needed(seen_right=True), "before it has decided"
        with asked.reading(half):
            clock["wall"] += read_s
            asked.timed(half, check)
        assert asked.rule == decided
    assert asked.needed(seen_right=True) is (rule == "always")
    assert asked.needed(seen_right=False)
    assert asked.check_MBps == pytest.approx(half / 1e6)
    assert asked.read_MBps == pytest.approx(half / read_s / 1e6)
    assert asked.cost - checks.CheckCost(half, 1.0) == (half, 1.0)


def test_time_in_which_nothing_is_read_is_not_the_drives(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    asked = Checks("auto")
    for begin in (0.0, 100.0):
        now[0] = begin
        asked.read_begins()
        asked.read_begins()
        now[0] = begin + 1.0
        asked.read_ends(10**6)
        asked.read_ends(10**6)
    assert asked.read_MBps == pytest.approx(2.0)
