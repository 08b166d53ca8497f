"""A plan in words, for the verb ``plan``."""

from __future__ import annotations

from collections.abc import Mapping

from wsm.plan.ceilings import Ceiling
from wsm.plan.floor import predicted_floor
from wsm.plan.memory import GIB
from wsm.plan.plan import Plan
from wsm.plan.what_if import what_each_flag_buys

_RESOURCE = {
    "ssd": "the SSD",
    "h2d": "the link",
    "d2h": "the link back",
    "hbm": "device memory",
    "compute": "arithmetic",
}


def describe(plan: Plan, ceilings: Mapping[str, Ceiling] | None = None) -> str:
    """The plan for people: tiers, pools, budgets, bytes a pass, the floor, and what one step of each flag would buy."""
    config, residency, placement = plan.inputs.config, plan.placement.residency, plan.placement
    layer = plan.inputs.slot_bytes()
    tiers = (("GPU", residency.gpu), ("CPU", residency.cpu), ("SSD", residency.ssd))
    sections = [
        f"{config.name}, mode {placement.mode}: {config.n_layers} layers of {layer / 1e6:.1f} MB",
        "\n".join(f"  {name}  {_layers_text(layers, layer)}" for name, layers in tiers),
        f"pools: {placement.gpu_slots} GPU slots and {placement.cpu_slots} CPU slots a kind, "
        f"{placement.read_ahead_layers} layers read ahead, {placement.staged_layers} staged before the first pass",
        f"prefill: {plan.waves} {_plural(plan.waves, 'pass', 'passes')} of up to {plan.wave_rows} "
        f"{_plural(plan.wave_rows, 'row', 'rows')}, in chunks of {plan.chunk_tokens} tokens",
        *(f"note: {note}" for note in plan.notes),
        plan.budget_text(),
        _moved_text(plan),
    ]
    best = {name: ceiling.value for name, ceiling in (ceilings or {}).items()}
    sections += [
        f"{phase}: at least {floor.ms:.2f} ms a pass, bound by {_RESOURCE[floor.bound_by]} "
        f"({', '.join(f'{part} {ms:.2f} ms' for part, ms in floor.parts_ms.items())})"
        for phase, floor in predicted_floor(plan, best).items()
    ]
    sections.append(what_each_flag_buys(plan, ceilings or {}))
    return "\n".join(sections)


def _layers_text(layers: tuple[int, ...], layer_bytes: int) -> str:
    if not layers:
        return "0 layers"
    return f"{len(layers)} layers, {len(layers) * layer_bytes / GIB:.3f} GiB: {_ranges(layers)}"


def _ranges(layers: tuple[int, ...]) -> str:
    """Ascending numbers, neighbours drawn together: ``0-2, 5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _moved_text(plan: Plan) -> str:
    names = {"ssd_read": "from the SSD", "weight_h2d": "CPU to GPU", "hbm_read": "read from device memory"}
    if plan.kv.below:
        names["kv_h2d"] = "of KV to the GPU"
    return "a pass moves " + ", ".join(f"{plan.bytes_per_pass[k] / 1e6:.1f} MB {text}" for k, text in names.items())


def _plural(count: int, one: str, many: str) -> str:
    return one if count == 1 else many
