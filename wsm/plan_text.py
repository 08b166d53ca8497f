"""A plan in words, for the verb ``plan``."""

from __future__ import annotations

from wsm.budget import GIB
from wsm.plan import Plan


def describe(plan: Plan) -> str:
    """Tiers, pools, both budgets and what a pass moves."""
    inputs, placement = plan.inputs, plan.placement
    layer = inputs.slot_bytes()
    lines = [
        f"{inputs.config.name}, {inputs.dtype}, mode {placement.mode}, "
        f"{inputs.config.n_layers} layers of {layer / 1e6:.1f} MB",
        "",
    ]
    for tier, layers in (
        ("GPU", placement.residency.gpu),
        ("CPU", placement.residency.cpu),
        ("SSD", placement.residency.ssd),
    ):
        where = " ".join(map(str, layers)) if layers else "-"
        lines.append(f"{tier}: {len(layers):3d} layers, {len(layers) * layer / GIB:8.3f} GiB: {where}")
    lines += [
        f"pools: {placement.gpu_slots} GPU slots a kind, {placement.cpu_slots} CPU slots a kind, "
        f"{placement.read_ahead_layers} layers read ahead, {placement.staged_layers} staged before the first pass",
        f"prefill: chunks of {plan.chunk_tokens} tokens, waves of {plan.wave_rows} rows",
        "",
        plan.budget_text(),
        "",
        "a decode pass moves:",
        *(f"  {name:<12}{nbytes / 1e6:14.1f} MB" for name, nbytes in plan.bytes_per_pass.items()),
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])
