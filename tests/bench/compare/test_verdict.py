"""The verdict: seldom wrong where nothing differs, seldom silent where something does."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import stdtrit

from bench.compare.verdict import ratio_of

TABLE = [(1, 63.6567411629), (4, 4.6040948713), (8, 3.3553873313), (100, 2.6258905214)]
"""Published quantiles of Student's t at 0.995: degrees of freedom, t."""


@pytest.mark.parametrize(("freedom", "t"), TABLE)
def test_the_interval_is_as_wide_as_the_quantile_of_the_tables(freedom: int, t: float) -> None:
    """Where the base does not vary, the degrees of freedom are those of the side alone."""
    side = [math.exp(0.01 * (place % 2)) for place in range(freedom + 1)]
    found = ratio_of([1.0] * (freedom + 1), side)
    half = t * statistics.stdev(map(math.log, side)) / math.sqrt(len(side))
    assert found.high is not None
    assert math.log(found.high / found.value) == pytest.approx(half, rel=1e-9)
    assert found.low == pytest.approx(found.value * math.exp(-half), rel=1e-9)


def a_try(random: np.random.Generator, factor: float, n: int = 5, noise: float = 0.01) -> str | None:
    base, side = random.lognormal(7, noise, n), factor * random.lognormal(7, noise, n)
    return ratio_of(base.tolist(), side.tolist()).judged


@pytest.mark.parametrize(("n", "noise"), [(5, 0.01), (5, 0.05), (12, 0.05)])
def test_equal_sides_are_called_different_in_at_most_2_percent_of_1000_tries(n: int, noise: float) -> None:
    random = np.random.default_rng(1)
    different = sum(a_try(random, 1.0, n, noise) != "no difference shown" for _ in range(1000))
    assert different <= 20


@pytest.mark.parametrize(("factor", "found"), [(1.05, "slower"), (1 / 1.05, "faster")])
def test_5_percent_at_1_percent_of_noise_is_found_in_at_least_95_percent_of_1000_tries(
    factor: float, found: str
) -> None:
    random = np.random.default_rng(2)
    assert sum(a_try(random, factor) == found for _ in range(1000)) >= 950


def test_below_five_samples_there_is_a_ratio_and_no_verdict() -> None:
    four = ratio_of([100, 101, 99, 100], [200, 201, 199, 200])
    assert four.value == pytest.approx(2, rel=1e-3)
    assert four.judged is None
    assert four.low is not None
    one = ratio_of([100] * 9, [200])
    assert (one.low, one.high, one.judged) == (None, None, None)


def test_a_difference_of_1_percent_is_none_however_sure_it_is() -> None:
    judged = [ratio_of([100.0] * 9, [100.0 * factor] * 9).judged for factor in (0.991, 1.009, 1.02)]
    assert judged == ["no difference shown", "no difference shown", "slower"]


def test_the_interval_is_welchs() -> None:
    """Worked by hand: means 0 and ln 1.1 of logs, variances 0.01 and 0.04 over 5 and 6 samples."""
    base = [math.exp(0.1 * x) for x in (-math.sqrt(2), 0, 0, 0, math.sqrt(2))]
    side = [1.1 * math.exp(0.2 * x) for x in (-math.sqrt(2.5), 0, 0, 0, 0, math.sqrt(2.5))]
    parts = 0.01 / 5, 0.04 / 6
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 4 + parts[1] ** 2 / 5)
    half = stdtrit(freedom, 0.995) * math.sqrt(sum(parts))
    found = ratio_of(base, side)
    assert found.value == pytest.approx(1.1)
    assert found.low == pytest.approx(1.1 * math.exp(-half))
    assert found.high == pytest.approx(1.1 * math.exp(half))


@given(st.lists(st.floats(1, 1e6), min_size=5, max_size=9), st.lists(st.floats(1, 1e6), min_size=5, max_size=9))
def test_turned_round_the_verdict_turns_round(base: list[float], side: list[float]) -> None:
    there, back = ratio_of(base, side), ratio_of(side, base)
    assert there.value == pytest.approx(1 / back.value)
    assert {there.judged, back.judged} in ({"faster", "slower"}, {"no difference shown"}) or (
        abs(there.value - 1) < 0.0102  # 1.01 and 1 / 1.01 are not equally far from 1
    )


@pytest.mark.parametrize(("base", "side"), [([1e-300] * 5, [1e300] * 5), ([1e-20, 1e24], [1e-20, 1e24])])
def test_a_ratio_beyond_all_floats_is_infinite_and_no_traceback(base: list[float], side: list[float]) -> None:
    there, back = ratio_of(base, side), ratio_of(side, base)
    assert there.high == math.inf
    assert {there.judged, back.judged} in ({"slower", "faster"}, {None})
