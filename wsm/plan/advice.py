"""A plan in words: what will be where, what each flag would buy, and where it does not fit, why and what would."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from wsm.errors import DoesNotFit
from wsm.plan.hardware import GIB
from wsm.plan.inputs import PlanInputs
from wsm.plan.levers import Step, as_asked, changed_flags, choose_settings, more_bytes, steps
from wsm.plan.missing import time_told_by
from wsm.plan.plan import Plan, make_plan
from wsm.plan.search import least_memory, most_layers, smallest_change
from wsm.plan.time import Ceiling, Estimate, floor_estimate, pass_times, predicted_floor, predicted_pass_ms

_MUCH = 3
"""So many layers more in a tier that has room for them, and a plan says so."""
_RESOURCE = {"ssd": "the SSD", "h2d": "the link", "hbm": "device memory", "compute": "arithmetic"}
_RESOURCE |= {
    "weight_decode": "decoding weights",
    "kv_read": "reads of --kv-device",
    "kv_write": "writes to --kv-device",
}


def describe(plan: Plan, ceilings: Mapping[str, Ceiling] | None = None, *, drafted: bool = False) -> str:
    """The plan for people: tiers, pools, budgets, bytes per pass, the floor, and what a step of each flag would buy.

    ``drafted``: what the draft makes of it is told beside this.
    """
    config, residency, placement = plan.inputs.config, plan.placement.residency, plan.placement
    layer = plan.inputs.slot_bytes()
    tiers = (("GPU", residency.gpu), ("CPU", residency.cpu), ("SSD", residency.ssd))
    moved = {"ssd_read": "from the SSD", "weight_h2d": "CPU to GPU", "hbm_read": "read from device memory"}
    if plan.kv.below:
        moved["kv_h2d"] = "of KV to the GPU"
    if plan.kv.disk:
        moved["kv_read"] = "of KV from --kv-device"
    best = {name: ceiling.value for name, ceiling in (ceilings or {}).items()}
    floors = {phase: floor for phase, floor in floor_estimate(plan, ceilings or {}).items() if floor is not None}
    return "\n".join(
        [
            f"{config.name}, mode {placement.mode}: {config.n_layers} layers of {layer / 1e6:.1f} MB",
            *(f"  {name}  {_layers_text(layers, layer)}" for name, layers in tiers),
            f"pools: {placement.gpu_slots} GPU slots and {placement.cpu_slots} CPU slots a kind, "
            f"{placement.read_ahead_layers} layers read ahead, {placement.staged_layers} staged before the first pass",
            f"prefill: {plan.waves} {'pass' if plan.waves == 1 else 'passes'} of up to {plan.wave_rows} "
            f"{'row' if plan.wave_rows == 1 else 'rows'}, in chunks of {plan.chunk_tokens} tokens",
            *(f"note: {note}" for note in (*plan.notes, *nothing_on_ssd(plan))),
            budget_text(plan),
            "a pass moves " + ", ".join(f"{plan.bytes_per_pass[k] / 1e6:.1f} MB {text}" for k, text in moved.items()),
            *(
                f"{phase}: at least {floors[phase].shown()} a pass, bound by {_RESOURCE[floor.bound_by]} "
                f"({', '.join(f'{part} {ms:.2f} ms' for part, ms in floor.parts_ms.items())})"
                for phase, floor in predicted_floor(plan, best).items()
            ),
            *_predicted(plan, ceilings or {}, drafted),
            what_each_flag_buys(plan, ceilings or {}),
        ]
    )


def _predicted(plan: Plan, ceilings: Mapping[str, Ceiling], drafted: bool) -> list[str]:
    """A decode pass as it is predicted, and tokens a second of all rows."""
    estimate = predicted_pass_ms(plan, ceilings)["decode"]
    if estimate is None:
        return []
    rate = estimate.rate_shown(plan.shape.batch)
    text = f"decode: predicted {estimate.shown()} a pass, {rate} tokens a second{_of_rates(estimate)}"
    if plan.inputs.draft is not None:
        counted = "what is assumed of it is counted below" if drafted else "plan --acceptance X counts it"
        text += f", as if nothing of the draft were accepted ({counted})"
    return [text]


def nothing_on_ssd(plan: Plan) -> list[str]:
    """A sentence where ``mixed`` has no layer to read from the SSD: its figures would pass for a drive's."""
    if plan.same_as is None:
        return []
    residency, settings = plan.placement.residency, plan.inputs.settings
    if residency.streamed_layers >= 2:
        most = f"at most {residency.streamed_layers - 1} --cpu-cache-layers (now {settings.cpu_cache_layers})"
    else:  # one layer stays in CPU memory, and one is left for the SSD
        gpu = f"at most {residency.n_layers - 2} --gpu-cached-layers (now {settings.gpu_cached_layers})"
        most = f"{gpu} and fewer --cpu-cache-layers than are then left (now {settings.cpu_cache_layers})"
    mend = f"to stream from it, give {most}" if residency.n_layers >= 2 else "one layer is too few to stream from it"
    return [
        f"no layer is left for the SSD: all {residency.n_layers} are on the GPU or in CPU memory, so this run equals "
        f"--mode {plan.same_as}, and no figure is the drive's; {mend}"
    ]


def nothing_streams(plan: Plan) -> list[str]:
    """A sentence where ``stream`` has no layer below the GPU: its figures would pass for the link's."""
    if plan.placement.mode != "stream" or "CPU" in plan.way:
        return []
    return [
        f"no layer is left to stream: all {plan.placement.residency.n_layers} are on the GPU, so this run equals "
        "--mode preload, and no weights cross the link in a pass; to stream, give fewer --gpu-cached-layers"
    ]


def unused_memory(plan: Plan) -> str:
    """A sentence where much memory is left that layers from below could have; empty where there is none."""
    residency, layer = plan.placement.residency, plan.inputs.slot_bytes()
    tiers = (
        ("GPU", plan.gpu_budget_bytes, plan.gpu_bytes, len(residency.cpu) + len(residency.ssd)),
        ("CPU", plan.cpu_budget_bytes, plan.cpu_bytes, len(residency.ssd)),
    )
    left = [
        f"{(budget - taken) / GIB:.2f} GiB of {tier} memory"
        for tier, budget, taken, below in tiers
        if budget is not None and below and budget - taken >= _MUCH * layer
    ]
    if not left:
        return ""
    return f"{' and '.join(left)} stay unused: --auto chooses layers and pools for the memory that there is"


def _layers_text(layers: tuple[int, ...], layer_bytes: int) -> str:
    """How many, their size, and which: neighbours drawn together, ``0-2, 5``."""
    if not layers:
        return "0 layers"
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    ranges = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{len(layers)} layers, {len(layers) * layer_bytes / GIB:.3f} GiB: {ranges}"


def budget_text(plan: Plan) -> str:
    """Both budgets, line by line."""
    on_gpu, on_cpu = ([(line.name, line.nbytes) for line in lines] for lines in (plan.gpu_lines, plan.cpu_lines))
    gpu_title = "GPU memory"
    if not plan.inputs.hardware.has_gpu:
        gpu_title, on_cpu = "GPU tier (ordinary memory here)", [("GPU tier, from above", plan.gpu_bytes), *on_cpu]
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
    title = f"what each flag would buy, not known in time yet: {time_told_by(ceilings, plan)}"
    if known is not None:
        kind = "takes at least" if known.at_least else "is predicted to take"
        title = f"what each flag would buy: a decode pass {kind} {known.before.shown()} now{_of_rates(known.before)}"
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
        before, after = step.times.before.ms / step.before.shape.batch, step.times.after.ms / step.after.shape.batch
        token_ms = f"{after - before:+.2f}"
    moved = [f"{nbytes / 1e6:+.1f}" for nbytes in (more["ssd_read"], more["weight_h2d"] + more["kv_h2d"])]
    held = [f"{more[tier] / GIB:+.3f}" for tier in ("gpu", "cpu")]
    return [step.flag, pass_ms, token_ms, *moved, *held, "; ".join(step.beside)]


def check_fits(plan: Plan, ceilings: Mapping[str, Ceiling] | None = None, *, told: bool = False) -> None:
    """Raises DoesNotFit unless the plan fits: what is short, the cheapest change of flags that fits, both budgets.

    What the change costs is predicted from this machine's rates, as far as they are known. ``told``: the budgets are
    printed beside this, and so left out.
    """
    if not plan.fits:
        tiers = (("GPU", plan.gpu_bytes, plan.gpu_budget_bytes), ("CPU", plan.cpu_bytes, plan.cpu_budget_bytes))
        short = [
            f"it takes {_gib(needed)} of {tier} memory and the budget is {_gib(budget)}"
            for tier, needed, budget in tiers
            if budget is not None and needed > budget
        ]
        sentence = f"the run does not fit: {', and '.join(short)}"
        fitting = smallest_change(plan.inputs, ceilings)
        raise DoesNotFit(_explained(sentence, plan, fitting, ceilings or {}, told=told))


def ran_out(plan: Plan, cause: str, ceilings: Mapping[str, Ceiling]) -> DoesNotFit:
    """What to say when the device ran out although the plan fitted: the next smaller run, for 5 % less memory."""
    # The same budget with less in it, to leave room for what was not planned; where KV fills whatever the budget
    # leaves, a smaller budget, since nothing else frees any.
    target = int(0.95 * plan.gpu_bytes)
    sentence = f"the GPU ran out of memory ({cause}), though {_gib(plan.gpu_bytes)} were planned"
    auto = plan.inputs.asked is not None  # which fills whatever budget there is
    fitting = None if plan.kv.below or auto else smallest_change(plan.inputs, ceilings, target)
    if fitting is None:
        # Rounded down to two digits that count: what is typed is to be what was planned with.
        scale = 10.0 ** (1 - math.floor(math.log10(target / GIB)))
        budget = math.floor(target / GIB * scale) / scale
        asked = as_asked(plan.inputs)
        less = replace(asked, settings=replace(asked.settings, gpu_mem_gb=budget))
        fitting = smallest_change(choose_settings(less) if auto else less, ceilings)
    return DoesNotFit(_explained(sentence, plan, fitting, ceilings))


def _explained(
    sentence: str, plan: Plan, fitting: PlanInputs | None, ceilings: Mapping[str, Ceiling], *, told: bool = False
) -> str:
    lines = [f"{sentence}; {_advice(plan.inputs, fitting)}"]
    if fitting is not None:
        after = make_plan(fitting)
        lines += [cost_of(plan, after, ceilings), *_packed_first(plan, after)]
    if plan.inputs.synthetic is not None and not plan.fits and (layers := most_layers(plan.inputs)):
        shape = f"--synthetic {plan.inputs.synthetic}:layers={layers}"
        lines.append(f"or fewer layers, with all other flags as they are: {shape}")
    return "\n".join(lines if told else [*lines, budget_text(plan)])


def _packed_first(before: Plan, after: Plan) -> list[str]:
    """A sentence where following an advice writes the model to a drive, which no one asked for."""
    into, nbytes = after.inputs.packed_into, after.inputs.store_bytes
    if into is None or "SSD" not in after.way or "SSD" in before.way:
        return []
    return [
        f"--mode {after.placement.mode} reads a packed file: the first run writes {nbytes / 1e9:.2f} GB into {into} "
        "(--cache-dir names another place)"
    ]


def _gib(nbytes: int) -> str:
    """Rounded up: what is printed is to suffice."""
    digits = 2 if nbytes >= GIB else 4
    return f"{math.ceil(10**digits * nbytes / GIB) / 10**digits:.{digits}f} GiB"


def _advice(inputs: PlanInputs, fitting: PlanInputs | None) -> str:
    """The smallest change that fits, as flags to type; or the least memory that would do."""
    kept = fitting is not None and fitting.asked is not None
    without = "" if kept or inputs.asked is None else "without --auto"
    inputs = inputs if kept else as_asked(inputs)
    if fitting is not None:
        budget = fitting.settings.gpu_mem_gb
        smaller = [] if budget == inputs.settings.gpu_mem_gb else [f"--gpu-mem-gb {budget:g}"]
        flags = " ".join([*smaller, *changed_flags(inputs, fitting)])
        with_flags = f"with {flags}" if flags else ""
        return f"it fits {', '.join(filter(None, (without, with_flags)))}{' beside --auto' if kept else ''}"
    least = least_memory(inputs)
    needed = f"{_gib(least.cpu_bytes)} of CPU memory"
    if least.gpu_budget_bytes is not None:
        needed = f"{_gib(least.gpu_bytes)} of GPU memory and {needed}"
    flags = " ".join(filter(None, (without, *changed_flags(inputs, least.inputs))))
    return f"no change of flags suffices: {f'even {flags}' if flags else 'it'} would take {needed}"


def cost_of(before: Plan, after: Plan, ceilings: Mapping[str, Ceiling]) -> str:
    """What following an advice costs, in a sentence; ``before`` is what was asked for, as if it fitted."""
    more = more_bytes(before, after)
    ways = {
        "from the SSD": more["ssd_read"],
        "over the link": more["weight_h2d"] + more["kv_h2d"],
        "from --kv-device": more["kv_read"],
    }
    parts = [f"{nbytes / 1e6:+.1f} MB {where}" for where, nbytes in ways.items() if nbytes]
    moved = f"a pass moves {' and '.join(parts) or 'the same bytes'}"
    times = pass_times(before, after, ceilings)
    if times is None:
        return f"its cost is not known in time yet: {time_told_by(ceilings, before, after)}; {moved}"
    bound = "at least " if times.at_least else ""
    text = f"its predicted cost: a decode pass of {bound}{times.after.shown()} instead of {times.before.shown()}"
    if times.before.ms:
        text += f" ({100 * times.change_ms / times.before.ms:+.1f} %)"
    rows = before.shape.batch, after.shape.batch
    if rows[0] != rows[1]:
        each = times.before.shown(rows[0]), times.after.shown(rows[1])
        text += f", for {rows[1]} rows instead of {rows[0]}: {each[1]} a token instead of {each[0]}"
    return f"{text}{_of_rates(times.after)}; {moved}"


def _of_rates(estimate: Estimate) -> str:
    """How far the rates behind a prediction varied while they were measured: it is no better than they are."""
    return f" (of rates that varied by {estimate.spread_pct:.0f} %)" if estimate.spread_pct >= 0.5 else ""
