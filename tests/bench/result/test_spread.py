"""Repeats: what is said of their spread, and when they are called unsteady."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.result.spread import median_interval, statistic
from bench.run.warnings import steadiness_warnings

times = st.lists(st.floats(1.0, 1e5), min_size=3, max_size=30)


@given(times)
def test_the_interval_holds_the_median_and_lies_within_the_samples(samples: list[float]) -> None:
    interval = median_interval(samples)
    assert interval is not None
    assert min(samples) <= interval[0] <= statistics.median(samples) <= interval[1] <= max(samples)


def test_the_same_samples_always_give_the_same_interval() -> None:
    samples = [10.0, 11.0, 9.0, 14.0, 10.5]
    assert statistic(samples) == statistic(samples)
    assert statistic(samples).median_ci95 == [9.0, 14.0]


@pytest.mark.parametrize("samples", [[5.0], [5.0, 6.0]])
def test_too_few_samples_have_no_interval(samples: list[float]) -> None:
    assert statistic(samples).median_ci95 is None


def test_the_interval_of_95_percent_holds_the_true_median_about_that_often() -> None:
    """The percentile bootstrap is a little too narrow for a median of few samples: 90 to 98 % at n = 25."""
    random = np.random.default_rng(7)
    held = 0
    for _ in range(300):
        interval = median_interval(random.normal(100, 5, 25).tolist())
        assert interval is not None
        held += interval[0] <= 100 <= interval[1]
    assert 0.90 <= held / 300 <= 0.98


# -- steadiness


def test_steady_rounds_are_not_warned_of() -> None:
    assert steadiness_warnings([100, 101, 99, 100.5, 99.5, 100.2]) == []


def test_a_cold_first_round_is_warned_of() -> None:
    [line] = steadiness_warnings([150, 101, 99, 100, 100])
    assert "first round took 150.0 ms" in line
    assert "100.0 ms" in line
    assert "--warmup-rounds" in line


def test_a_slow_round_that_is_not_the_first_is_no_warm_up_matter() -> None:
    assert steadiness_warnings([100, 101, 150, 99, 100]) == []


def test_a_first_round_off_by_less_than_5_percent_is_none() -> None:
    assert steadiness_warnings([104, 100, 100, 100, 100]) == []


@pytest.mark.parametrize(("step", "said"), [(2.0, "rises by 7.7 %"), (-2.0, "falls by 8.3 %")])
def test_rounds_that_go_one_way_are_warned_of(step: float, said: str) -> None:
    [line] = steadiness_warnings([100 + step * place for place in range(5)])
    assert said in line


def test_a_drift_below_2_percent_is_none() -> None:
    assert steadiness_warnings([100 + 0.3 * place for place in range(6)]) == []


def test_three_rounds_are_too_few_to_call_unsteady() -> None:
    assert steadiness_warnings([150, 120, 100]) == []


def test_noise_is_seldom_called_unsteady() -> None:
    random = np.random.default_rng(3)
    called = sum(bool(steadiness_warnings(random.lognormal(7, 0.02, 10).tolist())) for _ in range(500))
    assert called <= 0.08 * 500
