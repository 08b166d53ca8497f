"""The spread of one figure over several rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from bench.result.types import Statistic


def statistic(samples: Sequence[float]) -> Statistic:
    """Spread of one metric, in its unit."""
    return Statistic(
        n=len(samples),
        median=statistics.median(samples),
        median_ci95=median_interval(samples),
        mean=statistics.fmean(samples),
        stdev=statistics.stdev(samples) if len(samples) > 1 else None,
        min=min(samples),
        max=max(samples),
    )


def median_interval(samples: Sequence[float]) -> list[float] | None:
    """95 % bootstrap interval of the median: percentiles 2.5 and 97.5 of the medians of 2000 seeded resamples.

    None for fewer than three samples. The same samples always give the same interval.
    """
    if len(samples) < 3:  # of two, every resample's median is one of three values: an interval says nothing
        return None
    picks = np.random.default_rng(0).integers(0, len(samples), (2000, len(samples)))
    medians = np.median(np.asarray(samples, dtype=np.float64)[picks], axis=1)
    return [float(end) for end in np.percentile(medians, (2.5, 97.5))]
