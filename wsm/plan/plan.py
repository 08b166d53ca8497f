"""The plan of a run: residency, pools, memory to the byte, and the bytes of a pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from wsm.layout.groups import BLOCK, KINDS, GroupId, GroupLayout, Kind, TensorLayout, lie_apart, round_up, without
from wsm.layout.kv import KV_BLOCK_TOKENS, WINDOWS, KVLayout, KVPlacement
from wsm.layout.model import ModelShape
from wsm.plan.kv import KVCosts, kv_bytes_per_pass, kv_lines, place_kv
from wsm.plan.memory import (
    GIB,
    MIB,
    SAMPLED_AT_ONCE,
    SORTED_BYTES,
    WORKSPACE_BYTES,
    Hardware,
    MemoryLine,
    Work,
    activation_bytes,
    allocator_bytes,
    chunk_bytes,
    table,
)
from wsm.plan.placement import Placement, place
from wsm.settings import Settings

MOST_CHUNK_TOKENS, FEWEST_CHUNK_TOKENS = 2048, 16


@dataclass(frozen=True, slots=True)
class RunShape:
    """How many tokens a run has: rows, the longest prompt, new tokens a row, and prompt tokens of all rows."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens: int

    def with_batch(self, batch: int) -> RunShape:
        """The same with fewer rows; which ones is not known, so the longest are assumed."""
        tokens = min(self.prefill_tokens, batch * self.prompt_tokens)
        return RunShape(batch, self.prompt_tokens, self.new_tokens, tokens)


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """Everything that a plan follows from; to plan again with other flags, replace ``settings`` or ``shape``.

    ``layouts`` are the images of all groups, and of the globals under None. ``chunk_tokens`` and ``micro_batch`` (rows
    whose KV is moved and attended together) are chosen where they are None. ``kv_record_bytes`` are those of one head's
    keys or values of a token; None: as the model computes them. With several ``ranks``, ``config``, ``layouts`` and
    ``hardware`` are one's share, and so is the plan; ``ranks_here`` of them share this host.
    """

    config: ModelShape
    dtype: torch.dtype
    layouts: Mapping[GroupId | None, GroupLayout]
    settings: Settings
    shape: RunShape
    hardware: Hardware
    chunk_tokens: int | None = None
    micro_batch: int | None = None
    kv_record_bytes: int | None = None
    topk_blk: int = 0
    kv_device: str | None = None
    ranks: int = 1
    ranks_here: int = 1

    def slot_bytes(self) -> int:
        """Bytes of a slot of each kind together: a layer."""
        return sum(self.kind_bytes(kind) for kind in KINDS)

    def kind_bytes(self, kind: Kind) -> int:
        """Bytes of a slot of ``kind``: its largest image."""
        return max(layout.nbytes for group, layout in self.layouts.items() if group and group.kind == kind)

    @property
    def embedding_on_cpu(self) -> bool:
        """Whether the token embedding stays in page-locked CPU memory, from where the GPU reads its tokens' rows."""
        possible = self.settings.mode != "full" and not self.config.tied_embeddings
        return possible and self.settings.embedding == "cpu"

    @property
    def embedding_bytes(self) -> int:
        return next(tensor.nbytes for tensor in self.layouts[None].tensors if tensor.name == self.config.embedding)

    @property
    def gpu_globals_bytes(self) -> int:
        """Bytes of the globals' image on the GPU."""
        layout = self.layouts[None]
        return without(layout, self.config.embedding).nbytes if self.embedding_on_cpu else layout.nbytes

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV a row, in whole blocks."""
        return -(-(self.shape.prompt_tokens + self.shape.new_tokens) // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS

    @property
    def record_bytes(self) -> int:
        """Bytes of one head's keys or values of one token."""
        return self.kv_record_bytes or self.config.head_dim * self.dtype.itemsize

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        return 2 * self.config.n_layers * self.config.n_kv_heads * self.record_bytes

    def kv_layout(self, stretch_rows: int) -> KVLayout:
        """The KV of all rows, moved so many rows at a time."""
        config = self.config
        return KVLayout(
            config.n_layers, self.shape.batch, stretch_rows, config.n_kv_heads, self.kv_tokens, self.record_bytes
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """What will lie where and how much memory it takes.

    ``kv_tokens`` are a row's. ``bytes_per_pass`` has ``ssd_read``, ``weight_h2d`` and ``hbm_read`` (weights only) of a
    pass in the steady state, and ``kv_h2d`` of a decode pass half-way.
    """

    inputs: PlanInputs
    placement: Placement
    kv: KVPlacement
    chunk_tokens: int
    wave_rows: int
    kv_tokens: int
    gpu_lines: tuple[MemoryLine, ...]
    cpu_lines: tuple[MemoryLine, ...]
    gpu_budget_bytes: int | None
    cpu_budget_bytes: int
    bytes_per_pass: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def shape(self) -> RunShape:
        return self.inputs.shape

    @property
    def waves(self) -> int:
        """Passes of the prefill."""
        return -(-self.shape.batch // self.wave_rows)

    @property
    def gpu_bytes(self) -> int:
        return sum(line.nbytes for line in self.gpu_lines)

    @property
    def page_locked_bytes(self) -> int:
        """CPU memory of the engine, what only loading needs included."""
        not_locked = "loading, one tensor at a time"
        return sum(line.nbytes for line in self.cpu_lines if line.name != not_locked)

    @property
    def cpu_bytes(self) -> int:
        """CPU memory in all; where the CPU is the compute device, with what stands for the GPU tier."""
        on_cpu = sum(line.nbytes for line in self.cpu_lines)
        return on_cpu if self.inputs.hardware.has_gpu else on_cpu + self.gpu_bytes

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
        if self.inputs.hardware.has_gpu:
            tables = (
                table("GPU memory", self.gpu_lines, self.gpu_budget_bytes),
                table("CPU memory", self.cpu_lines, self.cpu_budget_bytes),
            )
        else:
            in_all = (MemoryLine("GPU tier, from above", self.gpu_bytes), *self.cpu_lines)
            tables = (
                table("GPU tier (ordinary memory here)", self.gpu_lines, self.gpu_budget_bytes),
                table("CPU memory", in_all, self.cpu_budget_bytes),
            )
        return "\n".join(tables)


def make_plan(inputs: PlanInputs) -> Plan:
    """The plan for these inputs; it may not fit (see :func:`wsm.plan.advice.check_fits`)."""
    notes: list[str] = []
    placement = place(inputs.config.n_layers, inputs.settings)
    if inputs.settings.embedding == "cpu" and not inputs.embedding_on_cpu:
        why = "it is the head too" if inputs.config.tied_embeddings else "mode full pages nothing"
        notes.append(f"--embedding cpu has no effect: {why}")
    if inputs.ranks > 1:
        graphs = ", and passes run without CUDA graphs" if inputs.hardware.has_gpu else ""
        notes.append(f"one of {inputs.ranks} ranks: each figure is its share{graphs}")
    gpu_budget, cpu_budget = _budgets(inputs, notes)
    portions = _portions(inputs, gpu_budget if gpu_budget is not None else cpu_budget)
    gpu_lines, cpu_lines = _gpu_lines(inputs, placement, portions), _cpu_lines(inputs, placement)
    gpu_room = None if gpu_budget is None else gpu_budget - sum(line.nbytes for line in gpu_lines)
    shared = 0 if inputs.hardware.has_gpu or gpu_budget is None else gpu_budget
    cpu_room = cpu_budget - shared - sum(line.nbytes for line in cpu_lines)
    kv = place_kv(inputs.kv_layout(portions.stretch_rows), gpu_room, cpu_room, kv_costs(inputs))
    if inputs.kv_device is not None and not kv.disk:
        notes.append("--kv-device is not used: there is room for all KV above it")
    on_gpu, on_cpu = kv_lines(kv, kv_costs(inputs))
    return Plan(
        inputs=inputs,
        placement=placement,
        kv=kv,
        chunk_tokens=portions.chunk_tokens,
        wave_rows=portions.wave_rows,
        kv_tokens=inputs.kv_tokens,
        gpu_lines=(*gpu_lines[:3], *on_gpu, *gpu_lines[3:]),
        cpu_lines=(*cpu_lines, *on_cpu),
        gpu_budget_bytes=gpu_budget,
        cpu_budget_bytes=cpu_budget,
        bytes_per_pass={**_bytes_per_pass(inputs, placement), "kv_h2d": kv_bytes_per_pass(kv, *_context(inputs))},
        notes=(*placement.notes, *notes),
    )


def _budgets(inputs: PlanInputs, notes: list[str]) -> tuple[int | None, int]:
    """GPU and CPU budget: what the flags say, never more than there is. On the CPU only a flag limits the GPU tier."""
    settings, hardware = inputs.settings, inputs.hardware
    gpu = _asked("--gpu-mem-gb", settings.gpu_mem_gb, hardware.gpu_available_bytes, notes)
    share = None if settings.cpu_mem_gb is None else settings.cpu_mem_gb / inputs.ranks_here
    cpu = _asked("--cpu-mem-gb", share, hardware.cpu_available_bytes, notes)
    return gpu, hardware.cpu_available_bytes if cpu is None else cpu


def _asked(flag: str, gib: float | None, available: int | None, notes: list[str]) -> int | None:
    if gib is None or available is None:
        return available if gib is None else int(gib * GIB)
    if gib * GIB > available:
        notes.append(f"{flag} {gib:g} clipped to {available / GIB:.2f}, what is free")
    return min(int(gib * GIB), available)


class Portions(NamedTuple):
    """Tokens a chunk, rows whose KV is moved together, and rows a wave, in whole stretches."""

    chunk_tokens: int
    stretch_rows: int
    wave_rows: int


def _portions(inputs: PlanInputs, budget: int) -> Portions:
    """What is computed at once. It never depends on the mode, since the modes are to be bit-equal.

    The chunk is the largest power of two up to 2048 whose activations take at most 1/8 of the budget, a wave has as
    many rows as keep its residual within 1/16, a stretch as many as keep its windows within 1/8. The budget is rounded
    down to a power of two first: what is free differs a little from run to run, and two runs are to choose the same.
    """
    config, itemsize, shape = inputs.config, inputs.dtype.itemsize, inputs.shape
    steady = 1 << max(0, budget.bit_length() - 1)
    chunk = inputs.chunk_tokens or MOST_CHUNK_TOKENS
    if inputs.chunk_tokens is None:
        while chunk > FEWEST_CHUNK_TOKENS and chunk_bytes(config, chunk, itemsize) > steady // 8:
            chunk //= 2
    rows = max(1, min(shape.batch, steady // 16 // (max(1, shape.prompt_tokens) * config.dim * itemsize)))
    stretch = inputs.micro_batch or steady // 8 // (WINDOWS * inputs.kv_layout(1).row_bytes)
    stretch = max(1, min(shape.batch, stretch if inputs.micro_batch else min(stretch, rows)))
    return Portions(chunk, stretch, max(stretch, rows - rows % stretch) if rows < shape.batch else shape.batch)


def kv_costs(inputs: PlanInputs) -> KVCosts:
    """What the tiers of KV take beside it."""
    blocks = inputs.kv_tokens // KV_BLOCK_TOKENS
    chosen = 0 < inputs.topk_blk < blocks
    bounds = 2 * inputs.config.n_kv_heads * blocks * inputs.config.head_dim * inputs.dtype.itemsize
    return KVCosts(bounds if chosen else 0, inputs.hardware.has_gpu, inputs.kv_device)


def _gpu_lines(inputs: PlanInputs, placement: Placement, portions: Portions) -> tuple[MemoryLine, ...]:
    """All but KV."""
    shape, on_gpu, residents = inputs.shape, inputs.hardware.has_gpu, len(placement.residency.gpu)
    layer, chunk = inputs.slot_bytes(), portions.chunk_tokens
    wave_tokens = min(shape.prefill_tokens, portions.wave_rows * shape.prompt_tokens)
    work = Work(chunk, wave_tokens, shape.batch, shape.prompt_tokens, inputs.kv_tokens, inputs.dtype.itemsize, on_gpu)
    activations = activation_bytes(inputs.config, work) + _copied_matrices(inputs) + _gathered_bytes(inputs)
    activations += _converted_kv(inputs, portions)
    lines = [
        MemoryLine(f"weights resident, {residents} layers", residents * layer),
        MemoryLine(f"pools, {placement.gpu_slots} slots a kind", placement.gpu_slots * layer),
        MemoryLine(
            "final norm and head" if inputs.embedding_on_cpu else "embedding, final norm and head",
            inputs.gpu_globals_bytes,
        ),
        MemoryLine(f"activations, {wave_tokens} tokens in chunks of {chunk}", activations),
    ]
    if on_gpu:
        if inputs.settings.mode in ("full", "preload") and inputs.ranks == 1:
            graphs = chunk_bytes(inputs.config, shape.batch, inputs.dtype.itemsize) + _converted_kv(inputs, portions)
            lines.append(MemoryLine("decode graphs", graphs))
        lines.append(MemoryLine("CUDA context and kernels", inputs.hardware.gpu_context_bytes))
        lines.append(MemoryLine("library workspaces", WORKSPACE_BYTES))
        lines.append(MemoryLine("allocator slack", _rounding(inputs, placement) + activations // 8 + 32 * MIB))
    return tuple(lines)


def _converted_kv(inputs: PlanInputs, portions: Portions) -> int:
    """Keys and values in the model's dtype, where they are stored in another."""
    if inputs.kv_record_bytes in (None, inputs.config.head_dim * inputs.dtype.itemsize):
        return 0
    values = 2 * inputs.config.n_kv_heads * inputs.kv_tokens * inputs.config.head_dim
    return portions.stretch_rows * values * (inputs.dtype.itemsize if inputs.hardware.has_gpu else 8)


def _copied_matrices(inputs: PlanInputs) -> int:
    """The model takes queries, keys and values in one product: where their matrices lie apart, it copies them first."""
    if inputs.settings.mode == "full":
        return 0
    attn = [layout for group, layout in inputs.layouts.items() if group and group.kind == "attn"]
    return max(lie_apart(layout, inputs.config.fused) for layout in attn)


def _gathered_bytes(inputs: PlanInputs) -> int:
    """Logits of the whole vocabulary, and what gathering and sampling them takes, beyond one rank's share of both."""
    if inputs.ranks == 1:
        return 0
    rows, elsewhere = inputs.shape.batch, inputs.config.vocab_size * (inputs.ranks - 1)
    return 4 * 4 * rows * elsewhere + min(rows, SAMPLED_AT_ONCE) * elsewhere * SORTED_BYTES


def _rounding(inputs: PlanInputs, placement: Placement) -> int:
    """What torch's allocator adds to weights and slots."""

    def added(nbytes: int) -> int:
        return allocator_bytes(nbytes) - nbytes

    if placement.mode == "full":
        tensors = [tensor for layout in inputs.layouts.values() for tensor in layout.tensors]
        return sum(added(tensor.nbytes) for tensor in tensors)
    layers = len(placement.residency.gpu) + placement.gpu_slots
    slots = layers * sum(added(inputs.kind_bytes(kind)) for kind in KINDS)
    return slots + added(inputs.gpu_globals_bytes)


def _cpu_lines(inputs: PlanInputs, placement: Placement) -> tuple[MemoryLine, ...]:
    if placement.mode == "full":
        largest = max(tensor.nbytes for layout in inputs.layouts.values() for tensor in layout.tensors)
        return (MemoryLine("loading, one tensor at a time", largest),) if inputs.hardware.has_gpu else ()
    layer, residents = inputs.slot_bytes(), len(placement.residency.cpu)
    lines = [
        MemoryLine(f"weights resident, {residents} layers", residents * layer),
        MemoryLine(f"pools, {placement.cpu_slots} slots a kind", placement.cpu_slots * layer),
    ]
    if inputs.embedding_on_cpu:
        lines.append(MemoryLine("embedding", round_up(inputs.embedding_bytes, BLOCK)))
    if loading := loading_bytes(inputs, placement):
        lines.append(MemoryLine("loading buffers, freed after loading", loading))
    return tuple(lines)


def loading_bytes(inputs: PlanInputs, placement: Placement) -> int:
    """Page-locked memory that only loading needs.

    GPU residents come through the CPU layers' memory, or through slots of their own where there is too little; the
    globals through any memory that is large enough, or through a buffer of their own.
    """
    layer, image = inputs.slot_bytes(), inputs.layouts[None].nbytes
    slots = placement.loading_slots * layer
    return slots + (image if image > max(slots, placement.cpu_layers * layer) else 0)


def _context(inputs: PlanInputs) -> tuple[int, int]:
    """Tokens of a mean row half-way through the decode, and blocks of them that are brought from below the device."""
    shape = inputs.shape
    return shape.prefill_tokens // shape.batch + shape.new_tokens // 2, inputs.topk_blk


def _bytes_per_pass(inputs: PlanInputs, placement: Placement) -> Mapping[str, int]:
    residency = placement.residency
    # Nothing moves where finished groups stay in their slots and there is a slot for each.
    kept = not inputs.settings.evict_finished and placement.gpu_slots >= residency.streamed_layers
    from_ssd = residency.ssd if placement.ssd_layers_a_pass and not kept else ()
    streamed = () if kept else (*residency.cpu, *residency.ssd)
    tied = inputs.config.tied_embeddings
    head = [t for t in inputs.layouts[None].tensors if tied or t.name != inputs.config.embedding]
    return {
        "ssd_read": _layers_bytes(inputs, from_ssd),
        "weight_h2d": _layers_bytes(inputs, streamed),
        "hbm_read": _layers_bytes(inputs, range(inputs.config.n_layers)) + _tensor_bytes(head),
    }


def _layers_bytes(inputs: PlanInputs, layers: Sequence[int]) -> int:
    return sum(inputs.layouts[GroupId(layer, kind)].nbytes for layer in layers for kind in KINDS)


def _tensor_bytes(tensors: Sequence[TensorLayout]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
