"""The plan of a run: residency, pools, memory to the byte, bytes a pass and the bound that follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from llama.checkpoint.names import KINDS, GroupId
from llama.config import ModelConfig
from wsm.budget import GIB, LIBRARIES_BYTES, Hardware, MemoryLine, activation_bytes, chunk_bytes, table
from wsm.groups import GroupLayout
from wsm.placement import Placement, place
from wsm.settings import Settings

MOST_CHUNK_TOKENS, FEWEST_CHUNK_TOKENS = 2048, 16
KV_BLOCK_TOKENS = 256
LOADING_SLOTS = 2


@dataclass(frozen=True, slots=True)
class RunShape:
    """How many tokens a run has: rows, the longest prompt, new tokens a row, and prompt tokens of all rows."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens: int


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """Everything that a plan follows from; to plan again with other flags, replace ``settings`` or ``shape``."""

    config: ModelConfig
    dtype: torch.dtype
    layouts: Mapping[GroupId | None, GroupLayout]
    settings: Settings
    shape: RunShape
    hardware: Hardware
    chunk_tokens: int | None = None
    micro_batch: int | None = None

    def slot_bytes(self) -> int:
        """Bytes of a slot of each kind together: a layer."""
        return sum(max(la.nbytes for g, la in self.layouts.items() if g and g.kind == kind) for kind in KINDS)


@dataclass(frozen=True, slots=True)
class Plan:
    """What will lie where and how much memory it takes. ``kv_tokens`` are a row's, in whole blocks."""

    inputs: PlanInputs
    placement: Placement
    chunk_tokens: int
    wave_rows: int
    kv_tokens: int
    gpu_lines: tuple[MemoryLine, ...]
    cpu_lines: tuple[MemoryLine, ...]
    gpu_budget_bytes: int | None
    cpu_budget_bytes: int
    bytes_per_pass: Mapping[str, int]

    @property
    def shape(self) -> RunShape:
        return self.inputs.shape

    @property
    def notes(self) -> tuple[str, ...]:
        """What was clipped."""
        return self.placement.notes

    @property
    def gpu_bytes(self) -> int:
        return sum(line.nbytes for line in self.gpu_lines)

    @property
    def cpu_bytes(self) -> int:
        """CPU memory in all; where the CPU is the compute device, with what stands for the GPU tier."""
        on_cpu = sum(line.nbytes for line in self.cpu_lines)
        return on_cpu if self.inputs.hardware.gpu_total_bytes is not None else on_cpu + self.gpu_bytes

    @property
    def gpu_short_bytes(self) -> int:
        """By how much the GPU tier is over its budget."""
        return 0 if self.gpu_budget_bytes is None else max(0, self.gpu_bytes - self.gpu_budget_bytes)

    @property
    def cpu_short_bytes(self) -> int:
        return max(0, self.cpu_bytes - self.cpu_budget_bytes)

    @property
    def fits(self) -> bool:
        return self.gpu_short_bytes == 0 and self.cpu_short_bytes == 0

    def budget_text(self) -> str:
        """Both budgets, line by line."""
        where = "GPU memory" if self.inputs.hardware.gpu_total_bytes is not None else "GPU tier (ordinary memory here)"
        return "\n".join(
            (
                table(where, self.gpu_lines, self.gpu_budget_bytes),
                table("CPU memory", self.cpu_lines, self.cpu_budget_bytes),
            )
        )


def make_plan(inputs: PlanInputs) -> Plan:
    """The plan for these inputs; it may not fit (see :func:`wsm.advice.check_fits`)."""
    placement = place(inputs.config.n_layers, inputs.settings)
    gpu_budget, cpu_budget = _budgets(inputs)
    for_activations = gpu_budget if gpu_budget is not None else cpu_budget
    chunk = inputs.chunk_tokens or _auto_chunk(inputs, for_activations // 8)
    rows = min(inputs.shape.batch, inputs.micro_batch or _auto_rows(inputs, for_activations // 16))
    blocks = -(-(inputs.shape.prompt_tokens + inputs.shape.new_tokens) // KV_BLOCK_TOKENS)
    plan = Plan(
        inputs=inputs,
        placement=placement,
        chunk_tokens=chunk,
        wave_rows=rows,
        kv_tokens=blocks * KV_BLOCK_TOKENS,
        gpu_lines=(),
        cpu_lines=(),
        gpu_budget_bytes=gpu_budget,
        cpu_budget_bytes=cpu_budget,
        bytes_per_pass=_bytes_per_pass(inputs, placement),
    )
    return replace(plan, gpu_lines=_gpu_lines(plan), cpu_lines=_cpu_lines(inputs, placement))


def _budgets(inputs: PlanInputs) -> tuple[int | None, int]:
    settings, hardware = inputs.settings, inputs.hardware
    asked_gpu = None if settings.gpu_mem_gb is None else int(settings.gpu_mem_gb * GIB)
    asked_cpu = None if settings.cpu_mem_gb is None else int(settings.cpu_mem_gb * GIB)
    limits = [limit for limit in (asked_gpu, hardware.gpu_available_bytes) if limit is not None]
    cpu = hardware.cpu_available_bytes if asked_cpu is None else min(asked_cpu, hardware.cpu_available_bytes)
    return min(limits, default=None), cpu


def _auto_chunk(inputs: PlanInputs, room: int) -> int:
    """The largest power of two up to 2048 whose activations fit in ``room``; never depends on the mode."""
    chunk = MOST_CHUNK_TOKENS
    while chunk > FEWEST_CHUNK_TOKENS and chunk_bytes(inputs.config, chunk, inputs.dtype.itemsize) > room:
        chunk //= 2
    return chunk


def _auto_rows(inputs: PlanInputs, room: int) -> int:
    """As many rows a wave as keep its residual within ``room``, at least one."""
    row = max(1, inputs.shape.prompt_tokens) * inputs.config.dim * inputs.dtype.itemsize
    return max(1, room // row)


def _gpu_lines(plan: Plan) -> tuple[MemoryLine, ...]:
    inputs, placement = plan.inputs, plan.placement
    config, itemsize, layer = inputs.config, inputs.dtype.itemsize, inputs.slot_bytes()
    kv_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim * itemsize
    wave_tokens = min(inputs.shape.prefill_tokens, plan.wave_rows * inputs.shape.prompt_tokens)
    activations = activation_bytes(
        config, chunk_tokens=plan.chunk_tokens, wave_tokens=wave_tokens, batch=inputs.shape.batch, itemsize=itemsize
    )
    lines = [
        MemoryLine(f"weights, {len(placement.residency.gpu)} resident layers", len(placement.residency.gpu) * layer),
        MemoryLine(f"pools, {placement.gpu_slots} slots a kind", placement.gpu_slots * layer),
        MemoryLine("embedding, final norm and head", inputs.layouts[None].nbytes),
        MemoryLine(
            f"KV cache, {inputs.shape.batch} x {plan.kv_tokens} tokens", inputs.shape.batch * plan.kv_tokens * kv_token
        ),
        MemoryLine(f"activations, chunks of {plan.chunk_tokens} tokens", activations),
    ]
    if inputs.hardware.gpu_total_bytes is not None:
        lines.append(MemoryLine("CUDA context and libraries", inputs.hardware.gpu_context_bytes + LIBRARIES_BYTES))
    return tuple(lines)


def _cpu_lines(inputs: PlanInputs, placement: Placement) -> tuple[MemoryLine, ...]:
    if placement.mode == "full":
        return ()
    layer, residents = inputs.slot_bytes(), len(placement.residency.cpu)
    lines = [
        MemoryLine(f"weights, {residents} resident layers (page-locked)", residents * layer),
        MemoryLine(f"pools, {placement.cpu_slots} slots a kind (page-locked)", placement.cpu_slots * layer),
    ]
    if loading := loading_bytes(inputs, placement):
        lines.append(MemoryLine("loading buffers, freed after loading (page-locked)", loading))
    return tuple(lines)


def loading_bytes(inputs: PlanInputs, placement: Placement) -> int:
    """Page-locked memory that only loading needs.

    GPU residents come through the CPU pools, or through slots of their own where there are none; the globals through
    any memory that is large enough, or through a buffer of their own.
    """
    layer, image = inputs.slot_bytes(), inputs.layouts[None].nbytes
    slots = LOADING_SLOTS * layer if placement.residency.gpu and not placement.cpu_slots else 0
    return slots + (image if image > max(slots, placement.cpu_layers * layer) else 0)


def _bytes_per_pass(inputs: PlanInputs, placement: Placement) -> Mapping[str, int]:
    layer = {kind: inputs.layouts[GroupId(0, kind)].nbytes for kind in KINDS}
    streamed = len(placement.residency.cpu) + len(placement.residency.ssd)
    kept = not inputs.settings.evict_finished and placement.gpu_slots >= streamed
    weights = sum(layout.nbytes for group, layout in inputs.layouts.items() if group is not None)
    head = inputs.layouts[None].nbytes if inputs.config.tied_embeddings else inputs.layouts[None].nbytes // 2
    return {
        "ssd_read": placement.ssd_layers_a_pass * sum(layer.values()),
        "weight_h2d": 0 if kept else streamed * sum(layer.values()),
        "hbm_read": weights + head,
    }
