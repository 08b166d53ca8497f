"""A resource's best rate, as it was measured: what a floor is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The best rate seen of one resource: ``value`` in ``unit`` (MBps = 10^6 B/s, or TFLOPs), and the median."""

    value: float
    median: float
    unit: str
    spread_pct: float
    how: str
