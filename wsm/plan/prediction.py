"""How long a steady pass will take, as against how long it must take: :mod:`wsm.plan.floor` has the floor."""

from __future__ import annotations

from collections.abc import Mapping

from wsm.plan.ceilings import Ceiling
from wsm.plan.floor import Work, parts_ms, pass_work
from wsm.plan.plan import Plan


def predicted_pass_ms(plan: Plan, ceilings: Mapping[str, Ceiling]) -> dict[str, float | None]:
    """Milliseconds of a steady pass of each phase, ``prefill`` and ``decode``.

    From the medians of the probe, where the floor takes the best samples. The tiers work side by side, so the slowest
    one decides; while the SSD is read, the link has only its rate beside it. None where no weights are streamed, or
    where arithmetic or device memory takes longest: kernels and launches decide there, and no rate says how long.
    """
    return {phase: _pass_ms(work, ceilings) for phase, work in pass_work(plan).items()}


def _pass_ms(work: Work, ceilings: Mapping[str, Ceiling]) -> float | None:
    if not work.h2d_bytes or "h2d" not in ceilings or (work.ssd_bytes and "ssd" not in ceilings):
        return None
    parts = parts_ms(work, {name: ceiling.median for name, ceiling in ceilings.items()})
    ssd_ms = parts.get("ssd") or 0.0
    streaming_ms = max(ssd_ms, 1e3 * _link_s(work.h2d_bytes, ssd_ms / 1e3, ceilings))
    on_gpu_ms = max(parts.get("hbm") or 0.0, parts.get("compute") or 0.0)
    return None if on_gpu_ms > streaming_ms else streaming_ms


def _link_s(nbytes: float, ssd_s: float, ceilings: Mapping[str, Ceiling]) -> float:
    """Seconds of the link: at its rate beside the SSD while that is read, at its own afterwards.

    A rate beside the SSD above the link's own is the probe's noise: sharing makes nothing faster.
    """
    alone = ceilings["h2d"].median * 1e6
    beside = min(alone, ceilings["h2d_with_ssd"].median * 1e6) if "h2d_with_ssd" in ceilings else alone
    moved = beside * ssd_s
    return nbytes / beside if moved >= nbytes else ssd_s + (nbytes - moved) / alone
