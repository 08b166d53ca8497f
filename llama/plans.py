"""The plan of a run, from what it reads and the machine that it runs on."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import torch

from llama.checkpoint import shape_without_layers
from llama.inputs import Inputs, OpenedDraft
from llama.options import BuildOptions
from llama.speculation.ngram import TOKEN_BYTES
from wsm.formats import registry
from wsm.plan.hardware import GIB, Hardware, measure_hardware, tightest
from wsm.plan.inputs import DraftInputs, PlanInputs, RunShape
from wsm.plan.levers import choose_settings
from wsm.plan.plan import Plan, make_plan
from wsm.store.description import DTYPE_FORMATS
from wsm.store.layout import planned_layouts


def hardware_here(inputs: Inputs) -> Hardware:
    """The memory of this machine, a rank's share of the CPU's."""
    world = inputs.world
    return measure_hardware(inputs.device, world.local.size, GIB if world.shard.size == 1 else 2 * GIB)


def plan_run(options: BuildOptions, inputs: Inputs, shape: RunShape, hardware: Hardware | None = None) -> Plan:
    """What will be where, and how much memory it takes, on this machine or on other ``hardware``; allocates nothing."""
    world = inputs.world
    hardware = hardware or hardware_here(inputs)
    everywhere = world.exchange(json.dumps(asdict(hardware)))
    hardware = tightest(hardware, [Hardware(**json.loads(text)) for text in everywhere if text is not None])
    planned = _planned(options, inputs, shape, hardware)
    return make_plan(choose_settings(planned) if options.auto else planned)


def _planned(options: BuildOptions, inputs: Inputs, shape: RunShape, hardware: Hardware) -> PlanInputs:
    world, is_new = inputs.world, inputs.description is None
    packed_later = is_new and (inputs.synthetic or not inputs.encoded_here)
    return PlanInputs(
        config=inputs.share.config,
        dtype=inputs.dtype,
        layouts=inputs.layouts,
        settings=options,
        shape=shape,
        hardware=hardware,
        chunk_tokens=options.prefill_chunk_tokens,
        micro_batch=options.micro_batch,
        kv_record_bytes=inputs.kv_format.record_bytes,
        topk_blk=options.topk_blk,
        kv_device=options.kv_device,
        ranks=world.shard.size,
        ranks_here=world.local.size,
        verify_rows=options.nodes,
        draft=_planned_draft(inputs.draft, hardware) if inputs.draft is not None else None,
        synthetic=shape_without_layers(options.synthetic) if is_new and options.synthetic is not None else None,
        packed_into=str(inputs.cache_dir) if packed_later else None,
    )


def _planned_draft(draft: OpenedDraft, hardware: Hardware) -> DraftInputs:
    if draft.inputs is None:
        return DraftInputs(token_bytes=TOKEN_BYTES)
    shapes = draft.speculating.possible
    columns, nodes = max(shape.grown for shape in shapes), max(shape.width for shape in shapes)
    return DraftInputs(_planned(draft.options, draft.inputs, RunShape(1, 1, 1, 1), hardware), columns, nodes)


def plans_by_format(options: BuildOptions, inputs: Inputs, plan: Plan) -> dict[str, Plan]:
    """The same run in every weight format, by name, ``plan`` among them; with ``--auto`` each with its own choice."""
    plans = dict[str, Plan]()
    if inputs.checkpoint.formats is not None:  # what is quantised already comes in no other format
        return {inputs.format_name: plan}
    for name in (DTYPE_FORMATS[inputs.dtype], *registry.NAMES):
        weight_format = registry.get(name) if name in registry.NAMES else None
        if weight_format is not None and weight_format.exact and inputs.dtype != torch.bfloat16:
            continue
        layouts = planned_layouts(inputs.share.config, inputs.dtype, weight_format, most=False)
        other = replace(plan.inputs, layouts=layouts, settings=options)
        plans[name] = make_plan(choose_settings(other) if options.auto else other)
    return plans | {inputs.format_name: plan}
