"""Student's t distribution: what :mod:`bench.compare.verdict` needs of it, without a statistics library."""

from __future__ import annotations

import math

_TINY = 1e-300


def probability_below(t: float, freedom: float) -> float:
    """P(T <= t) of Student's t with ``freedom`` degrees of freedom (any positive number)."""
    both = freedom + t * t
    tail = 0.5 * _incomplete_beta(freedom / 2, 0.5, freedom / both, t * t / both)
    return 1 - tail if t > 0 else tail


def quantile(probability: float, freedom: float) -> float:
    """The t below which ``probability`` lies, to twelve digits or so, by bisection."""
    if not 0 < probability < 1 or not freedom > 0:
        raise ValueError(f"no t has probability {probability} below it at {freedom} degrees of freedom")
    if probability < 0.5:
        return -quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while probability_below(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if probability_below(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22).

    ``rest`` is 1 - x, which a difference would lose where x is almost 1.
    """
    if x <= 0 or rest <= 0:
        return float(rest <= 0)
    if x > (a + 1) / (a + b + 2):  # there the fraction of the mirrored function converges quickly
        return 1 - _incomplete_beta(b, a, rest, x)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(scale + a * math.log(x) + b * math.log(rest)) / a
    return front * _beta_fraction(a, b, x)


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Lentz's method, front to back, until a step changes nothing."""
    c, d = 1.0, 1 / _kept_off_zero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 1000):
        before = value
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for factor in (even, odd):
            d = 1 / _kept_off_zero(1 + factor * d)
            c = _kept_off_zero(1 + factor / c)
            value *= c * d
        if abs(value - before) < 1e-15 * abs(value):
            break
    return value


def _kept_off_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
