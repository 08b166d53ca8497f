"""The plan of a run: residency, pools, memory to the byte, and the bytes of a pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from wsm.layout.kv import KVPlacement
from wsm.plan.decoding import MANY_CHUNKS, Decoding, decoded_bytes, decoded_layouts, ways_to_decode
from wsm.plan.draft import DraftPlan, plan_draft
from wsm.plan.hardware import GIB
from wsm.plan.inputs import PlanInputs, RunShape
from wsm.plan.kv import KVCosts, kv_bytes_per_pass, kv_cpu_lines, kv_device_bytes, kv_gpu_lines, place_kv
from wsm.plan.memory import MemoryKind, MemoryLine, cpu_lines, gpu_lines, portions_for, total
from wsm.plan.placement import Placement, place


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be where and how much memory it takes.

    ``bytes_per_pass`` has ``ssd_read``, ``weight_h2d`` and ``hbm_read`` (weights only) of a pass in the steady state,
    and ``kv_h2d`` and ``kv_read`` (of ``--kv-device``) of a decode pass half-way; ``decoding`` is how matrices in a
    weight format are decoded; ``draft`` is the plan of a draft that is a model.
    """

    inputs: PlanInputs
    placement: Placement
    kv: KVPlacement
    chunk_tokens: int
    wave_rows: int
    gpu_lines: tuple[MemoryLine, ...]
    cpu_lines: tuple[MemoryLine, ...]
    gpu_budget_bytes: int | None
    cpu_budget_bytes: int
    bytes_per_pass: Mapping[str, int]
    notes: tuple[str, ...]
    decoding: Decoding
    draft: DraftPlan | None = None

    @property
    def scratch_bytes(self) -> int:
        """Of the one scratch that the model and its draft share."""
        return max(self.decoding.scratch_bytes, self.draft.scratch_bytes if self.draft is not None else 0)

    @property
    def bytes_a_weight(self) -> float:
        """That a pass reads from device memory at least."""
        return self.inputs.dtype.itemsize if self.decoding.at_load else self.inputs.bytes_a_weight

    @property
    def decoded_bytes(self) -> Mapping[str, int]:
        """Bytes that decoding matrices makes in a pass of each phase."""
        return {
            "prefill": decoded_bytes(self.inputs, self.decoding, self.chunk_tokens, self.chunks),
            "decode": decoded_bytes(self.inputs, self.decoding, self.inputs.nodes),
        }

    @property
    def chunks(self) -> int:
        """Of a prefill pass, at most."""
        tokens = min(self.shape.prefill_tokens, self.wave_rows * self.shape.prompt_tokens)
        return -(-tokens // self.chunk_tokens)

    @property
    def shape(self) -> RunShape:
        return self.inputs.shape

    @property
    def waves(self) -> int:
        """Passes of the prefill."""
        return -(-self.shape.batch // self.wave_rows)

    @property
    def way(self) -> tuple[str, ...]:
        """The tiers that weights pass through in every pass, from below; where nothing moves, the GPU alone."""
        moved = {"SSD": "ssd_read", "CPU": "weight_h2d"}
        return *(tier for tier, way in moved.items() if self.bytes_per_pass[way]), "GPU"

    @property
    def same_as(self) -> str | None:
        """The mode that this run equals, where ``mixed`` is asked for and no layer is left for the SSD."""
        if self.placement.mode != "mixed" or "SSD" in self.way:
            return None
        return "stream" if "CPU" in self.way else "preload"

    @property
    def gpu_bytes(self) -> int:
        return total(self.gpu_lines)

    @property
    def page_locked_bytes(self) -> int:
        """CPU memory of the engine, what only loading needs included."""
        return total(line for line in self.cpu_lines if line.kind != MemoryKind.LOADING_TENSOR)

    @property
    def cpu_bytes(self) -> int:
        """CPU memory in all; where the CPU is the compute device, with what stands for the GPU tier."""
        on_cpu = total(self.cpu_lines)
        return on_cpu if self.inputs.hardware.has_gpu else on_cpu + self.gpu_bytes

    @property
    def fits_gpu(self) -> bool:
        return self.gpu_budget_bytes is None or self.gpu_bytes <= self.gpu_budget_bytes

    @property
    def fits_cpu(self) -> bool:
        return self.cpu_bytes <= self.cpu_budget_bytes

    @property
    def fits(self) -> bool:
        return self.fits_gpu and self.fits_cpu


def make_plan(inputs: PlanInputs) -> Plan:
    """The plan for these inputs; it may not fit (see :func:`wsm.plan.advice.check_fits`).

    Matrices in a weight format are decoded in the fastest way that fits and leaves KV where it is.
    """
    *faster, least = ways_to_decode(inputs, MANY_CHUNKS + 1)
    plan = _plan_for(inputs, least)
    for decoding in faster:
        if decoding.at_load or plan.chunks > MANY_CHUNKS:
            roomier = _plan_for(inputs, decoding)
            if roomier.fits and roomier.kv == plan.kv:
                return roomier
    return plan


def _plan_for(inputs: PlanInputs, decoding: Decoding) -> Plan:
    notes: list[str] = []
    placement = replace(place(inputs.config.n_layers, inputs.settings), decoded=decoding.at_load)
    has_gpu = inputs.hardware.has_gpu
    if inputs.settings.embedding == "cpu" and not inputs.embedding_on_cpu:
        why = "it is the head too" if inputs.config.tied_embeddings else "mode full pages nothing"
        notes.append(f"--embedding cpu has no effect: {why}")
    if inputs.ranks > 1:
        notes.append(f"one of {inputs.ranks} ranks: each figure is its share")
    gpu_budget, cpu_budget = _budgets(inputs, notes)
    budget = gpu_budget if gpu_budget is not None else cpu_budget
    portions = portions_for(inputs, budget)
    on_gpu, on_cpu = gpu_lines(inputs, placement, portions, decoding), cpu_lines(inputs, placement)
    draft, beside = plan_draft(inputs, budget, decoding.scratch_bytes)
    on_gpu += beside
    # Passes over several nodes a row need all KV on the device: if that does not fit, the run does not.
    gpu_room = None if gpu_budget is None or inputs.verify_rows > 1 else gpu_budget - total(on_gpu)
    shared = 0 if has_gpu or gpu_budget is None else gpu_budget
    costs = KVCosts.of(inputs)
    kv = place_kv(inputs.kv_layout(portions.stretch_rows), gpu_room, cpu_budget - shared - total(on_cpu), costs)
    if inputs.kv_device is not None and not kv.disk:
        why = (
            "--verify-rows needs all KV on the device"
            if inputs.verify_rows > 1
            else "there is room for all KV above it"
        )
        notes.append(f"--kv-device is not used: {why}")
    moved = _bytes_per_pass(inputs, placement)
    half_way = inputs.shape.prefill_tokens // inputs.shape.batch + inputs.shape.new_tokens // 2
    moved["kv_h2d"] = kv_bytes_per_pass(kv, half_way, inputs.topk_blk)
    moved["kv_read"] = kv_device_bytes(kv, half_way, inputs.topk_blk)
    return Plan(
        inputs=inputs,
        placement=placement,
        kv=kv,
        chunk_tokens=portions.chunk_tokens,
        wave_rows=portions.wave_rows,
        gpu_lines=tuple(sorted(on_gpu + kv_gpu_lines(kv, costs), key=lambda line: line.kind)),
        cpu_lines=tuple(sorted(on_cpu + kv_cpu_lines(kv), key=lambda line: line.kind)),
        gpu_budget_bytes=gpu_budget,
        cpu_budget_bytes=cpu_budget,
        bytes_per_pass=moved,
        decoding=decoding,
        draft=draft,
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


def _bytes_per_pass(inputs: PlanInputs, placement: Placement) -> dict[str, int]:
    residency = placement.residency
    # Nothing moves where finished groups stay in their slots and there is a slot for each.
    kept = not inputs.settings.evict_finished and placement.gpu_slots >= residency.streamed_layers
    from_ssd = residency.ssd if placement.ssd_layers_a_pass and not kept else ()
    streamed = () if kept else (*residency.cpu, *residency.ssd)
    tied = inputs.config.tied_embeddings
    head = [tensor for tensor in inputs.layouts[None].tensors if tied or tensor.name != inputs.config.embedding]

    held = inputs if not placement.decoded else replace(inputs, layouts=decoded_layouts(inputs))
    return {
        "ssd_read": inputs.layers_bytes(from_ssd),
        "weight_h2d": inputs.layers_bytes(streamed),
        "hbm_read": held.layers_bytes(range(inputs.config.n_layers)) + sum(tensor.nbytes for tensor in head),
    }
