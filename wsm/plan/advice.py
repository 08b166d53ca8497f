"""When a run does not fit: why, line by line, and the smallest change of flags that fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wsm.errors import DoesNotFit
from wsm.plan.ceilings import Ceiling
from wsm.plan.cost import cost_of
from wsm.plan.memory import GIB
from wsm.plan.plan import Plan, PlanInputs, make_plan
from wsm.settings import spelled


def check_fits(plan: Plan, ceilings: Mapping[str, Ceiling] | None = None) -> None:
    """Nothing, if the plan fits.

    Args:
        ceilings: this machine's rates, as far as they are known: the cost of the change is predicted from them.

    Raises:
        DoesNotFit: with a line that says what is short and the smallest change of flags that fits, one with what the
            change costs, then both budgets.
    """
    if not plan.fits:
        sentence = f"the run does not fit: {_shortage(plan)}"
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
        less = replace(plan.inputs, settings=replace(plan.inputs.settings, gpu_mem_gb=_two_digits(target)))
        fitting = smallest_change(less)
    return DoesNotFit(_explained(sentence, plan, fitting, ceilings))


def _two_digits(nbytes: int) -> float:
    """In GiB, rounded down to two digits that count: what is typed is to be what was planned with."""
    gib = nbytes / GIB
    scale = 10.0 ** (1 - math.floor(math.log10(gib)))
    return math.floor(gib * scale) / scale


def _explained(sentence: str, plan: Plan, fitting: PlanInputs | None, ceilings: Mapping[str, Ceiling]) -> str:
    lines = [f"{sentence}; {_advice(plan.inputs, fitting)}"]
    if fitting is not None:
        lines.append(cost_of(plan, make_plan(fitting), ceilings))
    return "\n".join([*lines, plan.budget_text()])


def _shortage(plan: Plan) -> str:
    short = []
    if plan.gpu_short_bytes and plan.gpu_budget_bytes is not None:
        short.append(_of("GPU", plan.gpu_bytes, plan.gpu_budget_bytes))
    if plan.cpu_short_bytes:
        short.append(_of("CPU", plan.cpu_bytes, plan.cpu_budget_bytes))
    return ", and ".join(short)


def _gib(nbytes: int) -> str:
    """Rounded up: what is printed is to suffice."""
    digits = 2 if nbytes >= GIB else 4
    return f"{math.ceil(10**digits * nbytes / GIB) / 10**digits:.{digits}f} GiB"


def _of(tier: str, needed: int, budget: int) -> str:
    return f"it takes {_gib(needed)} of {tier} memory and the budget is {_gib(budget)}"


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


# -- the flags that free memory


@dataclass(frozen=True, slots=True)
class Lever:
    """A flag that takes less memory the smaller its value; ``least`` is the smallest that still changes anything.

    ``many`` values are searched by halves, which finds one that fits where the next larger one does not.
    """

    flag: str
    value: Callable[[PlanInputs], int]
    least: Callable[[PlanInputs], int]
    change: Callable[[PlanInputs, int], PlanInputs]
    many: bool = False


def _setting(field: str, *, at_most: Callable[[PlanInputs], int], least: Callable[[PlanInputs], int]) -> Lever:
    def change(inputs: PlanInputs, value: int) -> PlanInputs:
        changes: dict[str, Any] = {field: value}
        return replace(inputs, settings=replace(inputs.settings, **changes))

    return Lever(spelled(field), lambda inputs: min(getattr(inputs.settings, field), at_most(inputs)), least, change)


def _layers(inputs: PlanInputs) -> int:
    return inputs.config.n_layers


RESIDENTS = _setting("gpu_cached_layers", at_most=_layers, least=lambda inputs: 0)
# WSM_AGGRESSIVE_GPU_PREFETCH is a floor under the depth, so a smaller depth would free nothing; nor would one that
# WSM_GPU_MAX_GROUPS caps anyway.
DEPTH = _setting(
    "group_prefetch_depth",
    at_most=lambda inputs: max(1, inputs.settings.gpu_max_groups, inputs.settings.aggressive_gpu_prefetch),
    least=lambda inputs: max(1, inputs.settings.aggressive_gpu_prefetch),
)
BATCH = Lever(
    "--batch-size",
    lambda inputs: inputs.shape.batch,
    lambda inputs: 1,
    lambda inputs, value: replace(inputs, shape=inputs.shape.with_batch(value)),
    many=True,
)
# The pools are part of --cpu-cache-layers, so a smaller --prefetch-distance only turns slots into residents: it frees
# nothing, and is never advised.
CPU_LAYERS = _setting("cpu_cache_layers", at_most=_layers, least=lambda inputs: 1)
GPU_LEVERS = (RESIDENTS, DEPTH, BATCH)

_OTHER_MODES = {"full": ("stream", "mixed"), "preload": ("stream", "mixed"), "stream": ("mixed",), "mixed": ()}
_LEVERS_OF = {"full": (BATCH,), "preload": (BATCH,), "stream": GPU_LEVERS, "mixed": (*GPU_LEVERS, CPU_LAYERS)}


def changed_flags(before: PlanInputs, after: PlanInputs) -> list[str]:
    """The flags that lead from one set of inputs to the other, as they are typed."""
    flags = [] if before.settings.mode == after.settings.mode else [f"--mode {after.settings.mode}"]
    levers = (*GPU_LEVERS, CPU_LAYERS)
    return flags + [
        f"{lever.flag} {lever.value(after)}" for lever in levers if lever.value(before) != lever.value(after)
    ]


# -- the search


Good = Callable[[Plan], bool]


def smallest_change(inputs: PlanInputs, most_gpu_bytes: int | None = None) -> PlanInputs | None:
    """The inputs that fit and give up least; None if nothing does.

    Another mode alone is tried first, where the mode's own rule (everything on the GPU; all the rest in CPU memory)
    may be what does not fit. Then flags, each as large as fits, and each only once those before it are used up: for the
    GPU fewer resident layers, a smaller look-ahead, a smaller batch; for the CPU fewer layers of CPU memory.

    Args:
        most_gpu_bytes: what is to be planned at most, besides fitting the budget.
    """

    def on_gpu(plan: Plan) -> bool:
        return plan.gpu_short_bytes == 0 and (most_gpu_bytes is None or plan.gpu_bytes <= most_gpu_bytes)

    own = inputs.settings.mode
    others = [_with_mode(inputs, mode) for mode in _OTHER_MODES[own]]
    for candidate in (inputs, *others):
        plan = make_plan(candidate)
        if plan.fits and on_gpu(plan):
            return candidate
    for candidate in (inputs, *others):
        found = _reduced(candidate, on_gpu)
        if found is not None:
            return found
    return None


def _with_mode(inputs: PlanInputs, mode: str) -> PlanInputs:
    return replace(inputs, settings=replace(inputs.settings, mode=mode))


def _reduced(inputs: PlanInputs, on_gpu: Good) -> PlanInputs | None:
    """The flags turned down until all fits, then up again as far as they can be: the last one turned down first."""
    usable = _LEVERS_OF[inputs.settings.mode]
    for_gpu = [lever for lever in usable if lever is not CPU_LAYERS]
    for_cpu = [lever for lever in usable if lever is CPU_LAYERS]
    for_cpu += [BATCH] if inputs.hardware.has_gpu else for_gpu
    found = _turn_down(inputs, for_gpu, lambda plan: plan.gpu_bytes, on_gpu)
    found = _turn_down(found, for_cpu, lambda plan: plan.cpu_bytes, lambda plan: plan.cpu_short_bytes == 0)

    def good(plan: Plan) -> bool:
        return plan.fits and on_gpu(plan)

    if not good(make_plan(found)):
        return None
    for lever in reversed((*for_gpu, *for_cpu)):
        found = _turn_up(found, lever, inputs, good)
    return found


def _turn_down(inputs: PlanInputs, levers: Sequence[Lever], size: Callable[[Plan], int], good: Good) -> PlanInputs:
    """Each flag at the largest value that is good, or else at the one that takes least; then the next flag."""
    for lever in levers:
        asked, least = lever.value(inputs), lever.least(inputs)

        def at(value: int, lever: Lever = lever, inputs: PlanInputs = inputs) -> Plan:
            return make_plan(lever.change(inputs, value))

        best = make_plan(inputs)
        if good(best) or asked <= least:
            continue
        if lever.many:
            value = _largest_by_halves(least, asked, lambda value: good(at(value)))
            found = [at(least if value is None else value)]
        else:
            found = _down_to_good(map(at, range(asked - 1, least - 1, -1)), good)
        inputs = (found[-1] if good(found[-1]) else min((best, *found), key=size)).inputs
    return inputs


def _down_to_good(plans: Iterable[Plan], good: Good) -> list[Plan]:
    """The plans up to the first that is good."""
    seen = []
    for plan in plans:
        seen.append(plan)
        if good(plan):
            break
    return seen


def _turn_up(inputs: PlanInputs, lever: Lever, original: PlanInputs, good: Good) -> PlanInputs:
    """The flag at the largest value up to the original one that is good."""
    now, asked = lever.value(inputs), lever.value(original)

    def at(value: int) -> PlanInputs:
        larger = lever.change(inputs, value)
        # The rows' lengths are known for the original batch alone, so every batch is cut from that one.
        return replace(larger, shape=original.shape.with_batch(larger.shape.batch))

    def is_good(value: int) -> bool:
        return value == now or good(make_plan(at(value)))

    if not lever.many:
        value = next(filter(is_good, range(asked, now, -1)), now)
    elif (found := _largest_by_halves(now, asked, is_good)) is not None:
        value = found
    else:
        value = now
    return inputs if value == now else at(value)


def _largest_by_halves(least: int, most: int, good: Callable[[int], bool]) -> int | None:
    """A good value whose successor is not good or is beyond ``most``; None if ``least`` is not good."""
    if least <= most and good(most):
        return most
    if least > most or not good(least):
        return None
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if good(middle) else (least, middle)
    return least


def least_memory(inputs: PlanInputs) -> Plan:
    """The plan with every flag turned down, for budgets of just what it takes."""
    inputs = _with_mode(inputs, "mixed")
    for lever in (*GPU_LEVERS, CPU_LAYERS):
        inputs = lever.change(inputs, min(lever.value(inputs), lever.least(inputs)))
    plan = make_plan(inputs)
    while not plan.fits:  # a larger budget may make larger chunks: until both agree
        plan = make_plan(_with_memory(plan))
    return plan


def _with_memory(plan: Plan) -> PlanInputs:
    """The same run on a machine, and with budgets, of what the plan takes."""
    hardware, has_budget = plan.inputs.hardware, plan.gpu_budget_bytes is not None
    gpu = max(plan.gpu_bytes, plan.gpu_budget_bytes or 0)
    return replace(
        plan.inputs,
        settings=replace(
            plan.inputs.settings,
            gpu_mem_gb=gpu / GIB if has_budget else None,
            cpu_mem_gb=None,
        ),
        hardware=replace(
            hardware,
            gpu_available_bytes=gpu if hardware.has_gpu else None,
            cpu_available_bytes=max(plan.cpu_bytes, plan.cpu_budget_bytes),
        ),
    )
