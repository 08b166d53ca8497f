"""The same run in every weight format, a line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from wsm.plan.hardware import GIB
from wsm.plan.plan import Plan
from wsm.plan.speculated import Speculated
from wsm.plan.time import Ceiling, Estimate, floor_estimate, predicted_pass_ms

_HEAD = ("weight format", "layers MB", "SSD MB", "link MB", "GPU GiB", "CPU GiB", "ms a pass", "tok/s")


class FormatPlan(NamedTuple):
    """A plan in one format, and a decode pass of it: predicted, or (``at_least``) its floor; None: not known.

    ``drafted`` is what a draft makes of it, where that is asked for.
    """

    name: str
    plan: Plan
    decode_pass: Estimate | None
    at_least: bool
    drafted: Speculated | None = None

    @property
    def rest_bytes(self) -> int:
        """Of all layers."""
        return self.plan.inputs.layers_bytes(range(self.plan.inputs.config.n_layers))

    @property
    def pass_ms(self) -> float | None:
        """None also where the rates behind it vary too much for a figure."""
        return self.decode_pass.ms if self.decode_pass is not None and self.decode_pass.steady else None

    @property
    def tokens_per_s(self) -> float | None:
        return 1e3 * self.plan.shape.batch / self.pass_ms if self.pass_ms else None


Drafting = Callable[[Plan, Mapping[str, Ceiling]], Speculated | None]
"""What a draft makes of a plan, at these rates."""


def by_format(
    plans: Mapping[str, Plan], ceilings: Mapping[str, Ceiling], measured: str, drafting: Drafting | None = None
) -> list[FormatPlan]:
    """What decoding takes counts only for the ``measured`` format, whose rate is among the ``ceilings``."""
    found = []
    for name, plan in plans.items():
        rates = {rate: known for rate, known in ceilings.items() if rate != "weight_decode" or name == measured}
        predicted = predicted_pass_ms(plan, rates)["decode"]
        known = predicted if predicted is not None else floor_estimate(plan, rates)["decode"]
        found.append(FormatPlan(name, plan, known, predicted is None, drafting and drafting(plan, rates)))
    return found


def shown_by_format(formats: list[FormatPlan]) -> str:
    """A table for the terminal: bytes at rest and of a pass, memory, a decode pass and tokens a second, what fits."""
    drafted = any(found.drafted is not None for found in formats)
    rows = [(*_HEAD, *(("with draft",) if drafted else ()), ""), *(_cells(found, drafted) for found in formats)]
    last = len(rows[0]) - 1
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) if at in (0, last) else cell.rjust(width) for at, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in rows)
    )
    title = "the same in each weight format (what each costs: `bench_infer.py quality`)"
    if any(found.plan.inputs.draft is not None for found in formats):
        title += "; tok/s: one token a row's pass, nothing of the draft accepted"
        title += ", with draft: as it is assumed" if drafted else " (plan --acceptance X counts it)"
    return "\n".join([title, *(f"  {line.rstrip()}" for line in lines)])


def _cells(found: FormatPlan, drafted: bool) -> tuple[str, ...]:
    plan, moved, ms, tokens = found.plan, found.plan.bytes_per_pass, "-", "-"
    if found.decode_pass is not None:
        least, most = ("at least ", "at most ") if found.at_least else ("", "")
        ms = least + found.decode_pass.shown().removesuffix(" ms")
        tokens = most + found.decode_pass.rate_shown(plan.shape.batch)
    return (
        found.name,
        f"{found.rest_bytes / 1e6:.1f}",
        *(f"{nbytes / 1e6:.1f}" for nbytes in (moved["ssd_read"], moved["weight_h2d"] + moved["kv_h2d"])),
        f"{plan.gpu_bytes / GIB:.3f}",
        f"{plan.cpu_bytes / GIB:.3f}",
        ms,
        tokens,
        *((found.drafted.rate_shown() if found.drafted is not None else "-",) if drafted else ()),
        "" if plan.fits else "does not fit",
    )
