"""The same run in every weight format, a line each."""

from __future__ import annotations

from collections.abc import Mapping

from wsm.plan.hardware import GIB
from wsm.plan.plan import Plan
from wsm.plan.time import Ceiling, predicted_floor, predicted_pass_ms

_HEAD = ("weight format", "layers MB", "SSD MB", "link MB", "GPU GiB", "CPU GiB", "ms a pass", "tok/s", "")


def by_format(plans: Mapping[str, Plan], ceilings: Mapping[str, Ceiling], measured: str) -> str:
    """A table for the terminal: bytes at rest and of a pass, memory, a decode pass and tokens a second, what fits.

    A time is predicted, or else the floor. What decoding takes is left out but for the format whose rate is among the
    ``ceilings``, the ``measured`` one.
    """
    without = {name: ceiling for name, ceiling in ceilings.items() if name != "weight_decode"}
    rows = [_HEAD, *(_cells(n, plan, ceilings if n == measured else without) for n, plan in plans.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) if at in (0, 8) else cell.rjust(width) for at, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in rows)
    )
    return "\n".join(
        ["the same in each weight format (what each costs: `bench_infer.py quality`)", *map(_indented, lines)]
    )


def _indented(line: str) -> str:
    return f"  {line.rstrip()}"


def _cells(name: str, plan: Plan, ceilings: Mapping[str, Ceiling]) -> tuple[str, ...]:
    predicted, ms, tokens = predicted_pass_ms(plan, ceilings)["decode"], "-", "-"
    floor = predicted_floor(plan, {bound: ceiling.value for bound, ceiling in ceilings.items()}).get("decode")
    known = predicted if predicted is not None else floor.ms if floor is not None else None
    if known:
        bound = "" if predicted is not None else "at least "
        ms, tokens = f"{bound}{known:.2f}", f"{1e3 * plan.shape.batch / known:.3g}"
    moved = plan.bytes_per_pass
    return (
        name,
        f"{plan.inputs.layers_bytes(range(plan.inputs.config.n_layers)) / 1e6:.1f}",
        *(f"{moved[way] / 1e6:.1f}" for way in ("ssd_read", "weight_h2d")),
        f"{plan.gpu_bytes / GIB:.3f}",
        f"{plan.cpu_bytes / GIB:.3f}",
        ms,
        tokens,
        "" if plan.fits else "does not fit",
    )
