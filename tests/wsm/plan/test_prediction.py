"""What a steady pass is expected to take."""

from __future__ import annotations

import pytest

from tests.plans import H70B, inputs_for
from wsm.plan.machines import rates_elsewhere
from wsm.plan.plan import make_plan
from wsm.plan.time import Ceiling, Work, parts_ms, predict, predicted_pass_ms
from wsm.settings import Settings

LAYER_BYTES = 1_711_308_800  # of 70B in bfloat16, each image padded to 4 096 bytes


def rates(**values: float) -> dict[str, Ceiling]:
    """Ceilings whose best sample is a tenth above the median."""
    return {name: Ceiling(1.1 * value, value, "", 10.0, "") for name, value in values.items()}


def decode_ms(settings: Settings, **values: float) -> float | None:
    estimate = predicted_pass_ms(make_plan(inputs_for(H70B, settings)), rates(**values))["decode"]
    return None if estimate is None else estimate.ms


STREAM = Settings(mode="stream", gpu_cached_layers=4)
MIXED = Settings(mode="mixed", gpu_cached_layers=4, cpu_cache_layers=40, prefetch_distance=6)
SSD_LAYERS, STREAMED = 80 - 4 - (40 - 6), 76


def test_a_pass_that_the_link_bounds_takes_its_bytes_at_the_median_rate() -> None:
    assert decode_ms(STREAM, h2d=50_000.0) == pytest.approx(STREAMED * LAYER_BYTES / 50e9 * 1e3, rel=1e-3)


def test_a_pass_that_the_drive_bounds_takes_the_drives_bytes() -> None:
    expected = SSD_LAYERS * LAYER_BYTES / 2e9 * 1e3
    assert decode_ms(MIXED, h2d=50_000.0, h2d_with_ssd=40_000.0, ssd=2_000.0) == pytest.approx(expected, rel=1e-3)


def test_while_a_fast_drive_is_read_the_link_has_only_its_rate_beside_it() -> None:
    ssd_s = SSD_LAYERS * LAYER_BYTES / 60e9
    expected = ssd_s + (STREAMED * LAYER_BYTES - 40e9 * ssd_s) / 50e9
    found = decode_ms(MIXED, h2d=50_000.0, h2d_with_ssd=40_000.0, ssd=60_000.0)
    assert found == pytest.approx(expected * 1e3, rel=1e-3)


@pytest.mark.parametrize(
    ("kv", "ssd", "ms"),
    [
        pytest.param(7e9, 0, 500 + 200, id="20 of 30 GB beside the reads, the rest alone"),
        pytest.param(7e9, 1e8, 100 + 400 + 248, id="beside both at 40 % of 80 % first"),
        pytest.param(14e9, 0, 1000, id="the reads take longest"),
    ],
)
def test_while_kv_is_read_the_link_has_only_its_rate_beside_it(kv: float, ssd: float, ms: float) -> None:
    found = rates(h2d=50_000.0, h2d_with_kv=40_000.0, kv_read=14_000.0, ssd=1_000.0, h2d_with_ssd=20_000.0)
    estimate = predict(Work(h2d_bytes=30e9, kv_read_bytes=kv, ssd_bytes=ssd), found, 2)
    assert estimate is not None
    assert estimate.ms == pytest.approx(ms)


def test_a_probe_that_saw_the_link_faster_beside_the_drive_makes_fewer_reads_no_dearer() -> None:
    noisy = {"h2d": 1_000.0, "h2d_with_ssd": 9_000.0, "ssd": 60_000.0}
    more_cached = Settings(mode="mixed", gpu_cached_layers=4, cpu_cache_layers=60, prefetch_distance=6)
    fewer, more = decode_ms(more_cached, **noisy), decode_ms(MIXED, **noisy)
    assert fewer is not None
    assert more is not None
    assert fewer <= more


def test_without_streams_or_rates_nothing_is_predicted() -> None:
    assert decode_ms(Settings(mode="preload"), h2d=50_000.0, hbm=4e6) is None
    assert decode_ms(STREAM) is None
    assert decode_ms(MIXED, h2d=50_000.0) is None


def test_where_arithmetic_takes_longest_nothing_is_predicted() -> None:
    assert decode_ms(STREAM, h2d=50_000.0, matmul=0.01) is None
    assert decode_ms(STREAM, h2d=50_000.0, matmul=800.0) is not None


@pytest.mark.parametrize(("teraflops", "ms"), [(100, 100), (500, 500), (1000, 1500)])
def test_long_arithmetic_is_counted_at_the_rate_that_lasts(teraflops: float, ms: float) -> None:
    """1000 TFLOPs in the first half second, 500 from then on."""
    work, found = Work(flops=teraflops * 1e12), {"matmul": 500.0, "matmul_burst": 1000.0}
    assert parts_ms(work, found) == {"compute": pytest.approx(ms)}
    assert parts_ms(work, {"matmul": 500.0}) == {"compute": pytest.approx(teraflops * 2)}
    assert parts_ms(work, {**found, "matmul_burst": 400.0}) == {"compute": pytest.approx(teraflops * 2)}


def test_a_rate_of_arithmetic_that_is_given_is_not_mixed_with_the_one_here() -> None:
    here = rates(matmul=700.0, matmul_burst=800.0)
    assert rates_elsewhere(here, None, {}, None) == here
    assert set(rates_elsewhere(here, None, {}, 100.0)) == {"matmul"}


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({}, {"h2d_with_ssd", "h2d_with_kv"}),
        ({"h2d": 20.0}, set()),
        ({"ssd": 3.0}, {"h2d_with_kv"}),
        ({"kv_read": 3.0, "kv_write": 3.0}, {"h2d_with_ssd"}),
    ],
)
def test_what_the_link_has_beside_a_drive_is_not_known_beside_another(given: dict[str, float], left: set[str]) -> None:
    here = rates(h2d=50_000.0, h2d_with_ssd=45_000.0, h2d_with_kv=40_000.0)
    assert {name for name in rates_elsewhere(here, None, given, None) if "with" in name} == left


def test_a_steady_pass_is_not_predicted_at_what_a_card_does_from_rest() -> None:
    """400 ms of arithmetic at the rate that lasts, 100 in the first half second; the link takes 200."""
    work, found = Work(h2d_bytes=10e9, flops=200e12), rates(h2d=50_000.0, matmul=500.0, matmul_burst=2000.0)
    assert predict(work, found, 2) is None  # arithmetic decides
    assert predict(work, rates(h2d=20_000.0, matmul=500.0, matmul_burst=2000.0), 2) == predict(
        work, rates(h2d=20_000.0, matmul=500.0), 2
    )


def test_nothing_is_predicted_of_a_prefill_that_writes_kv_at_an_unknown_rate() -> None:
    work, found = Work(h2d_bytes=10e9, kv_write_bytes=1e9), rates(h2d=50_000.0)
    assert predict(work, found, 2) is None
    slow = predict(work, found | rates(kv_write=1_000.0), 2)
    assert slow is not None
    assert slow.ms == pytest.approx(1000)


def test_the_link_waits_for_each_layer_whose_kv_is_below_the_device_which_no_floor_counts() -> None:
    """Measured so: 8 rows of 136 tokens, 76 of 80 layers, 322 ms where the bytes alone take 285."""
    work = Work(h2d_bytes=285e-3 * 50e9, kv_layers=76)
    estimate = predict(work, rates(h2d=50_000.0), 2)
    assert estimate is not None
    assert estimate.ms == pytest.approx(322, rel=0.01)
    assert parts_ms(work, {"h2d": 50_000.0}) == {"h2d": pytest.approx(285)}
