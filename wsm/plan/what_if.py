"""What one step of each flag would buy: the same plan with one flag changed, and the difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wsm.plan.advice import BATCH
from wsm.plan.ceilings import Ceiling
from wsm.plan.cost import UNKNOWN_TIME, PassTimes, pass_times
from wsm.plan.memory import GIB
from wsm.plan.plan import Plan, PlanInputs, make_plan
from wsm.settings import spelled


@dataclass(frozen=True, slots=True)
class Step:
    """One flag's next value and the plan that it gives; ``times`` is None where no rates are known."""

    flag: str
    before: Plan
    after: Plan
    times: PassTimes | None

    def more(self, moved: str) -> int:
        """Bytes a pass of ``ssd_read`` or ``weight_h2d`` more than before."""
        return self.after.bytes_per_pass[moved] - self.before.bytes_per_pass[moved]


def steps(plan: Plan, ceilings: Mapping[str, Ceiling]) -> list[Step]:
    """A step for every flag that moves other bytes or takes other memory in this plan's mode."""
    found = []
    for flag, inputs in _changes(plan.inputs):
        after = make_plan(inputs)
        if _weight(after) != _weight(plan):
            found.append(Step(flag, plan, after, pass_times(plan, after, ceilings)))
    return found


def _weight(plan: Plan) -> tuple[object, ...]:
    return dict(plan.bytes_per_pass), plan.gpu_bytes, plan.cpu_bytes


def _changes(inputs: PlanInputs) -> Iterator[tuple[str, PlanInputs]]:
    settings, layers = inputs.settings, inputs.config.n_layers

    def with_setting(field: str, value: Any) -> tuple[str, PlanInputs]:
        change: dict[str, Any] = {field: value}
        return f"{spelled(field)} {value}", replace(inputs, settings=replace(settings, **change))

    if settings.mode in ("mixed", "stream"):
        if settings.gpu_cached_layers < layers:
            yield with_setting("gpu_cached_layers", settings.gpu_cached_layers + 1)
        least_depth = max(1, settings.aggressive_gpu_prefetch)
        if settings.group_prefetch_depth > least_depth:
            yield with_setting("group_prefetch_depth", least_depth)
    if settings.mode == "mixed" and make_plan(inputs).placement.residency.ssd:
        yield with_setting("cpu_cache_layers", settings.cpu_cache_layers + 1)
        if settings.prefetch_distance > 1:
            yield with_setting("prefetch_distance", settings.prefetch_distance - 1)
        yield with_setting("mode", "stream")
    if settings.mode != "full" and settings.embedding == "gpu" and not inputs.config.tied_embeddings:
        yield with_setting("embedding", "cpu")
    # Which rows would be added is not known: the longest are assumed.
    rows, shape = 2 * inputs.shape.batch, inputs.shape
    larger = replace(shape, batch=rows, prefill_tokens=2 * shape.prefill_tokens)
    yield f"{BATCH.flag} {rows}", replace(inputs, shape=larger)


# -- in words


def what_each_flag_buys(plan: Plan, ceilings: Mapping[str, Ceiling]) -> str:
    """The steps as a table for the terminal."""
    found = steps(plan, ceilings)
    if not found:
        return ""
    head = ["one step of a flag", "ms a pass", "ms a token", "SSD MB", "link MB", "GPU GiB", "CPU GiB", ""]
    lines = [head, *(_line(step) for step in found)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rows = [
        "  ".join([line[0].ljust(widths[0]), *_right(line[1:-1], widths[1:-1]), line[-1]]).rstrip() for line in lines
    ]
    return "\n".join([_title(found), *(f"  {row}" for row in rows)])


def _right(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]


def _title(found: Sequence[Step]) -> str:
    known = next((step.times for step in found if step.times is not None), None)
    if known is None:
        return f"what each flag would buy, {UNKNOWN_TIME}"
    kind = "takes at least" if known.at_least else "is predicted to take"
    return f"what each flag would buy: a decode pass {kind} {known.before_ms:.2f} ms now"


def _line(step: Step) -> list[str]:
    memory = [
        (getattr(step.after, f"{tier}_bytes") - getattr(step.before, f"{tier}_bytes")) / GIB for tier in ("gpu", "cpu")
    ]
    return [
        step.flag,
        "-" if step.times is None else f"{step.times.change_ms:+.2f}",
        _a_token(step),
        f"{step.more('ssd_read') / 1e6:+.1f}",
        f"{step.more('weight_h2d') / 1e6:+.1f}",
        *(f"{gib:+.3f}" for gib in memory),
        "" if step.after.fits else "does not fit",
    ]


def _a_token(step: Step) -> str:
    """Of all rows: a larger batch makes no pass shorter, but each of its tokens cheaper."""
    if step.times is None:
        return "-"
    after = step.times.after_ms / step.after.shape.batch
    return f"{after - step.times.before_ms / step.before.shape.batch:+.2f}"
