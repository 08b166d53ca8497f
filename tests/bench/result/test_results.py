"""The JSON: what its figures mean, which round they come from, and what its schema says of a real run."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.cli.docs import result_schema
from bench.options.run_flags import RunOptions
from bench.result.fields import ByPhase
from bench.result.results import checked, dump, plain, read_result, significant
from bench.result.summary import row, summary
from bench.result.types import FIXED_KEYS, METRICS, SCHEMA_VERSION, LinkRates, Tpot
from bench.result.types_machine import BytesPerPass, LoadRate
from bench.result.types_phases import Idle, RankPhase
from bench.run.measure import (
    Round,
    floor_of,
    link_rates,
    load_rate,
    median_round,
    metrics_of,
    phase_of,
    repeats_of,
    tpot_of,
)
from bench.run.ranks import _job_phase
from bench.run.warnings import beaten_floors, drive_warnings, plan_warnings, prediction_warnings
from bench_infer import command_line as main
from llama.generation import Generation
from tests.plans import inputs_for
from tests.results import stored, typed, varied
from wsm.disk.checks import CheckCost
from wsm.engine.records import Transfer
from wsm.engine.stretch import MoveRate, PhaseStats
from wsm.errors import UnusableInput
from wsm.layout.groups import GroupId
from wsm.option import options_of
from wsm.plan.plan import make_plan
from wsm.plan.time import Ceiling, Estimate, decode_work, predicted_floor, prefill_work
from wsm.settings import ECHOED_ONLY, PRESETS, Settings

GUIDE = json.loads("""{
  "batch_size": 1, "max_new_tokens": 32, "prompt_lens": [2016],
  "prefill_tokens_total": 2016, "decode_tokens_total": 32,
  "prefill_ms": 1200.123, "first_token_decode_ms": 34.444, "ttft_ms": 1234.567, "decode_ms": 890.234,
  "e2e_ms": 2090.357, "throughput_tok_s": 35.87, "end_to_end_tok_s": 28.34,
  "io_bw_MBps": {"weight_h2d_MBps": 3456.78, "kv_h2d_MBps": 234.56, "kv_d2h_MBps": 189.12},
  "gpu_mem_GB": {"allocated_GB": 22.45, "reserved_GB": 23.12},
  "mode": "mixed", "device": "cuda:0",
  "wsm": {"enabled": true, "ssd_enabled": true, "gpu_max_groups": 10}
}""")
"""The quick-start guide's example."""
MODES = ("mixed", "stream", "preload", "full")


def a_round(prefill_s: float = 2.0, first_s: float = 0.5, decode_s: float = 4.0, rows: int = 1, new: int = 8) -> Round:
    """A round that started at second 100; token 1 came ``first_s`` after the prefill, the rest evenly until the end."""
    after = 100.0 + prefill_s
    pace = (decode_s - first_s) / max(1, new - 1)
    return Round(
        generation=Generation([[7] * new] * rows, prefill_tokens=24 * rows, prefill_passes=1, decode_passes=new - 1),
        start=100.0,
        prefill_done=after,
        tokens_at=tuple(after + first_s + pace * n for n in range(new)),
        done=after + decode_s,
        stretches=(),
        checked=CheckCost(),
        complete_at_start=True,
    )


def stats_of(
    *,
    used: Mapping[str, int] | None = None,
    moved: Mapping[str, int] | None = None,
    busy: Mapping[str, float | None] | None = None,
    flops: int = 0,
    hbm_bytes: int = 0,
    passes: int = 2,
    wall_ms: float = 100.0,
) -> PhaseStats:
    nothing = dict.fromkeys(("ssd_read", "weight_h2d", "kv_h2d", "kv_d2h", "kv_read", "kv_write"), 0)
    unmeasured = dict.fromkeys(("ssd", "h2d", "compute", "kv_h2d", "kv_d2h", "kv_read", "kv_write"))
    return PhaseStats(
        passes=passes,
        wall_ms=wall_ms,
        bytes={**nothing, **((moved if used is None else used) or {})},
        bytes_moved={**nothing, **(moved or {})},
        busy_ms={**unmeasured, **(busy or {})},
        stall_ms={"ssd": None, "h2d": None, "kv": None},
        idle_ms={"ssd": None, "h2d": None, "compute": None},
        flops=flops,
        hbm_bytes=hbm_bytes,
    )


def ceilings_of(**values: float) -> dict[str, Ceiling]:
    return {
        name: Ceiling(value, value, "TFLOPs" if name == "matmul" else "MBps", 1.0, "") for name, value in values.items()
    }


def test_a_drive_that_slows_down_is_warned_of_and_a_steady_one_is_not() -> None:
    def passes(*rates: int, reads: int = 1) -> list[MoveRate]:
        return [MoveRate(reads, rate * 10**6, 1.0) for rate in rates]

    slowing = [2000] * 6 + [1000] * 6
    assert drive_warnings(passes(*[1000] * 12)) == []
    assert "from 2000 to 1000 MB/s" in drive_warnings(passes(*slowing))[0]
    assert "from 2000 to 1000 MB/s" in drive_warnings(passes(2000, 1500, 1000, reads=3))[0]
    for too_few in (passes(2000, 1500, 1000), passes(2000, 1000, reads=9), []):
        assert drive_warnings(too_few) == []


def test_the_load_rate_is_of_the_sweep_that_fills_the_residents_and_against_the_drive() -> None:
    residents = [Transfer(GroupId(n, "attn"), None, 500_000_000, n, n + 0.5) for n in range(4)]
    streamed = [Transfer(GroupId(n, "ffn"), 2 * n + 1, 500_000_000, n + 0.5, n + 1.0) for n in range(9)]
    loaded = load_rate([*residents, *streamed], ceilings_of(ssd=1250.0))
    assert loaded == LoadRate(read_bytes=2_000_000_000, read_MBps=1000.0, ssd_pct=80.0)
    assert load_rate([*residents], {}).ssd_pct is None
    assert load_rate([], {}).read_bytes == 0
    assert load_rate(None, {}).read_bytes is None


# -- figures of a round


def test_ttft_is_prefill_and_first_token_and_e2e_is_prefill_and_decode() -> None:
    metrics = metrics_of(a_round(prefill_s=2, first_s=0.5, decode_s=4))
    assert metrics.prefill_ms == pytest.approx(2000)
    assert metrics.first_token_decode_ms == pytest.approx(500)
    assert metrics.ttft_ms == pytest.approx(2500)
    assert metrics.decode_ms == pytest.approx(4000)
    assert metrics.e2e_ms == pytest.approx(6000)


def test_throughput_counts_new_tokens_over_the_time_of_the_decode() -> None:
    timed = a_round(prefill_s=2, decode_s=4, rows=3, new=8)
    assert timed.generation.decode_tokens == 24
    assert metrics_of(timed).throughput_tok_s == pytest.approx(24 / 4)
    assert metrics_of(timed).end_to_end_tok_s == pytest.approx(24 / 6)
    assert timed.total_tok_s == pytest.approx((24 + 3 * 24) / 6)


def test_a_passs_time_runs_from_token_to_token() -> None:
    timed = a_round(first_s=0.5, decode_s=4, new=8)
    assert timed.pass_ms == pytest.approx([500] * 7)
    metrics = metrics_of(timed)
    assert sum(timed.pass_ms) + metrics.first_token_decode_ms == pytest.approx(metrics.decode_ms)


# -- rounds


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [([5], 0), ([9, 1], 1), ([1, 9], 0), ([3, 1, 2], 2), ([4, 1, 3, 2], 3), ([2, 2, 2, 2], 1)],
)
def test_the_median_round_is_a_real_one_and_of_two_the_faster(seconds: list[float], chosen: int) -> None:
    assert median_round([a_round(decode_s=s) for s in seconds]) == chosen


def test_the_median_round_is_that_of_e2e_not_of_the_decode() -> None:
    rounds = [
        a_round(prefill_s=10, decode_s=1),
        a_round(prefill_s=1, decode_s=2),
        a_round(prefill_s=1, decode_s=3),
    ]
    assert median_round(rounds) == 2


def test_repeats_keep_every_round_in_order_and_its_spread() -> None:
    part = repeats_of([a_round(decode_s=s) for s in (4, 2, 6, 3)])
    decode = part.statistics.decode_ms
    assert part.n == decode.n == 4
    assert [raw.decode_ms for raw in part.raw] == pytest.approx([4000, 2000, 6000, 3000])
    assert (decode.median, decode.mean) == pytest.approx((3500, 3750))
    assert (decode.min, decode.max) == pytest.approx((2000, 6000))
    assert decode.stdev == pytest.approx(math.sqrt((250**2 + 1750**2 + 2250**2 + 750**2) / 3))
    assert set(part.statistics.__struct_fields__) == set(METRICS)


def test_one_round_has_no_deviation() -> None:
    assert repeats_of([a_round()]).statistics.ttft_ms.stdev is None


def test_below_a_hundred_passes_p99_is_the_slowest() -> None:
    passes = tpot_of([1.0, 2.0, 9.0])
    assert passes is not None
    assert (passes.p50, passes.p99) == (2.0, 9.0)


def test_tpot_percentiles_are_passes_that_took_place() -> None:
    passes = tpot_of([float(n) for n in range(100, 0, -1)])
    assert passes == Tpot(mean=50.5, p50=50.0, p90=90.0, p99=99.0, max=100.0, n=100)
    assert tpot_of([7.0]) == Tpot(mean=7.0, p50=7.0, p90=7.0, p99=7.0, max=7.0, n=1)


def test_without_decode_passes_there_is_no_tpot() -> None:
    assert tpot_of([]) is None


@given(st.lists(st.floats(0.001, 1e6), min_size=1))
def test_at_least_nine_tenths_of_the_passes_took_no_longer_than_p90(pass_ms: list[float]) -> None:
    part = tpot_of(pass_ms)
    assert part is not None
    for found, share in ((part.p50, 0.5), (part.p90, 0.9)):
        assert found in pass_ms
        assert sum(ms <= found for ms in pass_ms) >= share * len(pass_ms)
    assert part.p50 <= part.p90 <= part.max


# -- floor


@pytest.mark.parametrize(
    ("bound", "floor_ms", "stats"),
    [
        ("ssd", 2000, stats_of(moved={"ssd_read": 2 * 10**9, "weight_h2d": 10**9})),
        ("h2d", 500, stats_of(moved={"weight_h2d": 5 * 10**9}, hbm_bytes=10**9)),
        ("h2d", 300, stats_of(moved={"weight_h2d": 2 * 10**9, "kv_h2d": 10**9}, hbm_bytes=10**9)),
        ("d2h", 400, stats_of(moved={"kv_d2h": 2 * 10**9}, hbm_bytes=10**9)),
        ("kv_read", 750, stats_of(moved={"kv_h2d": 2 * 10**9, "kv_read": 15 * 10**8}, hbm_bytes=10**9)),
        ("kv_write", 800, stats_of(moved={"kv_d2h": 10**9, "kv_write": 8 * 10**8}, hbm_bytes=10**9)),
        ("hbm", 70, stats_of(moved={"weight_h2d": 10**8}, hbm_bytes=70 * 10**9)),
        ("compute", 9000, stats_of(moved={"weight_h2d": 10**8}, hbm_bytes=10**9, flops=900 * 10**12)),
    ],
)
def test_the_floor_is_the_longest_of_what_each_tier_needs(bound: str, floor_ms: float, stats: PhaseStats) -> None:
    ceilings = ceilings_of(ssd=1000, h2d=10_000, d2h=5000, hbm=1_000_000, matmul=100, h2d_with_ssd=10_000)
    ceilings |= ceilings_of(kv_read=2000, kv_write=1000)
    assert floor_of(stats, ceilings) == (pytest.approx(floor_ms), bound)


def test_a_run_that_moves_what_was_planned_has_the_plans_floor() -> None:
    ceilings = ceilings_of(ssd=1000, h2d=10_000, d2h=5000, hbm=1_000_000, matmul=100)
    for settings in (Settings(), Settings(mode="stream"), Settings(mode="full")):
        plan = make_plan(inputs_for(settings=settings))
        rates = {name: ceiling.value for name, ceiling in ceilings.items()}
        for name, floor in predicted_floor(plan, rates).items():
            rows = {float(plan.shape.prompt_tokens): plan.shape.batch}
            shape = plan.inputs.config, rows, floor.passes, plan.inputs.dtype.itemsize
            work = prefill_work(*shape) if name == "prefill" else decode_work(*shape, plan.inputs.kv_token_bytes)
            moved = {tier: plan.bytes_per_pass[tier] * floor.passes for tier in ("ssd_read", "weight_h2d")}
            stats = stats_of(moved=moved, flops=int(work.flops), hbm_bytes=int(work.hbm_bytes))
            assert floor_of(stats, ceilings) == (pytest.approx(floor.ms * floor.passes), floor.bound_by)


def test_the_links_ceiling_is_its_best_rate_even_while_the_ssd_is_read() -> None:
    """A floor may not be beaten, and the rate beside the SSD may be."""
    ceilings = ceilings_of(ssd=1000, h2d=10_000, h2d_with_ssd=1000)
    stats = stats_of(moved={"ssd_read": 10**7, "weight_h2d": 10**9})
    assert floor_of(stats, ceilings) == (pytest.approx(100), "h2d")


def test_what_was_staged_before_the_clock_lowers_no_floor() -> None:
    """The floor comes from bytes that moved inside the phase, not from those its passes used."""
    ceilings = ceilings_of(h2d=1000)
    stats = stats_of(used={"weight_h2d": 10**9}, moved={"weight_h2d": 10**8})
    assert floor_of(stats, ceilings) == (pytest.approx(100), "h2d")


@pytest.mark.parametrize(("tier", "ceiling"), [("kv_h2d", "h2d"), ("kv_read", "kv_read")])
def test_kv_that_was_fetched_for_no_pass_raises_no_floor(tier: str, ceiling: str) -> None:
    """Behind the last pass the next one's is on its way, and nobody waits for it."""
    stats = stats_of(used={tier: 10**8}, moved={tier: 10**9})
    assert floor_of(stats, ceilings_of(**{ceiling: 1000})) == (pytest.approx(100), ceiling)


@pytest.mark.parametrize("missing", ["ssd", "h2d", "d2h", "hbm", "matmul", "kv_read", "kv_write"])
def test_without_a_ceiling_that_is_needed_the_floor_is_not_known(missing: str) -> None:
    ceilings = ceilings_of(ssd=1, h2d=1, d2h=1, hbm=1, matmul=1, kv_read=1, kv_write=1)
    del ceilings[missing]
    moved = {"ssd_read": 1, "weight_h2d": 1, "kv_d2h": 1, "kv_read": 1, "kv_write": 1}
    stats = stats_of(moved=moved, flops=1, hbm_bytes=1)
    assert floor_of(stats, ceilings) == (None, None)
    part = phase_of(stats, ceilings)
    assert (part.floor_ms, part.bound_by, part.roofline_pct) == (None, None, None)


def test_a_ceiling_that_is_not_needed_may_be_missing() -> None:
    assert floor_of(stats_of(hbm_bytes=10**9), ceilings_of(hbm=1000)) == (pytest.approx(1000), "hbm")


def test_a_phase_without_work_has_no_floor() -> None:
    assert floor_of(stats_of(), ceilings_of(hbm=1)) == (None, None)


def test_roofline_is_the_floors_share_of_the_measured_time() -> None:
    part = phase_of(stats_of(hbm_bytes=10**9, wall_ms=4000), ceilings_of(hbm=1000))
    assert part.roofline_pct == pytest.approx(25)


@pytest.mark.parametrize(("spread", "told"), [(4.9, None), (5.1, 5.1)])
def test_a_ceiling_that_varied_by_more_than_5_percent_is_told(spread: float, told: float | None) -> None:
    ceilings = {"matmul": Ceiling(1.0, 1.0, "TFLOPs", spread, "")}
    assert phase_of(stats_of(flops=10**12), ceilings).ceiling_spread_pct == told


def test_the_spread_told_is_that_of_the_rate_the_floor_was_made_with() -> None:
    ceilings = {
        "ssd": Ceiling(1e6, 1e6, "MBps", 50.0, ""),
        "h2d": Ceiling(1000.0, 1000.0, "MBps", 30.0, ""),
        "h2d_with_ssd": Ceiling(1000.0, 1000.0, "MBps", 7.0, ""),
    }
    part = phase_of(stats_of(moved={"ssd_read": 1000, "weight_h2d": 10**9}), ceilings)
    assert part.bound_by == "h2d"
    assert part.ceiling_spread_pct == 30.0


def test_differences_of_sums_are_no_negative_times() -> None:
    """A link that is busy the whole phase may come to a little more than the phase."""
    stats = dataclasses.replace(stats_of(), idle_ms={"ssd": None, "h2d": -1e-13, "compute": 3.0})
    assert phase_of(stats, {}).idle_ms == Idle(ssd=None, h2d=0.0, compute=3.0)


# -- rates and warnings


def test_io_rates_are_bytes_over_busy_time_of_both_phases() -> None:
    first = stats_of(moved={"weight_h2d": 10**9}, busy={"h2d": 100.0})
    second = stats_of(moved={"weight_h2d": 2 * 10**9}, busy={"h2d": 200.0})
    assert rates_of(first, second).weight_h2d_MBps == pytest.approx(10_000)


def rates_of(prefill: PhaseStats, decode: PhaseStats) -> LinkRates:
    return link_rates(ByPhase(prefill=phase_of(prefill, {}), decode=phase_of(decode, {})))


@pytest.mark.parametrize("busy", [None, 0.0])
def test_where_nothing_moved_there_is_no_rate(busy: float | None) -> None:
    rates = rates_of(*[stats_of(busy={"h2d": busy})] * 2)
    assert rates == LinkRates(weight_h2d_MBps=None, kv_h2d_MBps=None, kv_d2h_MBps=None)


def test_bytes_whose_time_was_not_measured_give_no_rate() -> None:
    assert rates_of(stats_of(moved={"weight_h2d": 10**9}), stats_of()).weight_h2d_MBps is None


@pytest.mark.parametrize(("used", "warned"), [(2000, 0), (2020, 0), (1980, 0), (2021, 1), (1979, 1), (0, 1)])
def test_a_phase_that_used_other_bytes_than_planned_by_over_1_percent_is_warned_of(used: int, warned: int) -> None:
    stats = stats_of(used={"weight_h2d": used, "ssd_read": 1000}, passes=2)
    planned = BytesPerPass(weight_h2d=1000, ssd_read=500, hbm_read=0)
    lines = list(plan_warnings({"decode": phase_of(stats, {})}, planned))
    assert len(lines) == warned
    assert all("decode" in line and "weight_h2d" in line for line in lines)


def test_reads_that_nobody_planned_are_warned_of() -> None:
    stats = stats_of(used={"ssd_read": 5}, passes=2)
    [line] = plan_warnings({"prefill": phase_of(stats, {})}, BytesPerPass(weight_h2d=0, ssd_read=0, hbm_read=0))
    assert "ssd_read" in line


# -- the text


def figure(ms: float) -> Estimate:
    return Estimate(ms, ms, ms)


def test_a_phase_that_takes_over_5_percent_else_than_predicted_is_warned_of() -> None:
    def warned(prefill_ms: float, decode_ms: float | None) -> list[str]:
        phases = {
            "prefill": phase_of(stats_of(passes=1, wall_ms=104), {}, figure(prefill_ms)),
            "decode": phase_of(stats_of(passes=2, wall_ms=212), {}, decode_ms and figure(decode_ms)),
        }
        return list(prediction_warnings(phases))

    (line,) = warned(100.0, 100.0)
    assert line.startswith("decode: took 212 ms, 200 were predicted")
    assert warned(100.0, None) == []
    assert len(warned(110.0, 112.0)) == 2


def test_a_prediction_counts_what_moved_in_the_phase_not_what_was_staged_before_it() -> None:
    stats = stats_of(passes=1, wall_ms=60, used={"weight_h2d": 1000}, moved={"weight_h2d": 600})
    assert list(prediction_warnings({"prefill": phase_of(stats, {}, figure(100.0))})) == []


def test_a_prediction_from_a_disturbed_ceiling_is_an_interval_alone() -> None:
    stats = stats_of(passes=2, wall_ms=212)
    steady, disturbed = phase_of(stats, {}, Estimate(100, 95, 105)), phase_of(stats, {}, Estimate(100, 80, 130))
    assert (steady.predicted_ms, steady.predicted_range_ms) == (200, [190, 210])
    assert (disturbed.predicted_ms, disturbed.predicted_range_ms) == (None, [160, 260])
    assert list(prediction_warnings({"decode": disturbed})) == []


@pytest.mark.parametrize(
    ("wall_ms", "told", "warned"), [(2000, 50.0, 0), (1000, 100.0, 0), (970, 100.0, 0), (500, None, 1)]
)
def test_a_run_is_never_said_to_be_faster_than_it_can_be(wall_ms: int, told: float | None, warned: int) -> None:
    """1 GB at 1 000 MB/s: a floor of a second. In half of it, the ceiling was none; by 3 %, that is its own noise."""
    part = phase_of(stats_of(hbm_bytes=10**9, wall_ms=wall_ms), ceilings_of(hbm=1000))
    assert part.floor_ms == pytest.approx(1000)
    assert part.roofline_pct == (told if told is None else pytest.approx(told))
    lines = list(beaten_floors({"decode": part}))
    assert len(lines) == warned
    assert all(
        "took 500 ms, less than its floor of 1000 ms: the ceiling of hbm was disturbed" in line for line in lines
    )


@pytest.mark.parametrize(
    ("busy_ms", "whole_s", "warned"),
    [(400, 0.4, 1), (970, 0.97, 0), (400, 1.0, 0), (400, 0.01, 0), (1900, 0.4, 0), (None, 0.4, 0)],
)
@pytest.mark.parametrize(("bound", "moved"), [("ssd", "ssd_read"), ("kv_read", "kv_read"), ("d2h", "kv_d2h")])
def test_a_tier_that_was_faster_than_its_ceiling_is_told_though_the_phase_took_longer(
    busy_ms: float | None, whole_s: float, warned: int, bound: str, moved: str
) -> None:
    """Of 2 s a tier with a floor of 1 s was busy for 0.4 s. By 3 %, by what crossed an edge or was short: nothing."""
    tier = {"ssd": "ssd", "d2h": "kv_d2h"}.get(bound, bound)
    stats = stats_of(moved={moved: 10**9}, busy={tier: busy_ms}, wall_ms=2000)
    whole = {moved: MoveRate(9, 10**9 if whole_s > 0.1 else 10**8, whole_s)}
    part = phase_of(dataclasses.replace(stats, whole=whole), ceilings_of(**{bound: 1000}))
    assert (part.floor_ms, part.bound_by) == (pytest.approx(1000), bound)
    assert part.roofline_pct == (None if warned else pytest.approx(50))
    told = f"decode: {bound} was busy for 400 ms of it, less than the floor of 1000 ms: the ceiling of {bound} was dist"
    assert [line[: len(told)] for line in beaten_floors({"decode": part})] == [told] * warned


def test_of_several_ranks_the_one_behind_the_floor_says_whether_it_was_one() -> None:
    whole = phase_of(stats_of(hbm_bytes=10**9, wall_ms=2000), ceilings_of(hbm=1000))
    shared = {key: getattr(whole, key) for key in RankPhase.__struct_fields__ if hasattr(whole, key)}
    ranks = [RankPhase(**shared | {"floor_ms": ms}, collectives_ms=None, collectives=0) for ms in (900.0, 1000.0)]
    assert _job_phase(list(enumerate(ranks))).roofline_pct == pytest.approx(50)
    for beaten, told in ((0, pytest.approx(50)), (1, None)):
        parts = [msgspec.structs.replace(r, roofline_pct=None) if n == beaten else r for n, r in enumerate(ranks)]
        assert _job_phase(list(enumerate(parts))).roofline_pct == told


def test_the_link_is_judged_by_its_weights_and_by_all_its_time() -> None:
    """KV on the link counts as busy, too: 0.4 s of weights and 0.7 s of KV are no less than the floor."""
    stats = stats_of(moved={"weight_h2d": 10**9}, busy={"h2d": 400.0}, wall_ms=2000)
    stats = dataclasses.replace(stats, whole={"weight_h2d": MoveRate(9, 10**9, 0.4)})
    for idle_ms, told in ((1600.0, None), (900.0, pytest.approx(50))):
        part = phase_of(dataclasses.replace(stats, idle_ms={**stats.idle_ms, "h2d": idle_ms}), ceilings_of(h2d=1000))
        assert part.roofline_pct == told


def test_the_summary_of_a_run_that_beat_its_floor_gives_no_share_of_it() -> None:
    text = summary(typed(earlier(phases__decode__floor_ms=9e6, phases__decode__roofline_pct=203.0)))
    assert "; the run beat it: a disturbed ceiling" in text
    assert "203" not in text


def test_numbers_keep_six_significant_digits() -> None:
    value = {"a": [1234.5678, 0.000123456789], "b": 123456789.0, "n": 123456789, "t": (True, None, "1.23456789")}
    kept = significant(value)
    assert kept == {"a": [1234.57, 0.000123457], "b": 123457000.0, "n": 123456789, "t": [True, None, "1.23456789"]}


def test_what_is_not_finite_becomes_null() -> None:
    assert significant([math.inf, -math.inf, math.nan]) == [None, None, None]


@given(st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False))
def test_rounding_loses_less_than_the_sixth_digit(value: float) -> None:
    kept = significant(value)
    if kept is not None:
        assert kept == pytest.approx(value, rel=5.1e-6)
        assert significant(kept) == kept


EARLIER = Path(__file__).with_name("schema_1.json")
"""A result of the built-in model as commit 064e7e0 wrote it, before results had a type."""


def earlier(**changes: Any) -> dict[str, Any]:
    return varied(json.loads(EARLIER.read_text(encoding="utf-8")), **changes)


def test_the_fixed_keys_are_the_guides_and_stand_first_in_its_order() -> None:
    assert list(FIXED_KEYS) == list(GUIDE)
    backwards = dict(reversed(earlier().items()))
    assert list(json.loads(dump(typed(backwards))))[: len(GUIDE)] == list(GUIDE)


def test_text_stays_readable_in_the_file() -> None:
    assert "你好" in dump(typed(earlier(output__texts=["你好"])))


def test_an_argument_that_is_no_text_costs_no_result() -> None:
    """Python hands such bytes on as halves of surrogate pairs, which no file can be written with."""
    result = typed(earlier(config__argv=["caf\udce9"]))
    assert json.loads(dump(result).encode("utf-8"))["config"]["argv"] == ["caf\udce9"]


# -- reading back


def refusal(path: Path) -> str:
    with pytest.raises(UnusableInput) as caught:
        read_result(path)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    """Every key of it, in its order, though an earlier program wrote it."""
    text = json.dumps(plain(read_result(EARLIER)))
    assert text == json.dumps(earlier())
    (tmp_path / "r.json").write_text(dump(read_result(EARLIER)), encoding="utf-8")
    assert read_result(tmp_path / "r.json") == read_result(EARLIER)


def test_a_list_of_numbers_is_one_line_of_the_file_and_texts_are_left_alone(tmp_path: Path) -> None:
    earlier_one = earlier()
    texts = ["[\n  1,\n  2\n]", "[ 1, 2 ]"]
    earlier_one["output"] |= {"texts": texts, "tokens": [[1, 20, 300], [4]], "margins": [[0.5, 1e-7, 2.0], [3.0]]}
    written = dump(checked(earlier_one, "a test"))
    assert "\n      [1, 20, 300],\n      [4]\n" in written
    assert "\n      [0.5, 1e-07, 2.0],\n      [3.0]\n" in written
    assert json.loads(written)["output"] == earlier_one["output"]


LATER = [
    "decode_tok_s",
    "load",
    "kv",
    "conditions",
    "parallel",
    "ceilings.ssd.median",
    "plan.bytes_per_pass.kv_h2d",
    "plan.stretch_rows",
    "load_s.stage_s",
    "provenance.numa_node",
    "provenance.drive.filesystem",
    "config.resolved.embedding",
    "config.environment.CUDA_VISIBLE_DEVICES",
    "repeats.statistics.e2e_ms.median_ci95",
    "phases.decode.predicted_ms",
    "phases.decode.predicted_range_ms",
    "phases.decode.stall_ms.kv",
    "phases.decode.busy_ms.kv_read",
    "phases.decode.busy_ms.kv_write",
    "phases.decode.bytes.kv_read",
    "phases.decode.bytes_moved.kv_read",
    "phases.decode.bytes_moved.kv_write",
    "kv.dtype",
    "kv.stretch_rows",
    "kv.gpu",
    "kv.throttle_pauses",
]
"""Keys that were added since the first program that wrote this schema version."""


@pytest.mark.parametrize("key", LATER)
def test_a_result_of_before_a_key_was_added_is_read(key: str) -> None:
    older = earlier()
    *way, last = key.split(".")
    place = older
    for name in way:
        place = place[name]
    del place[last]
    assert typed(older).e2e_ms == earlier()["e2e_ms"]


def test_tokens_a_second_leave_out_token_1_which_took_no_pass() -> None:
    """32 tokens in 31 passes of 85.4619 ms: one token a pass, whatever the guide's figure counts, old files too."""
    older = earlier()
    del older["decode_tok_s"]
    result = typed(older)
    assert result.decode_tok_s == pytest.approx(1e3 / 85.4619, rel=1e-5)
    assert result.whole("tpot_ms") == 85.4619
    (tpot_ms,), (rate,) = result.rounds("tpot_ms"), result.rounds("decode_tok_s")
    assert tpot_ms == pytest.approx(85.4619, rel=1e-3)
    assert rate * tpot_ms == pytest.approx(1e3)


def test_two_rows_make_two_tokens_a_pass() -> None:
    result = typed(earlier(batch_size=2, decode_tokens_total=64, decode_tok_s=None))
    assert result.decode_tok_s == pytest.approx(2e3 / 85.4619, rel=1e-5)


@pytest.mark.parametrize("without", [{"tpot_ms": None, "decode_forward_passes": 0}, {"tpot_ms__mean": 5e-324}])
def test_without_passes_that_took_time_there_is_no_rate(without: dict[str, Any]) -> None:
    assert typed(earlier(decode_tok_s=None, **without)).decode_tok_s is None


def test_keys_of_a_newer_program_are_passed_over() -> None:
    newer = earlier(of_tomorrow=1, phases__decode__of_tomorrow={"a": 1}, config__resolved__of_tomorrow=3)
    assert typed(newer).config.resolved["of_tomorrow"] == 3
    assert plain(typed(newer))["phases"] == earlier()["phases"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"phases__decode__bound_by": "moon"}, "phases.decode.bound_by: invalid enum value 'moon'"),
        ({"repeats__raw": [{}]}, "repeats.raw[0].prefill_ms is missing"),
        ({"config__resolved": {"seed": 1}}, "config: resolved.model is missing"),
        ({"kv__fraction_fetched": 1.5}, "kv.fraction_fetched: expected `float` <= 1.0"),
    ],
)
def test_a_key_that_is_wrong_is_named_with_its_whole_way(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnusableInput) as caught:
        checked(earlier(**changes), "r.json")
    assert str(caught.value).startswith("r.json")
    assert said in str(caught.value)


def test_a_missing_result_is_named(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.json")


def test_a_directory_is_no_result(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"batch_size": 1', b"\xff\xfe", b"mode,device\nmixed,cpu\n"])
def test_a_damaged_result_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    assert "no JSON" in refusal(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"# bench_infer: LLaMA models\n", "is no result of bench_infer.py (no JSON object)"),
        (b"[1]", "is no result of bench_infer.py (no JSON object)"),
        (b'\xef\xbb\xbf{"batch_size": 1', "was the run broken off?"),
        (b"\0" * 512, "was the run broken off?"),
    ],
)
def test_another_file_is_told_from_a_result_that_was_cut(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    assert refusal(path).removesuffix(" name what a run's --out-json wrote").rstrip(";").endswith(said)


def test_json_nested_beyond_reason_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("[" * 100_000)
    assert "no JSON" in refusal(path)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"x"', "{}", '{"schema_version": 1}'])
def test_json_that_is_no_result_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    assert "no result" in refusal(path)


@pytest.mark.parametrize("version", ["1", None, 1.0, True])
def test_a_version_that_is_no_whole_number_is_of_no_result(tmp_path: Path, version: object) -> None:
    assert "no result" in refusal(stored(tmp_path / "r.json", earlier(schema_version=version)))


@pytest.mark.parametrize(("version", "age"), [(SCHEMA_VERSION + 1, "newer"), (SCHEMA_VERSION - 1, "older")])
def test_a_result_of_another_schema_is_told_to_be_newer_or_older(tmp_path: Path, version: int, age: str) -> None:
    assert age in refusal(stored(tmp_path / "r.json", earlier(schema_version=version)))


# -- the schema, and real runs held to it


VALIDATOR = jsonschema.Draft202012Validator(
    result_schema(), format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
)


def faults(result: object) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(result)]


def subschemas(schema: Any, path: str = "$") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema inside ``schema`` that describes a value."""
    yield path, schema
    for key, inner in schema.get("properties", {}).items():
        yield from subschemas(inner, f"{path}.{key}")
    for inner in schema.get("anyOf", ()):
        yield from (found for found in subschemas(inner, path) if found[0] != path)
    if "items" in schema:
        yield from subschemas(schema["items"], f"{path}[]")
    for name, inner in schema.get("$defs", {}).items():
        yield from subschemas(inner, f"{path}#{name}")


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(result_schema())
    assert result_schema()["properties"]["schema_version"]["enum"] == [SCHEMA_VERSION]


def test_every_key_is_described_and_every_object_closed() -> None:
    for path, part in subschemas(result_schema()):
        assert "description" in part or "#" in path.rpartition(".")[2], f"{path} is not described"
        if "properties" in part:
            assert part["additionalProperties"] is False, f"{path} takes any key"


def test_the_schema_begins_with_the_guides_keys() -> None:
    assert list(result_schema()["properties"])[: len(FIXED_KEYS)] == list(FIXED_KEYS)


def test_the_schema_knows_every_flag_setting_and_variable() -> None:
    config = result_schema()["$defs"]["Config"]["properties"]
    flags = set(options_of(RunOptions)) | {"model"}
    assert set(config["resolved"]["properties"]) == flags
    assert set(config["environment"]["properties"]) == {*PRESETS, *ECHOED_ONLY}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A result of the built-in model in each mode; ``full`` has no ceilings."""
    directory = tmp_path_factory.mktemp("runs")
    results = {}
    for mode in MODES:
        out = directory / f"{mode}.json"
        argv = ["--mode", mode, "--device", "cpu", "--cache-dir", str(directory / "cache"), "--out-json", str(out)]
        argv += ["--prompt-len", "8", "--batch-size", "2", "--max-new-tokens", "4", "--seed", "1"]
        argv += ["--print-text", "--repeats", "2"] if mode == "mixed" else ["--no-probe"] if mode == "full" else []
        assert main(argv) == 0
        results[mode] = json.loads(out.read_text(encoding="utf-8"))
    return results


@pytest.mark.parametrize("mode", MODES)
def test_a_run_writes_values_that_its_options_allow(runs: Mapping[str, Any], mode: str) -> None:
    resolved = runs[mode]["config"]["resolved"]
    for name, declared in options_of(RunOptions).items():
        declared.check(resolved[name] if name not in ("dtype", "device", "tp") else declared.default)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_writes_what_the_schema_says(runs: Mapping[str, Any], mode: str) -> None:
    assert faults(runs[mode]) == []


def test_every_key_of_the_guides_example_is_in_the_schema_and_takes_its_value(runs: Mapping[str, Any]) -> None:
    assert faults({**runs["mixed"], **GUIDE}) == []


def test_the_schema_refuses_what_is_missing_new_or_zero_for_not_measured(runs: Mapping[str, Any]) -> None:
    for key in runs["mixed"]:
        lacking = {name: value for name, value in runs["mixed"].items() if name != key}
        assert faults(lacking), f"{key} is not required"
    changed = copy.deepcopy(runs["mixed"])
    changed["phases"]["decode"]["surprise"] = 1
    assert faults(changed)
    changed = copy.deepcopy(runs["mixed"])
    changed["io_bw_MBps"]["kv_h2d_MBps"] = 0.0
    assert faults(changed)


def test_the_fixed_keys_come_whole_from_the_median_round(runs: Mapping[str, Any]) -> None:
    """Of two, the faster one: with an even number no figure is a mean of rounds."""
    result = runs["mixed"]
    faster = min(result["repeats"]["raw"], key=lambda raw: raw["e2e_ms"])
    assert {name: result[name] for name in METRICS} == faster


@pytest.mark.parametrize("mode", MODES)
def test_the_figures_of_a_run_agree_with_each_other(runs: Mapping[str, Any], mode: str) -> None:
    result = runs[mode]
    assert result["ttft_ms"] == pytest.approx(result["prefill_ms"] + result["first_token_decode_ms"], rel=1e-5)
    assert result["e2e_ms"] == pytest.approx(result["prefill_ms"] + result["decode_ms"], rel=1e-5)
    assert result["throughput_tok_s"] == pytest.approx(
        result["decode_tokens_total"] / result["decode_ms"] * 1e3, rel=1e-5
    )
    assert (result["mode"], result["prompt_lens"], result["prefill_tokens_total"]) == (mode, [8, 8], 16)
    assert result["phases"]["prefill"]["wall_ms"] == result["prefill_ms"]
    assert result["phases"]["decode"]["wall_ms"] == result["decode_ms"]
    assert result["tpot_ms"]["n"] == result["decode_forward_passes"] == result["phases"]["decode"]["passes"]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("mode", ["preload", "stream", "mixed"])
def test_busy_stall_and_idle_explain_the_phase_to_1_percent(runs: Mapping[str, Any], mode: str, phase: str) -> None:
    told = runs[mode]["phases"][phase]
    explained = told["busy_ms"]["compute"] + (told["stall_ms"]["h2d"] or 0.0) + told["idle_ms"]["compute"]
    assert explained == pytest.approx(told["wall_ms"], rel=0.01)


def test_every_mode_gives_the_same_tokens(runs: Mapping[str, Any]) -> None:
    assert len({result["output"]["sha256"] for result in runs.values()}) == 1


def test_each_tier_moves_bytes_only_in_the_modes_that_stream_from_it(runs: Mapping[str, Any]) -> None:
    moved = {mode: result["phases"]["decode"]["bytes"] for mode, result in runs.items()}
    assert {mode for mode in MODES if moved[mode]["ssd_read"]} == {"mixed"}
    assert {mode for mode in MODES if moved[mode]["weight_h2d"]} == {"mixed", "stream"}
    for mode in ("mixed", "stream"):
        planned = runs[mode]["plan"]["bytes_per_pass"]["weight_h2d"] * runs[mode]["phases"]["decode"]["passes"]
        assert moved[mode]["weight_h2d"] == planned


def test_without_ceilings_floors_are_null_and_a_warning_says_why(runs: Mapping[str, Any]) -> None:
    result = runs["full"]
    assert [phase["floor_ms"] for phase in result["phases"].values()] == [None, None]
    assert any("--no-probe" in warning for warning in result["warnings"])


def test_on_the_cpu_gpu_figures_are_null(runs: Mapping[str, Any]) -> None:
    assert runs["mixed"]["gpu_mem_GB"] == {"allocated_GB": None, "reserved_GB": None}
    assert any("CPU" in warning for warning in runs["mixed"]["warnings"])


def test_texts_are_kept_only_if_asked_for(runs: Mapping[str, Any]) -> None:
    assert len(runs["mixed"]["output"]["texts"]) == 2
    assert runs["stream"]["output"]["texts"] is None


# -- for the terminal


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_these_letters_ends_no_verb(
    encoding: str, measured_files: tuple[Path, Path], tmp_path: Path
) -> None:
    odd = tmp_path / "详细-caf\udce9.json"
    shutil.copy(measured_files[0], odd)
    page = odd.with_suffix(".html")
    for words in (["compare"], ["report", "--out", str(page)]):
        done = subprocess.run(
            [sys.executable, "bench_infer.py", *words, str(measured_files[0]), str(odd)],
            cwd=Path(__file__).parents[3],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"caf\\udce9" in done.stdout
    assert "caf\\udce9" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("part", ["phases", "memory", "output", "gpu_mem_GB"])
def test_a_result_that_was_changed_by_hand_is_refused_in_a_sentence(runs: Mapping[str, Any], part: str) -> None:
    with pytest.raises(UnusableInput, match="changed by hand"):
        typed({**runs["mixed"], part: None})


def test_the_summary_shows_the_guides_figures_and_the_floor(runs: Mapping[str, Any]) -> None:
    text = summary(typed(runs["mixed"]))
    head, first, second = text.splitlines()[1:4]
    assert head == "=== Benchmark Summary ==="
    assert first.strip() == f"tpot_ms: {runs['mixed']['tpot_ms']['mean']:.3f}"
    assert second.strip() == f"decode_tok_s: {runs['mixed']['decode_tok_s']:.3f}"
    for name in METRICS:
        assert f"{name}: {runs['mixed'][name]:.3f}" in text
    assert "decode floor: " in text
    assert "bound by" in text
    assert "decode floor: not known" in summary(typed(runs["full"]))


@pytest.mark.parametrize("stdev", [None, 2.5])
def test_the_summary_of_several_rounds_says_which_one_it_shows(runs: Mapping[str, Any], stdev: float | None) -> None:
    text = summary(typed(varied(runs["mixed"], repeats__statistics__e2e_ms__stdev=stdev)))
    said = "figures: of the round of median e2e_ms; `compare` shows each figure's own median"
    assert (said in text) == (stdev is not None)


@pytest.mark.parametrize("mode", MODES)
def test_a_table_has_a_line_for_its_result(runs: Mapping[str, Any], mode: str) -> None:
    lines = row(typed(runs[mode]), "md").splitlines()
    assert len(lines) == 2 + 1
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split()[3] == mode
    assert " - " in lines[2]


def test_a_row_is_one_line_of_json_or_two_of_csv(runs: Mapping[str, Any]) -> None:
    result = typed(runs["mixed"])
    assert json.loads(row(result, "json")) == runs["mixed"]
    assert "\n" not in row(result, "json")
    head, line = row(result, "csv").splitlines()
    assert dict(zip(head.split(","), line.split(","), strict=True))["mode"] == "mixed"
