"""Which rates a plan's times wait for, and what tells them."""

from __future__ import annotations

from collections.abc import Mapping

from wsm.plan.plan import Plan
from wsm.plan.time import STEADY_PCT, Ceiling

_NEEDED = {
    "ssd_read": ("ssd", "the drive", "--ssd-gbps"),
    "weight_h2d": ("h2d", "the link", "--link-gbps"),
    "kv_h2d": ("h2d", "the link", "--link-gbps"),
    "kv_read": ("kv_read", "--kv-device", "--kv-gbps"),
}
"""By what a pass moves: its rate, what that is the rate of, and ``plan``'s flag. No time is told without them."""


def missing_rates(ceilings: Mapping[str, Ceiling], *plans: Plan) -> dict[str, str]:
    """The flags of the rates that the plans need and nobody knows, by what each is the rate of."""
    moved = {
        what: flag
        for way, (rate, what, flag) in _NEEDED.items()
        if rate not in ceilings and any(plan.bytes_per_pass[way] for plan in plans)
    }
    if moved or ceilings.keys() & {"h2d", "hbm", "matmul"}:
        return moved
    return {"device memory": "--hbm-gbps", "arithmetic": "--matmul-tflops"}  # where nothing moves, one would do


def time_told_by(ceilings: Mapping[str, Ceiling], *plans: Plan) -> str:
    """What makes the times of the plans known: a run here, or flags where another machine is planned for."""
    missing = missing_rates(ceilings, *plans)
    if missing and plans[0].inputs.hardware.elsewhere:
        return f"give {' and '.join(dict.fromkeys(missing.values()))}"
    return _run_that_measures(missing, plans[-1])


def _run_that_measures(missing: Mapping[str, str], plan: Plan) -> str:
    """Rates are kept by model, weight format, dtype, store and device: what another run measured does not count."""
    formats = {str(tensor.format) for layout in plan.inputs.layouts.values() for tensor in layout.encoded}
    of = f" in {' and '.join(sorted(formats))}" if formats else ""
    return (
        f"rates of {' and '.join(missing)} are missing, which a run of {plan.inputs.config.name}{of} with "
        f"--mode {plan.placement.mode} measures here, and keeps where they vary by at most {STEADY_PCT:.0f} %"
    )
