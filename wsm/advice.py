"""When a run does not fit: why, line by line, and the smallest change of flags that fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wsm.budget import GIB
from wsm.cost import cost_of
from wsm.errors import DoesNotFit
from wsm.plan import Plan, PlanInputs, make_plan
from wsm.probe import Ceiling
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
        raise DoesNotFit(_explained(f"the run does not fit: {_shortage(plan)}", plan, plan.inputs, ceilings or {}))


def ran_out(plan: Plan, cause: str, ceilings: Mapping[str, Ceiling]) -> DoesNotFit:
    """What to say when the device ran out although the plan fitted: the next smaller run, for 5 % less memory."""
    needed = 0.95 * plan.gpu_bytes / GIB
    inputs = replace(plan.inputs, settings=replace(plan.inputs.settings, gpu_mem_gb=needed))
    sentence = f"the GPU ran out of memory ({cause}), though {_gib(plan.gpu_bytes)} were planned"
    return DoesNotFit(_explained(sentence, plan, inputs, ceilings))


def _explained(sentence: str, plan: Plan, inputs: PlanInputs, ceilings: Mapping[str, Ceiling]) -> str:
    fitting = smallest_change(inputs)
    lines = [f"{sentence}; {_advice(inputs, fitting)}"]
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
        # No flag but the budget itself: what it takes away is KV, which then lies below.
        turned = changed_flags(inputs, fitting) or [f"--gpu-mem-gb {fitting.settings.gpu_mem_gb or 0:.4g}"]
        return f"it fits with {' '.join(turned)}"
    least = least_memory(inputs)
    needed = f"{_gib(least.cpu_bytes)} of CPU memory"
    if least.gpu_budget_bytes is not None:
        needed = f"{_gib(least.gpu_bytes)} of GPU memory and {needed}"
    flags = " ".join(changed_flags(inputs, least.inputs))
    return f"no setting of these flags fits: the least that would do is {needed}{f', with {flags}' if flags else ''}"


# -- the flags that free memory


@dataclass(frozen=True, slots=True)
class Lever:
    """A flag that takes less memory the smaller its value; ``least`` is the smallest that still changes anything."""

    flag: str
    value: Callable[[PlanInputs], int]
    least: Callable[[PlanInputs], int]
    change: Callable[[PlanInputs, int], PlanInputs]


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


def smallest_change(inputs: PlanInputs) -> PlanInputs | None:
    """The inputs that fit and give up least; None if nothing does.

    Another mode alone is tried first, where the mode's own rule (everything on the GPU; all the rest in CPU memory)
    may be what does not fit. Then flags, each as large as fits, and each only once those before it are used up: for the
    GPU fewer resident layers, a smaller look-ahead, a smaller batch; for the CPU fewer layers of CPU memory.
    """
    own = inputs.settings.mode
    others = [_with_mode(inputs, mode) for mode in _OTHER_MODES[own]]
    for candidate in (inputs, *others):
        if make_plan(candidate).fits:
            return candidate
    for candidate in (inputs, *others):
        found = _reduced(candidate)
        if found is not None:
            return found
    return None


def _with_mode(inputs: PlanInputs, mode: str) -> PlanInputs:
    return replace(inputs, settings=replace(inputs.settings, mode=mode))


def _reduced(inputs: PlanInputs) -> PlanInputs | None:
    """The flags turned down until all fits, then up again as far as they can be: the last one turned down first."""
    usable = _LEVERS_OF[inputs.settings.mode]
    for_gpu = [lever for lever in usable if lever is not CPU_LAYERS]
    for_cpu = [lever for lever in usable if lever is CPU_LAYERS]
    for_cpu += [BATCH] if inputs.hardware.has_gpu else for_gpu
    found = _turn_down(inputs, for_gpu, lambda plan: plan.gpu_bytes, lambda plan: plan.gpu_short_bytes == 0)
    found = _turn_down(found, for_cpu, lambda plan: plan.cpu_bytes, lambda plan: plan.cpu_short_bytes == 0)
    if not make_plan(found).fits:
        return None
    for lever in reversed((*for_gpu, *for_cpu)):
        found = _turn_up(found, lever, inputs)
    return found


def _turn_down(
    inputs: PlanInputs, levers: Sequence[Lever], size: Callable[[Plan], int], good: Callable[[Plan], bool]
) -> PlanInputs:
    """Each flag at the largest value that is good, or else at the one that takes least; then the next flag."""
    for lever in levers:
        best = make_plan(inputs)
        for value in range(lever.value(inputs) - 1, lever.least(inputs) - 1, -1):
            if good(best):
                break
            plan = make_plan(lever.change(inputs, value))
            best = plan if size(plan) < size(best) else best
        inputs = best.inputs
    return inputs


def _turn_up(inputs: PlanInputs, lever: Lever, original: PlanInputs) -> PlanInputs:
    """The flag at the largest value up to the original one that fits."""
    for value in range(lever.value(original), lever.value(inputs), -1):
        larger = lever.change(inputs, value)
        # The rows' lengths are known for the original batch alone, so every batch is cut from that one.
        larger = replace(larger, shape=original.shape.with_batch(larger.shape.batch))
        if make_plan(larger).fits:
            return larger
    return inputs


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
