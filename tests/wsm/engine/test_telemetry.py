"""Records become sums pass by pass: the same figures as of all at once, and nothing is kept of what is over."""

from __future__ import annotations

import gc
import random
from dataclasses import fields

import pytest

from tests.records import records_of
from wsm.engine.device import CpuEvent, Device
from wsm.engine.records import Decoding, Interval, Records, Transfer
from wsm.engine.stretch import Cover, PhaseStats, Stretch
from wsm.engine.telemetry import Telemetry
from wsm.layout.groups import GroupId
from wsm.store.source import ChunkRead

GROUPS, PASS_S, ROUND = 8, 8.0, 5  # groups of a pass, a second each; passes of a round, the first of them its prefill


class Event(CpuEvent):
    """Happened at a given time."""

    __slots__ = ()

    def __init__(self, at: float) -> None:
        self.time_s = at


def pass_of(telemetry: Telemetry, number: int, rng: random.Random) -> None:
    """A pass that begins at second ``number * PASS_S``: reads and copies up to half a pass before their use."""
    for place in range(GROUPS):
        step, used = number * GROUPS + place, number * PASS_S + place
        group, ahead = GroupId(place // 2, "attn" if place % 2 == 0 else "ffn"), rng.uniform(0.5, 4.0)
        telemetry.read_done(group, step, [ChunkRead(100, used - ahead, used - ahead + rng.uniform(0.1, 0.5))])
        telemetry.copied(group, step, 90 + place, Event(used - 0.5), Event(used - rng.uniform(0.0, 0.2)))
        waited = rng.uniform(0.0, 0.1)
        telemetry.used(group, step, Event(used), Event(used + waited), Event(used + 0.9))
        telemetry.link_starved(used + 0.2, used + 0.2 + rng.uniform(0.0, 0.1))
        telemetry.kv_disk("kv_read", place // 2, number, 50, used - 0.9, used - 0.3)
        telemetry.kv_moved("kv_h2d", place // 2, number, 40, Event(used - 0.3), Event(used - 0.1))
        telemetry.kv_waited(Event(used + 0.3), Event(used + 0.35))
        telemetry.took(Event(used + 0.5), Event(used + 0.6))
        telemetry.decoded(group, 30, Event(used + 0.6), Event(used + 0.7))
        telemetry.drafted(Event(used - 0.2), Event(used + 0.05))


def measured(rounds: int, *, folding: bool, records: bool = False) -> tuple[list[PhaseStats], list[Stretch], Telemetry]:
    """The same rounds, folded once a pass or only at the end."""
    telemetry, rng, stretches = Telemetry(Device()), random.Random(0), list[Stretch]()
    for number in range(rounds * ROUND):
        if number % ROUND in (0, 1):
            stretches.append(telemetry.begin(number * PASS_S, number * GROUPS, number, records=records))
        pass_of(telemetry, number, rng)
        if folding:
            telemetry.fold((number + 1) * GROUPS, number + 1, (number + 0.9) * PASS_S)
    telemetry.begin(rounds * ROUND * PASS_S, rounds * ROUND * GROUPS, rounds * ROUND)
    telemetry.fold(at=rounds * ROUND * PASS_S)
    return [stretch.stats() for stretch in stretches], stretches, telemetry


def figures(stats: PhaseStats) -> dict[str, float | None]:
    """All of them, flat."""
    found: dict[str, float | None] = {}
    for field in fields(stats):
        value = getattr(stats, field.name)
        found |= {f"{field.name}.{k}": v for k, v in (value if isinstance(value, dict) else {"": value}).items()}
    return found


def test_sums_that_grow_pass_by_pass_are_those_of_all_records_at_once() -> None:
    (grown, stretches, _), (whole, _, _) = measured(4, folding=True), measured(4, folding=False)
    assert len(grown) == len(whole) == 8
    for mine, theirs in zip(grown, whole, strict=True):
        assert figures(mine) == pytest.approx(figures(theirs))
    rates = stretches[1].read_rates
    assert sum(rate.nbytes for rate in rates) <= (ROUND - 1) * GROUPS * 100
    assert [rate.moves * 100 for rate in rates] == [rate.nbytes for rate in rates]
    decode = grown[1]
    assert decode.passes == ROUND - 1
    assert decode.bytes["ssd_read"] == (ROUND - 1) * GROUPS * 100
    assert decode.bytes["kv_h2d"] == (ROUND - 1) * GROUPS * 40
    assert decode.decoded_bytes == (ROUND - 1) * GROUPS * 30
    assert decode.decoding_ms == pytest.approx((ROUND - 1) * GROUPS * 100)
    assert decode.drafting_ms == pytest.approx((ROUND - 1) * GROUPS * 250)
    assert decode.stall_ms["kv"] == pytest.approx((ROUND - 1) * GROUPS * 50)


def test_what_is_over_is_let_go_and_what_is_ahead_is_kept_for_its_pass() -> None:
    telemetry = Telemetry(Device())
    prefill = telemetry.begin(0.0, 0, 0)
    telemetry.copied(GroupId(0, "attn"), 0, 10, Event(0.1), Event(0.2))
    telemetry.copied(GroupId(0, "attn"), 8, 20, Event(0.3), Event(0.4))  # of the next pass, copied in this one
    telemetry.copied(GroupId(0, "attn"), None, 5, Event(0.0), Event(0.1))  # a resident
    telemetry.fold(8, 1, 1.0)
    assert [copy.step for copy in telemetry.copies()] == [8]
    decode = telemetry.begin(1.0, 8, 1)
    telemetry.fold(16, 2, 2.0)
    assert telemetry.copies() == []
    telemetry.begin(3.0, 16, 2)
    telemetry.fold(at=3.0)
    assert [s.stats().bytes["weight_h2d"] for s in (prefill, decode)] == [10, 20]
    assert [s.stats().bytes_moved["weight_h2d"] for s in (prefill, decode)] == [35, 0]


def test_the_link_is_seen_to_go_on_while_a_draft_computes() -> None:
    telemetry = Telemetry(Device())
    stretch = telemetry.begin(0.0, 0, 0)
    telemetry.copied(GroupId(0, "attn"), 0, 10, Event(0.5), Event(2.0))
    telemetry.kv_moved("kv_h2d", 0, 0, 10, Event(1.5), Event(2.5))
    telemetry.drafted(Event(1.0), Event(4.0))
    telemetry.drafted(Event(5.0), Event(5.5))
    telemetry.begin(6.0, 8, 1)
    telemetry.fold(at=6.0)
    stats = stretch.stats()
    assert stats.drafting_ms == pytest.approx(3500.0)
    assert stats.drafting_link_ms == pytest.approx(1500.0)


def test_without_a_draft_its_time_is_unknown_and_not_0() -> None:
    telemetry = Telemetry(Device())
    stretch = telemetry.begin(0.0, 0, 0)
    telemetry.begin(6.0, 8, 1)
    assert (stretch.stats().drafting_ms, stretch.stats().drafting_link_ms) == (None, None)


def test_records_and_events_that_live_do_not_grow_with_the_rounds() -> None:
    def live(rounds: int) -> tuple[int, int]:
        _, stretches, telemetry = measured(rounds, folding=True)
        del stretches[:]
        gc.collect()
        kept = sum(type(each) in (Transfer, Decoding, CpuEvent, Event) for each in gc.get_objects())
        return kept, len(telemetry._stretches)

    assert live(30) == live(3)


def test_a_stretch_with_records_keeps_those_that_a_trace_draws() -> None:
    _, stretches, telemetry = measured(3, folding=True, records=True)
    kept = stretches[3].records  # the decode of the second round: passes 6 to 9
    assert kept is not None
    assert {use.step for use in kept.uses} == set(range(6 * GROUPS, 10 * GROUPS))
    assert set(range(6 * GROUPS, 10 * GROUPS)) <= {read.step for read in kept.reads}
    assert max(read.start for read in kept.reads) < 10 * PASS_S
    assert len(kept.decodings) == 4 * GROUPS
    assert not any(getattr(records_of(telemetry), kind.name) for kind in fields(Records))


def test_a_cover_counts_overlaps_once_also_where_the_first_are_only_a_sum_by_then() -> None:
    cover, window = Cover(), (0.0, 10.0)
    spans: list[list[Interval]] = [[(-1.0, 1.0), (0.5, 2.0)], [(1.5, 3.0), (4.0, 5.0)], [(4.5, 6.0), (9.0, 12.0)]]
    for number, some in enumerate(spans):
        cover.add(some, window)
        cover.settle(1.5 * number)
    assert cover.ms == pytest.approx(1e3 * (3.0 + 2.0 + 1.0))


def test_what_crosses_an_edge_of_a_stretch_is_no_part_of_its_whole_moves() -> None:
    telemetry = Telemetry(Device())
    telemetry.begin(10.0, 0, 0)
    stretch = telemetry.begin(20.0, 0, 0)
    telemetry.begin(30.0, 9, 9)
    for start, end in ((19.0, 21.0), (22.0, 24.0), (23.0, 26.0), (29.0, 31.0)):
        telemetry.read_done(GroupId(0, "attn"), 1, [ChunkRead(100, start, end)])
    telemetry.fold()
    assert stretch.whole["ssd_read"] == (2, 200, 4.0)
    assert stretch.stats().bytes_moved["ssd_read"] == 300
