"""What several rounds say together: their spread, and whether they were steady."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES, SEED = 2000, 0
FEWEST_FOR_INTERVAL = 3
"""With two rounds every resample's median is one of three values: an interval from them says nothing."""
FEWEST_FOR_OUTLIER, FEWEST_FOR_TREND = 4, 5
OUTLIER_DEVIATIONS, OUTLIER_SHARE = 5.0, 0.05
TREND_SHARE, TREND_DEVIATIONS = 0.02, 1.96
_MAD_TO_STDEV = 1.4826
"""Of a normal distribution: its standard deviation over its median absolute deviation."""


def statistic(samples: Sequence[float]) -> dict[str, Any]:
    """Spread of one metric, in its unit: n, median, mean, sample standard deviation, least, most, interval."""
    interval = median_interval(samples)
    return {
        "n": len(samples),
        "median": statistics.median(samples),
        "median_ci95": None if interval is None else list(interval),
        "mean": statistics.fmean(samples),
        "stdev": statistics.stdev(samples) if len(samples) > 1 else None,
        "min": min(samples),
        "max": max(samples),
    }


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """95 % bootstrap interval of the median: percentiles 2.5 and 97.5 of the medians of 2000 seeded resamples.

    None for fewer than three samples. The same samples always give the same interval.
    """
    if len(samples) < FEWEST_FOR_INTERVAL:
        return None
    picks = np.random.default_rng(SEED).integers(0, len(samples), (RESAMPLES, len(samples)))
    medians = np.median(np.asarray(samples, dtype=np.float64)[picks], axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return float(low), float(high)


def steadiness_warnings(e2e_ms: Sequence[float]) -> list[str]:
    """A line for a first round that stands out, and one for rounds that grow or shrink one after the other."""
    return [*_outlier_first(e2e_ms), *_trend(e2e_ms)]


def _outlier_first(e2e_ms: Sequence[float]) -> list[str]:
    """The first round against the others: off by over 5 % and by over 5 of their robust standard deviations."""
    if len(e2e_ms) < FEWEST_FOR_OUTLIER:
        return []
    first, rest = e2e_ms[0], e2e_ms[1:]
    middle = statistics.median(rest)
    deviation = _MAD_TO_STDEV * statistics.median(abs(sample - middle) for sample in rest)
    if abs(first - middle) <= max(OUTLIER_DEVIATIONS * deviation, OUTLIER_SHARE * middle):
        return []
    return [
        f"the first round took {first:.1f} ms, the median of the others is {middle:.1f} ms: "
        "the machine was not warm; raise --warmup-rounds"
    ]


def _trend(e2e_ms: Sequence[float]) -> list[str]:
    """Mann and Kendall's test at 5 %, and a change over all rounds (Theil and Sen's slope) above 2 %."""
    n = len(e2e_ms)
    if n < FEWEST_FOR_TREND:
        return []
    pairs = [(j - i, e2e_ms[j] - e2e_ms[i]) for i in range(n) for j in range(i + 1, n)]
    balance = sum((change > 0) - (change < 0) for _, change in pairs)
    deviations = (abs(balance) - 1) / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    change = statistics.median(change / distance for distance, change in pairs) * (n - 1)
    share = change / statistics.median(e2e_ms)
    if deviations < TREND_DEVIATIONS or abs(share) < TREND_SHARE:
        return []
    return [
        f"e2e_ms {'rises' if share > 0 else 'falls'} by {100 * abs(share):.1f} % from the first to the last of {n} "
        "rounds: no steady state was reached; raise --warmup-rounds, and see whether the drive or the chip gets hot"
    ]
