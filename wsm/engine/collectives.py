"""The time that collectives take, from marks around each on the compute stream; asked when the device is idle."""

from __future__ import annotations

from wsm.engine.device import Device, Event
from wsm.engine.telemetry import Interval, merged, overlap_s


class CollectiveTimes:
    """Records where the computation is with other ranks; waiting for the slowest of them counts.

    Args:
        keep: whether to record at all, as for :class:`wsm.engine.telemetry.Telemetry`.
    """

    def __init__(self, device: Device, *, keep: bool = True) -> None:
        self._device, self._keep = device, keep
        self._taken: list[tuple[Event, Event]] = []

    def mark(self) -> Event | None:
        """A point in the compute stream; None where nothing is kept."""
        return self._device.record(self._device.compute_stream()) if self._keep else None

    def took(self, start: object, end: object) -> None:
        """A collective ran between two marks."""
        if start is not None and end is not None:
            self._taken.append((start, end))  # type: ignore[arg-type]  # marks of this very object

    def within(self, window: Interval) -> tuple[float, int]:
        """Milliseconds in ``window`` (host seconds), and how many collectives ended in it."""
        spans = [(self._device.seconds(start), self._device.seconds(end)) for start, end in self._taken]
        inside = [span for span in spans if window[0] <= span[1] <= window[1]]
        return 1e3 * overlap_s(merged(inside), window), len(inside)
