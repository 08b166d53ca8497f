"""``--auto``: the residency and pools that make a pass shortest within the budgets.

A pass is bound by the SSD or by the link, and both carry fewer bytes the more layers are resident, on the GPU above
all. Two slots a kind keep the link busy (docs/LOG.md), so the pools are kept that small and residents take the rest.
"""

from __future__ import annotations

from dataclasses import replace

from wsm.plan.plan import Plan, PlanInputs, make_plan
from wsm.settings import Settings

LOOK_AHEAD_GROUPS = 2
READ_AHEAD_LAYERS = 2


def choose_settings(inputs: PlanInputs) -> PlanInputs:
    """The inputs with layers and pools chosen; where nothing fits, the smallest of them, for the advice to explain.

    The mode stays as it is: ``full`` and ``preload`` have nothing to choose. The embedding moves to CPU memory where
    that lets a pass move fewer bytes: first from the SSD, then over the link.
    """
    settings = inputs.settings
    if settings.mode not in ("mixed", "stream"):
        return inputs
    candidates = [_layers_for(inputs, settings)]
    if settings.embedding == "gpu" and not inputs.config.tied_embeddings:
        candidates.append(_layers_for(inputs, replace(settings, embedding="cpu")))
    return min(candidates, key=_bytes_moved)


def _bytes_moved(inputs: PlanInputs) -> tuple[bool, int, int]:
    plan = make_plan(inputs)
    return not plan.fits, plan.bytes_per_pass["ssd_read"], plan.bytes_per_pass["weight_h2d"]


def _layers_for(inputs: PlanInputs, settings: Settings) -> PlanInputs:
    """As many layers on the GPU as fit, then as many in CPU memory."""
    layers = inputs.config.n_layers
    small = replace(settings, group_prefetch_depth=LOOK_AHEAD_GROUPS, prefetch_distance=READ_AHEAD_LAYERS)
    # The globals are loaded through CPU layers where these are as large, and else through a buffer of their own.
    as_large = min(layers, -(-inputs.layouts[None].nbytes // inputs.slot_bytes()))
    plans = [
        make_plan(replace(inputs, settings=replace(small, gpu_cached_layers=on_gpu, cpu_cache_layers=in_cpu)))
        for on_gpu in range(layers, -1, -1)
        for in_cpu in dict.fromkeys((1, as_large))
    ]
    # So do residents of the GPU: where all layers lie there, fewer may fit where all do not.
    fitting = [plan for plan in plans if plan.fits]
    nearly = [plan for plan in plans if plan.gpu_short_bytes == 0 and inputs.hardware.has_gpu]
    best = (*fitting, *nearly, plans[-1])[0].inputs
    if settings.mode == "stream":
        return best
    for in_cpu in range(max(1, layers - best.settings.gpu_cached_layers), 0, -1):
        candidate = replace(best, settings=replace(best.settings, cpu_cache_layers=in_cpu))
        if make_plan(candidate).fits:
            return candidate
    return best


def auto_flags(plan: Plan) -> list[str]:
    """The choice as flags to keep."""
    settings = plan.inputs.settings
    if settings.mode not in ("mixed", "stream"):
        return []
    flags = [
        f"--gpu-cached-layers {settings.gpu_cached_layers}",
        f"--group-prefetch-depth {settings.group_prefetch_depth}",
    ]
    if settings.mode == "mixed":
        flags += [
            f"--cpu-cache-layers {settings.cpu_cache_layers}",
            f"--prefetch-distance {settings.prefetch_distance}",
        ]
    if settings.embedding != "gpu":
        flags.append(f"--embedding {settings.embedding}")
    return flags
