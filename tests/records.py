"""What an engine's telemetry has written down, as a test looks at it."""

from __future__ import annotations

from dataclasses import fields

from wsm.engine.records import Records
from wsm.engine.stretch import PhaseStats, Stretch
from wsm.engine.telemetry import Telemetry

EVER = (0.0, 1e12)


def records_of(telemetry: Telemetry) -> Records:
    """All that has ended and was not folded."""
    return Records(**{kind.name: getattr(telemetry, kind.name)() for kind in fields(Records)})


def stats_over(telemetry: Telemetry, steps: range, passes: range) -> PhaseStats:
    """What those passes come to, whenever they were."""
    seen = {kind.name for kind in fields(Records) if getattr(telemetry, kind.name)()}
    stretch = Stretch(EVER[0], steps.start, passes.start, seen)
    stretch.close(EVER[1], steps.stop, passes.stop)
    stretch.add(records_of(telemetry))
    return stretch.stats()
