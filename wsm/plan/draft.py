"""What a draft takes of the device, beside the model that it drafts for: all of it, for the whole run."""

from __future__ import annotations

from typing import NamedTuple

from wsm.layout.groups import round_up
from wsm.layout.kv import KV_BLOCK_TOKENS
from wsm.plan.decoding import ways_to_decode
from wsm.plan.inputs import ALIKE_ROWS, PlanInputs
from wsm.plan.memory import MemoryKind, MemoryLine, allocator_bytes, chunk_bytes, gpu_lines, portions_for
from wsm.plan.placement import place

RANKED_BYTES = 40
"""Bytes per logit while the likeliest children of a level are looked for."""
_OWN = (MemoryKind.WEIGHTS, MemoryKind.GLOBALS), (MemoryKind.ACTIVATIONS, MemoryKind.GRAPHS, MemoryKind.SLACK)


class DraftPlan(NamedTuple):
    """Of a draft that is a model: its prefill's portions, its rows' room for KV, and the scratch that it decodes in."""

    chunk_tokens: int
    wave_rows: int
    kv_tokens: int
    scratch_bytes: int


def plan_draft(inputs: PlanInputs, budget: int, scratch_bytes: int) -> tuple[DraftPlan | None, list[MemoryLine]]:
    """The plan of a draft that is a model, and what any draft takes of the device.

    ``budget`` is that of the whole device; ``scratch_bytes`` are there already, and used by both models in turn.
    """
    if inputs.draft is None:
        return None, []
    model, tokens = inputs.draft_model, inputs.shape.batch * inputs.kv_tokens
    if model is None:
        return None, [MemoryLine(MemoryKind.DRAFT, "draft, the tokens of all rows", tokens * inputs.draft.token_bytes)]
    placement, portions = place(model.config.n_layers, model.settings), portions_for(model, budget)
    *_, decoding = ways_to_decode(model, 1)
    lines = gpu_lines(model, placement, portions, decoding)
    weights, computing = (sum(line.nbytes for line in lines if line.kind in kinds) for kinds in _OWN)
    kv = model.kv_layout(model.shape.batch)
    kv_bytes = kv.n_layers * kv.batch * kv.row_bytes
    computing += _level_bytes(inputs, model) + max(0, decoding.scratch_bytes - scratch_bytes)
    name = f"draft {model.config.name}, {model.config.n_layers} layers"
    found = [
        MemoryLine(MemoryKind.DRAFT, name, weights),
        MemoryLine(MemoryKind.DRAFT, "draft, KV", allocator_bytes(kv_bytes) if inputs.hardware.has_gpu else kv_bytes),
        MemoryLine(MemoryKind.DRAFT, "draft, activations and graphs", computing),
    ]
    return DraftPlan(portions.chunk_tokens, portions.wave_rows, model.kv_tokens, decoding.scratch_bytes), found


def _level_bytes(inputs: PlanInputs, model: PlanInputs) -> int:
    """What is alive while a level of all rows' trees is computed and the next one chosen, or accepted KV is moved."""
    assert inputs.draft is not None
    config, rows = model.config, inputs.shape.batch
    nodes, itemsize = rows * inputs.draft.nodes, model.dtype.itemsize
    window = 2 * nodes * KV_BLOCK_TOKENS * (config.n_kv_heads * config.head_dim * itemsize + 8)
    tree = 8 * rows * inputs.draft.columns * (inputs.draft.columns + 16)
    moved = 2 * rows * inputs.draft.columns * model.kv_token_bytes  # KV of what was accepted
    level = chunk_bytes(config, round_up(nodes, ALIKE_ROWS), itemsize) + window
    return max(level + nodes * config.vocab_size * RANKED_BYTES + tree, moved)
