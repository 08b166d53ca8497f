"""Whether one side is faster than another: one test, of e2e_ms, decided before the data were seen."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FEWEST, LEAST_SHARE, CONFIDENCE = 5, 0.01, 0.99


@dataclass(frozen=True, slots=True)
class Ratio:
    """e2e_ms of a side over that of the base, as the ratio of their geometric means.

    Its 99 % interval, of Welch's t test on logarithms, is None where either has fewer than two samples.
    """

    value: float
    low: float | None
    high: float | None
    n: tuple[int, int]  # samples of the base and of the side
    judged: Literal["faster", "slower", "no difference shown"] | None  # None where either has fewer than five samples


def ratio_of(base: Sequence[float], side: Sequence[float]) -> Ratio:
    """``side`` against ``base``, both in ms and above 0.

    Faster or slower if both have five samples, the interval leaves out 1 and the ratio is over 1 % away from it.
    """
    logs = [math.log(sample) for sample in base], [math.log(sample) for sample in side]
    difference = statistics.fmean(logs[1]) - statistics.fmean(logs[0])
    value, sizes = _exp(difference), (len(base), len(side))
    if min(sizes) < 2:
        return Ratio(value, None, None, sizes, None)
    # Half of Welch's interval for the difference of two means, variances unequal; 0 where nothing varies at all.
    half, parts = 0.0, [statistics.variance(samples) / len(samples) for samples in logs]
    if spread := sum(parts):
        from scipy.special import stdtrit  # here, since half a second of imports is too long for other verbs

        freedom = spread**2 / sum(part**2 / (size - 1) for part, size in zip(parts, sizes, strict=True))
        half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(spread)
    low, high = _exp(difference - half), _exp(difference + half)
    if min(sizes) < FEWEST:
        return Ratio(value, low, high, sizes, None)
    if low <= 1 <= high or abs(value - 1) <= LEAST_SHARE:
        return Ratio(value, low, high, sizes, "no difference shown")
    return Ratio(value, low, high, sizes, "faster" if value < 1 else "slower")


def _exp(power: float) -> float:
    """Infinite where no float is as large."""
    return math.exp(power) if power < math.log(sys.float_info.max) else math.inf
