"""A plan in words, for the verb ``plan``: what will be where, both budgets, and what each flag would buy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from wsm.plan.hardware import GIB
from wsm.plan.levers import Step, more_bytes, steps
from wsm.plan.plan import Plan
from wsm.plan.time import Ceiling, predicted_floor

UNKNOWN_TIME = "not known in time yet: the first run of this model measures this machine's rates, and plans use them"
_RESOURCE = {
    "ssd": "the SSD",
    "h2d": "the link",
    "d2h": "the link back",
    "hbm": "device memory",
    "compute": "arithmetic",
}


def describe(plan: Plan, ceilings: Mapping[str, Ceiling] | None = None) -> str:
    """The plan for people: tiers, pools, budgets, bytes per pass, the floor, and what a step of each flag would buy."""
    config, residency, placement = plan.inputs.config, plan.placement.residency, plan.placement
    layer = plan.inputs.slot_bytes()
    tiers = (("GPU", residency.gpu), ("CPU", residency.cpu), ("SSD", residency.ssd))
    moved = {"ssd_read": "from the SSD", "weight_h2d": "CPU to GPU", "hbm_read": "read from device memory"}
    if plan.kv.below:
        moved["kv_h2d"] = "of KV to the GPU"
    best = {name: ceiling.value for name, ceiling in (ceilings or {}).items()}
    return "\n".join(
        [
            f"{config.name}, mode {placement.mode}: {config.n_layers} layers of {layer / 1e6:.1f} MB",
            *(f"  {name}  {_layers_text(layers, layer)}" for name, layers in tiers),
            f"pools: {placement.gpu_slots} GPU slots and {placement.cpu_slots} CPU slots a kind, "
            f"{placement.read_ahead_layers} layers read ahead, {placement.staged_layers} staged before the first pass",
            f"prefill: {plan.waves} {'pass' if plan.waves == 1 else 'passes'} of up to {plan.wave_rows} "
            f"{'row' if plan.wave_rows == 1 else 'rows'}, in chunks of {plan.chunk_tokens} tokens",
            *(f"note: {note}" for note in plan.notes),
            budget_text(plan),
            "a pass moves " + ", ".join(f"{plan.bytes_per_pass[k] / 1e6:.1f} MB {text}" for k, text in moved.items()),
            *(
                f"{phase}: at least {floor.ms:.2f} ms a pass, bound by {_RESOURCE[floor.bound_by]} "
                f"({', '.join(f'{part} {ms:.2f} ms' for part, ms in floor.parts_ms.items())})"
                for phase, floor in predicted_floor(plan, best).items()
            ),
            what_each_flag_buys(plan, ceilings or {}),
        ]
    )


def _layers_text(layers: tuple[int, ...], layer_bytes: int) -> str:
    """How many, their size, and which: neighbours drawn together, ``0-2, 5``."""
    if not layers:
        return "0 layers"
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    ranges = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{len(layers)} layers, {len(layers) * layer_bytes / GIB:.3f} GiB: {ranges}"


def budget_text(plan: Plan) -> str:
    """Both budgets, line by line."""
    on_cpu = [(line.name, line.nbytes) for line in plan.cpu_lines]
    gpu_title = "GPU memory"
    if not plan.inputs.hardware.has_gpu:
        gpu_title, on_cpu = "GPU tier (ordinary memory here)", [("GPU tier, from above", plan.gpu_bytes), *on_cpu]
    on_gpu = [(line.name, line.nbytes) for line in plan.gpu_lines]
    return "\n".join(
        [*_budget(gpu_title, on_gpu, plan.gpu_budget_bytes), *_budget("CPU memory", on_cpu, plan.cpu_budget_bytes)]
    )


def _budget(title: str, lines: Sequence[tuple[str, int]], budget_bytes: int | None) -> list[str]:
    """A line each, in GiB (2^30) and MB (10^6), with their sum."""
    lines = [*lines, ("sum", sum(nbytes for _, nbytes in lines))]
    if budget_bytes is not None:
        lines.append(("budget", budget_bytes))
    width = max(len(title), *(len(name) for name, _ in lines))
    rows = [f"  {name:<{width}} {nbytes / GIB:10.3f} {nbytes / 1e6:12.1f}" for name, nbytes in lines]
    return [f"{title:<{width + 2}} {'GiB':>10} {'MB':>12}", *rows]


def what_each_flag_buys(plan: Plan, ceilings: Mapping[str, Ceiling]) -> str:
    """One step of each flag, as a table for the terminal."""
    found = steps(plan, ceilings)
    if not found:
        return ""
    known = next((step.times for step in found if step.times is not None), None)
    title = f"what each flag would buy, {UNKNOWN_TIME}"
    if known is not None:
        kind = "takes at least" if known.at_least else "is predicted to take"
        title = f"what each flag would buy: a decode pass {kind} {known.before_ms:.2f} ms now"
    head = ["one step of a flag", "ms a pass", "ms a token", "SSD MB", "link MB", "GPU GiB", "CPU GiB", ""]
    rows = [head, *map(_cells, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if at in (0, 7) else cell.rjust(width) for at, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in rows)
    ]
    return "\n".join([title, *(f"  {line.rstrip()}" for line in lines)])


def _cells(step: Step) -> list[str]:
    """Time is given per token, too: a larger batch makes no pass shorter, but each of its tokens cheaper."""
    more, pass_ms, token_ms = more_bytes(step.before, step.after), "-", "-"
    if step.times is not None:
        pass_ms = f"{step.times.change_ms:+.2f}"
        before, after = step.times.before_ms / step.before.shape.batch, step.times.after_ms / step.after.shape.batch
        token_ms = f"{after - before:+.2f}"
    moved = [f"{more[way] / 1e6:+.1f}" for way in ("ssd_read", "weight_h2d")]
    held = [f"{more[tier] / GIB:+.3f}" for tier in ("gpu", "cpu")]
    return [step.flag, pass_ms, token_ms, *moved, *held, "" if step.after.fits else "does not fit"]
