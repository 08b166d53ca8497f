"""When a run does not fit: why, line by line, the smallest change of flags that fits, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from wsm.errors import DoesNotFit
from wsm.plan.hardware import GIB
from wsm.plan.inputs import PlanInputs
from wsm.plan.levers import changed_flags, least_memory, more_bytes, smallest_change
from wsm.plan.plan import Plan, make_plan
from wsm.plan.text import UNKNOWN_TIME, budget_text
from wsm.plan.time import Ceiling, pass_times


def check_fits(plan: Plan, ceilings: Mapping[str, Ceiling] | None = None) -> None:
    """Nothing, if the plan fits.

    Args:
        ceilings: this machine's rates, as far as they are known: the cost of the change is predicted from them.

    Raises:
        DoesNotFit: with a line that says what is short and the smallest change of flags that fits, one with what the
            change costs, then both budgets.
    """
    if not plan.fits:
        tiers = (("GPU", plan.gpu_bytes, plan.gpu_budget_bytes), ("CPU", plan.cpu_bytes, plan.cpu_budget_bytes))
        short = [
            f"it takes {_gib(needed)} of {tier} memory and the budget is {_gib(budget)}"
            for tier, needed, budget in tiers
            if budget is not None and needed > budget
        ]
        sentence = f"the run does not fit: {', and '.join(short)}"
        raise DoesNotFit(_explained(sentence, plan, smallest_change(plan.inputs), ceilings or {}))


def ran_out(plan: Plan, cause: str, ceilings: Mapping[str, Ceiling]) -> DoesNotFit:
    """What to say when the device ran out although the plan fitted: the next smaller run, for 5 % less memory.

    The same budget with less in it, so that what was not planned for finds room; where KV fills whatever the budget
    leaves, a smaller budget, since nothing else frees any.
    """
    target = int(0.95 * plan.gpu_bytes)
    sentence = f"the GPU ran out of memory ({cause}), though {_gib(plan.gpu_bytes)} were planned"
    fitting = None if plan.kv.below else smallest_change(plan.inputs, most_gpu_bytes=target)
    if fitting is None:
        # Rounded down to two digits that count: what is typed is to be what was planned with.
        scale = 10.0 ** (1 - math.floor(math.log10(target / GIB)))
        budget = math.floor(target / GIB * scale) / scale
        less = replace(plan.inputs, settings=replace(plan.inputs.settings, gpu_mem_gb=budget))
        fitting = smallest_change(less)
    return DoesNotFit(_explained(sentence, plan, fitting, ceilings))


def _explained(sentence: str, plan: Plan, fitting: PlanInputs | None, ceilings: Mapping[str, Ceiling]) -> str:
    lines = [f"{sentence}; {_advice(plan.inputs, fitting)}"]
    if fitting is not None:
        lines.append(cost_of(plan, make_plan(fitting), ceilings))
    return "\n".join([*lines, budget_text(plan)])


def _gib(nbytes: int) -> str:
    """Rounded up: what is printed is to suffice."""
    digits = 2 if nbytes >= GIB else 4
    return f"{math.ceil(10**digits * nbytes / GIB) / 10**digits:.{digits}f} GiB"


def _advice(inputs: PlanInputs, fitting: PlanInputs | None) -> str:
    """The smallest change that fits, as flags to type; or the least memory that would do."""
    if fitting is not None:
        budget = fitting.settings.gpu_mem_gb
        smaller = [] if budget == inputs.settings.gpu_mem_gb else [f"--gpu-mem-gb {budget:g}"]
        return f"it fits with {' '.join([*smaller, *changed_flags(inputs, fitting)])}"
    least = least_memory(inputs)
    needed = f"{_gib(least.cpu_bytes)} of CPU memory"
    if least.gpu_budget_bytes is not None:
        needed = f"{_gib(least.gpu_bytes)} of GPU memory and {needed}"
    flags = " ".join(changed_flags(inputs, least.inputs))
    return f"no setting of these flags fits: the least that would do is {needed}{f', with {flags}' if flags else ''}"


def cost_of(before: Plan, after: Plan, ceilings: Mapping[str, Ceiling]) -> str:
    """What following an advice costs, in a sentence; ``before`` is what was asked for, as if it fitted."""
    more = more_bytes(before, after)
    ways = {"ssd_read": "from the SSD", "weight_h2d": "over the link"}
    parts = [f"{more[way] / 1e6:+.1f} MB {where}" for way, where in ways.items() if more[way]]
    moved = f"a pass moves {' and '.join(parts) or 'the same bytes'}"
    times = pass_times(before, after, ceilings)
    if times is None:
        return f"its cost is {UNKNOWN_TIME}; {moved}"
    bound = "at least " if times.at_least else ""
    text = f"its predicted cost: a decode pass of {bound}{times.after_ms:.2f} ms instead of {times.before_ms:.2f} ms"
    if times.before_ms:
        text += f" ({100 * times.change_ms / times.before_ms:+.1f} %)"
    rows = before.shape.batch, after.shape.batch
    if rows[0] != rows[1]:
        each = times.before_ms / rows[0], times.after_ms / rows[1]
        text += f", for {rows[1]} rows instead of {rows[0]}: {each[1]:.2f} ms a token instead of {each[0]:.2f} ms"
    return f"{text}; {moved}"
