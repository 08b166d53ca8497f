"""A plan for programs: what ``plan`` says in words, as one JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from wsm.plan.by_format import FormatPlan
from wsm.plan.levers import more_bytes, steps
from wsm.plan.memory import MemoryLine
from wsm.plan.plan import Plan
from wsm.plan.speculated import Speculated
from wsm.plan.time import Ceiling, predicted_floor, predicted_pass_ms


def plan_json(
    plan: Plan, ceilings: Mapping[str, Ceiling], formats: Sequence[FormatPlan], drafted: Speculated | None
) -> dict[str, Any]:
    """Keys with their units; what no measured rate tells is null, or missing where a rate of it alone is.

    ``levers``: one step of each flag, with what it changes in bytes and, where that is known, in milliseconds.
    ``weight_formats``: the same run in each of them. ``speculation``: with a draft, at the acceptance that was named.
    """
    placement, residency, shape = plan.placement, plan.placement.residency, plan.shape
    predicted = predicted_pass_ms(plan, ceilings)
    floors = predicted_floor(plan, {name: ceiling.value for name, ceiling in ceilings.items()})
    return {
        "model": plan.inputs.config.name,
        "mode": placement.mode,
        "fits": plan.fits,
        "batch_size": shape.batch,
        "prefill_tokens_total": shape.prefill_tokens,
        "max_new_tokens": shape.new_tokens,
        "layers": plan.inputs.config.n_layers,
        "layer_bytes": plan.inputs.slot_bytes(),
        "residency": {"gpu": residency.gpu, "cpu": residency.cpu, "ssd": residency.ssd},
        "gpu_slots": placement.gpu_slots,
        "cpu_slots": placement.cpu_slots,
        "read_ahead_layers": placement.read_ahead_layers,
        "staged_layers": placement.staged_layers,
        "prefill": {"passes": plan.waves, "rows": plan.wave_rows, "chunk_tokens": plan.chunk_tokens},
        "gpu_memory": _memory(plan.gpu_lines, plan.gpu_bytes, plan.gpu_budget_bytes),
        "cpu_memory": _memory(plan.cpu_lines, plan.cpu_bytes, plan.cpu_budget_bytes),
        "bytes_per_pass": dict(plan.bytes_per_pass),
        "floor": {
            phase: {"ms": floor.ms, "bound_by": floor.bound_by, "parts_ms": dict(floor.parts_ms)}
            for phase, floor in floors.items()
        },
        "predicted_pass_ms": {phase: e.ms if e and e.steady else None for phase, e in predicted.items()},
        "predicted_range_ms": {phase: e and [e.low_ms, e.high_ms] for phase, e in predicted.items()},
        "ceilings": {name: asdict(ceiling) for name, ceiling in ceilings.items()},
        "levers": [
            {
                "flag": step.flag,
                "fits": step.after.fits,
                "change_ms": None if step.times is None else step.times.change_ms,
                "change_bytes": more_bytes(step.before, step.after),
            }
            for step in steps(plan, ceilings)
        ],
        "speculation": drafted and _speculated(drafted),
        "weight_formats": [_in_format(found) for found in formats],
        "notes": plan.notes,
    }


def _in_format(found: FormatPlan) -> dict[str, Any]:
    return {
        "weight_format": found.name,
        "rest_bytes": found.rest_bytes,
        "bytes_per_pass": dict(found.plan.bytes_per_pass),
        "gpu_bytes": found.plan.gpu_bytes,
        "cpu_bytes": found.plan.cpu_bytes,
        "fits": found.plan.fits,
        "pass_ms": found.pass_ms,
        "pass_range_ms": found.decode_pass and found.decode_pass[1:],
        "at_least": found.at_least,
        "tokens_per_s": found.tokens_per_s,
        "tokens_per_s_with_draft": found.drafted and found.drafted.tokens_per_s,
    }


def _speculated(found: Speculated) -> dict[str, Any]:
    return {
        "depth": found.depth,
        "width": found.width,
        "tokens_a_pass": found.tokens_a_pass,
        "drafting_ms": found.drafting_ms,
        "drafting_hidden_ms": found.hidden_ms,
        "pass_ms": found.decode_pass.ms if found.decode_pass is not None and found.decode_pass.steady else None,
        "pass_range_ms": found.decode_pass and found.decode_pass[1:],
        "at_least": found.at_least,
        "tokens_per_s": found.tokens_per_s,
    }


def _memory(lines: Sequence[MemoryLine], nbytes: int, budget_bytes: int | None) -> dict[str, Any]:
    return {"lines": {line.name: line.nbytes for line in lines}, "bytes": nbytes, "budget_bytes": budget_bytes}
