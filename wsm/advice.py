"""When a run does not fit: why, line by line, and the smallest change of flags that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from wsm.budget import GIB
from wsm.errors import DoesNotFit
from wsm.plan import Plan, PlanInputs, RunShape, make_plan

_FLAGS = {
    "mode": "--mode",
    "gpu_cached_layers": "--gpu-cached-layers",
    "group_prefetch_depth": "--group-prefetch-depth",
    "cpu_cache_layers": "--cpu-cache-layers",
    "prefetch_distance": "--prefetch-distance",
}


def check_fits(plan: Plan) -> None:
    """Raises DoesNotFit with both budgets and the smallest change of flags that fits, unless the plan does."""
    if plan.fits:
        return
    if plan.gpu_short_bytes:
        budget = (plan.gpu_budget_bytes or 0) / GIB
        short = f"{plan.gpu_bytes / GIB:.2f} GiB of GPU memory are needed, the budget is {budget:.2f} GiB"
    else:
        budget = plan.cpu_budget_bytes / GIB
        short = f"{plan.cpu_bytes / GIB:.2f} GiB of CPU memory are needed, the budget is {budget:.2f} GiB"
    fitting = smallest_change(plan.inputs)
    if fitting is None:
        advice = (
            "no change of mode, layers, slots or batch makes it fit: use a smaller model, shorter rows, or more memory"
        )
    else:
        advice = f"it fits with {' '.join(changed_flags(plan.inputs, fitting))}"
    raise DoesNotFit(f"does not fit: {short}; {advice}\n{plan.budget_text()}")


def changed_flags(before: PlanInputs, after: PlanInputs) -> list[str]:
    """The flags that lead from one set of inputs to the other."""
    flags = [
        f"{flag} {getattr(after.settings, name)}"
        for name, flag in _FLAGS.items()
        if getattr(before.settings, name) != getattr(after.settings, name)
    ]
    if before.shape.batch != after.shape.batch:
        flags.append(f"--batch-size {after.shape.batch}")
    return flags


def smallest_change(inputs: PlanInputs) -> PlanInputs | None:
    """The inputs that fit and give up least, in this order: for the GPU fewer resident layers, a smaller look-ahead, a
    smaller batch; for the CPU fewer layers of CPU memory, a smaller read-ahead. A mode is changed only where its own
    rule (everything on the GPU; all the rest in CPU memory) is what does not fit.
    """
    for mode in _modes_from(inputs.settings.mode):
        candidate = replace(inputs, settings=replace(inputs.settings, mode=mode))
        for cpu_step in _cpu_steps(candidate):
            if candidate.hardware.gpu_total_bytes is not None and make_plan(cpu_step).cpu_short_bytes:
                continue  # no change for the GPU frees page-locked memory
            found = _first(_gpu_steps(cpu_step), lambda plan: plan.fits)
            if found is not None:
                return found
    return None


def _modes_from(mode: str) -> tuple[str, ...]:
    return {"full": ("full", "stream", "mixed"), "preload": ("preload", "stream", "mixed")}.get(
        mode, ("stream", "mixed") if mode == "stream" else ("mixed",)
    )


def _first(candidates: Iterable[PlanInputs], good: Callable[[Plan], bool]) -> PlanInputs | None:
    return next((candidate for candidate in candidates if good(make_plan(candidate))), None)


def _gpu_steps(inputs: PlanInputs) -> Iterable[PlanInputs]:
    """From the flags as they are to the least GPU memory, each flag only once the one before it is used up."""
    yield inputs
    settings = inputs.settings
    if settings.mode in ("stream", "mixed"):
        for layers in range(min(settings.gpu_cached_layers, inputs.config.n_layers) - 1, -1, -1):
            yield replace(inputs, settings=replace(settings, gpu_cached_layers=layers))
        settings = replace(settings, gpu_cached_layers=0)
        for depth in range(settings.group_prefetch_depth - 1, settings.aggressive_gpu_prefetch - 1, -1):
            yield replace(inputs, settings=replace(settings, group_prefetch_depth=max(1, depth)))
        least = max(1, min(settings.group_prefetch_depth, settings.aggressive_gpu_prefetch))
        settings = replace(settings, group_prefetch_depth=least)
    for batch in range(inputs.shape.batch - 1, 0, -1):
        yield replace(inputs, settings=settings, shape=_smaller(inputs.shape, batch))


def _smaller(shape: RunShape, batch: int) -> RunShape:
    return RunShape(
        batch, shape.prompt_tokens, shape.new_tokens, min(shape.prefill_tokens, batch * shape.prompt_tokens)
    )


def _cpu_steps(inputs: PlanInputs) -> Iterable[PlanInputs]:
    yield inputs
    settings = inputs.settings
    if settings.mode != "mixed":
        return
    most = min(settings.cpu_cache_layers, inputs.config.n_layers)
    for layers in range(most - 1, 0, -1):
        yield replace(inputs, settings=replace(settings, cpu_cache_layers=layers))
