"""What a run takes of memory, line by line, besides KV."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from enum import IntEnum
from typing import NamedTuple

from wsm.layout.groups import BLOCK, KINDS, GroupId, bytes_apart, counted, round_up
from wsm.layout.kv import KV_BLOCK_TOKENS, WINDOWS
from wsm.layout.model import ModelShape
from wsm.plan.decoding import NOTHING_DECODED, Decoding, decoded_layouts, decoding_extra_bytes
from wsm.plan.hardware import MIB
from wsm.plan.inputs import PlanInputs
from wsm.plan.placement import Placement, cpu_home_bytes

MOST_CHUNK_TOKENS, FEWEST_CHUNK_TOKENS = 2048, 16
WORKSPACE_BYTES = 64 * MIB
"""What cuBLAS and the attention kernels keep for themselves in torch's allocator."""
NODE_SPLITS = 16
"""Of a row's KV blocks (``llama.nodes.kernels``): enough programs for a few nodes, little to add up for many."""
DECODE_KEYS, DECODE_SPLITS = 64, 64
"""Of one query a row (``llama.fused.launch``): keys that are read at once, and splits of a row's keys at most."""
SAMPLED_AT_ONCE = 16
"""Rows that are sampled together (``llama.sampling``)."""
SORTED_BYTES, SCRATCH_BYTES = 54, 16
"""Bytes per logit while it is sampled: sorting and sums in whole numbers; and a sort's scratch on a GPU."""


MemoryKind = IntEnum(
    "MemoryKind",
    "WEIGHTS POOLS GLOBALS LOADING_TENSOR LOADING SCRATCH KV KV_WINDOWS KV_BOUNDS KV_DISK "
    "DRAFT ACTIVATIONS GRAPHS CONTEXT WORKSPACE SLACK",
)
"""What takes memory, in the order in which it is shown; LOADING_TENSOR alone of the CPU's is ordinary memory."""


class MemoryLine(NamedTuple):
    """One thing that takes memory; ``name`` says so to people."""

    kind: MemoryKind
    name: str
    nbytes: int


def total(lines: Iterable[MemoryLine]) -> int:
    """Bytes of all lines together."""
    return sum(line.nbytes for line in lines)


class Portions(NamedTuple):
    """Tokens per chunk, rows whose KV is moved together, and rows per wave, in whole stretches."""

    chunk_tokens: int
    stretch_rows: int
    wave_rows: int

    def wave_tokens(self, inputs: PlanInputs) -> int:
        """The most prompt tokens of a wave."""
        return min(inputs.shape.prefill_tokens, self.wave_rows * inputs.shape.prompt_tokens)


def portions_for(inputs: PlanInputs, budget: int) -> Portions:
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
    stretch = inputs.micro_batch or min(rows, steady // 8 // (WINDOWS * inputs.kv_layout(1).row_bytes))
    stretch = max(1, min(shape.batch, stretch))
    return Portions(chunk, stretch, max(stretch, rows - rows % stretch) if rows < shape.batch else shape.batch)


def chunk_bytes(config: ModelShape, tokens: int, itemsize: int) -> int:
    """The most that is alive besides the residual while a chunk of ``tokens`` is computed (see ``llama.model``).

    The largest of: a norm (three of them in float32, where it is not one kernel); queries, keys and values beside
    their input, RoPE's float32 copy of queries and keys, or the output; both branches of the feed-forward block beside
    their input.
    """
    dim, q_dim, kv_dim = config.dim, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    norm = 3 * 4 * dim
    wide = 4 * (q_dim + kv_dim) if itemsize < 4 else 0
    attention = (q_dim + 2 * kv_dim) * itemsize + max(dim * itemsize, wide, q_dim * itemsize)
    feed_forward = (dim + 2 * config.ffn_dim) * itemsize
    return tokens * max(norm, attention, feed_forward)


def activation_bytes(inputs: PlanInputs, portions: Portions) -> int:
    """An upper bound of the activations: what a whole wave keeps, and the largest of a chunk, the head and sampling."""
    config, itemsize, rows = inputs.config, inputs.dtype.itemsize, inputs.nodes
    tokens = max(portions.wave_tokens(inputs), rows)
    chunk = max(min(portions.chunk_tokens, tokens), inputs.nodes if inputs.verify_rows > 1 else 0)
    logits = rows * config.vocab_size * 4
    # The residual, the rotations of its positions (complex64), token ids and positions; and the rotary table.
    kept = tokens * (config.dim * itemsize + 4 * config.head_dim + 16) + 4 * config.head_dim * inputs.kv_tokens
    head = 2 * logits + min(chunk, rows) * (config.vocab_size * itemsize + 8 * config.dim)
    each = SORTED_BYTES + (SCRATCH_BYTES if inputs.hardware.has_gpu else 0)
    sampling = logits + min(rows, SAMPLED_AT_ONCE) * config.vocab_size * each
    computing = chunk_bytes(config, chunk, itemsize) + _attention_extra(inputs, portions, chunk) + logits
    decoding = chunk_bytes(config, min(chunk, rows), itemsize) + _decode_extra(inputs, portions) + logits
    return kept + max(computing, decoding, head, sampling)


def _attention_extra(inputs: PlanInputs, portions: Portions, chunk: int) -> int:
    """What attention needs besides its inputs and output, where the kernel is not flash attention alone."""
    itemsize, longest = inputs.dtype.itemsize, inputs.shape.prompt_tokens
    padding = _mask_bytes(inputs) + _node_bytes(inputs)
    if inputs.hardware.has_gpu:
        repeated = 2 * inputs.config.n_heads * inputs.config.head_dim * longest * itemsize if itemsize == 4 else 0
        return max(padding, repeated)
    goes_on = portions.wave_tokens(inputs) > chunk  # a row may be cut: its later part needs a mask of its own
    return max(padding, 12 * min(chunk, longest) * longest if goes_on else 0)


def _mask_bytes(inputs: PlanInputs) -> int:
    """The mask of a decode pass, and the comparison that it is made from."""
    return inputs.shape.batch * inputs.kv_tokens * (1 + 2 * inputs.dtype.itemsize)


def _decode_extra(inputs: PlanInputs, portions: Portions) -> int:
    """What attention of one query a row needs, where that is what a decode pass does."""
    config = inputs.config
    if not inputs.hardware.has_gpu or inputs.dtype.itemsize != 2 or inputs.verify_rows > 1:
        return _mask_bytes(inputs)
    rows = min(portions.chunk_tokens, portions.stretch_rows)
    return _mask_bytes(inputs) + decode_split_bytes(
        rows, config.n_heads, config.n_kv_heads, config.head_dim, inputs.kv_tokens
    )


def decode_split_bytes(rows: int, n_heads: int, n_kv_heads: int, head_dim: int, tokens: int) -> int:
    """At most: each split of up to so many ``tokens`` leaves its sums of values, its largest score and its sum of
    weights, in float32 and of at least 16 query heads a KV head."""
    splits = min(-(-tokens // DECODE_KEYS), DECODE_SPLITS)
    shared, cols = (max(16, 1 << (n - 1).bit_length()) for n in (n_heads // n_kv_heads, head_dim))
    return rows * n_kv_heads * splits * shared * (cols + 2) * 4 if splits > 1 else 0


def _node_bytes(inputs: PlanInputs) -> int:
    """What passes over several nodes a row need: their windows, and the KV that is moved of those that are accepted."""
    if inputs.verify_rows == 1:
        return 0
    config, nodes = inputs.config, inputs.nodes
    window = nodes * KV_BLOCK_TOKENS * 8 * 3 + 8 * nodes * inputs.verify_rows * 4
    # On the CPU a KV head's scores and keys are in float32, a row at a time.
    per_row = inputs.verify_rows * (config.n_heads // config.n_kv_heads) * 4 * (inputs.kv_tokens + KV_BLOCK_TOKENS) * 4
    keys = 8 * config.head_dim * (inputs.kv_tokens + inputs.verify_rows * KV_BLOCK_TOKENS)
    # On a GPU each split of the keys leaves its sums, of at least 16 query heads a KV head.
    splits = min(inputs.kv_tokens // KV_BLOCK_TOKENS, NODE_SPLITS) + 1
    tile = max(16, config.n_heads // config.n_kv_heads) * (1 << (config.head_dim - 1).bit_length()) * 4
    computing = nodes * config.n_kv_heads * splits * tile if inputs.hardware.has_gpu else per_row + keys
    return window + 2 * nodes * inputs.kv_token_bytes + computing


def gpu_lines(
    inputs: PlanInputs, placement: Placement, portions: Portions, decoding: Decoding = NOTHING_DECODED
) -> list[MemoryLine]:
    """What a run takes of the GPU, but for KV."""
    residents, layer, chunk = len(placement.residency.gpu), inputs.slot_bytes(), portions.chunk_tokens
    held = inputs if not decoding.at_load else replace(inputs, layouts=decoded_layouts(inputs))
    converted = _converted_kv(inputs, portions)
    # The model takes queries, keys and values in one product: where their matrices are apart, it copies them first.
    images, fused = [layout for layout, _ in counted(inputs.layouts)], inputs.config.fused
    copied = 0 if placement.mode == "full" else max(bytes_apart(layout, fused) for layout in images)
    # Logits of the whole vocabulary, and what gathering and sampling them takes, beyond one rank's share of both.
    rows, elsewhere = inputs.nodes, inputs.config.vocab_size * (inputs.ranks - 1)
    gathered = 4 * 4 * rows * elsewhere + min(rows, SAMPLED_AT_ONCE) * elsewhere * (SORTED_BYTES + SCRATCH_BYTES)
    activations = activation_bytes(inputs, portions) + copied + gathered + converted + decoding_extra_bytes(inputs)
    embedding = "" if inputs.embedding_on_cpu else "embedding, "
    computing = f"activations, {portions.wave_tokens(inputs)} tokens in chunks of {chunk}"
    lines = [
        MemoryLine(
            MemoryKind.WEIGHTS,
            f"weights resident, {residents} layers",
            held.layers_bytes(placement.residency.gpu),
        ),
        MemoryLine(MemoryKind.POOLS, f"pools, {placement.gpu_slots} slots a kind", placement.gpu_slots * layer),
        MemoryLine(MemoryKind.GLOBALS, f"{embedding}final norm and head", inputs.gpu_globals_bytes),
        MemoryLine(MemoryKind.ACTIVATIONS, computing, activations),
    ]
    if decoding.at_load:
        staged = max(map(inputs.kind_bytes, KINDS))
        lines.append(MemoryLine(MemoryKind.LOADING, "a group to be decoded, freed after loading", staged))
    if decoding.scratch_bytes:
        lines.append(MemoryLine(MemoryKind.SCRATCH, "scratch for decoded matrices", decoding.scratch_bytes))
    if not inputs.hardware.has_gpu:
        return lines
    if placement.mode in ("full", "preload"):
        graphs = chunk_bytes(inputs.config, inputs.shape.batch, inputs.dtype.itemsize) + converted
        graphs += _decode_extra(inputs, portions)
        lines.append(MemoryLine(MemoryKind.GRAPHS, "decode graphs", graphs))
    slack = _rounding(held, placement) + activations // 8 + 32 * MIB
    return [
        *lines,
        MemoryLine(MemoryKind.CONTEXT, "CUDA context and kernels", inputs.hardware.gpu_context_bytes),
        MemoryLine(MemoryKind.WORKSPACE, "library workspaces", WORKSPACE_BYTES),
        MemoryLine(MemoryKind.SLACK, "allocator slack", slack),
    ]


def _converted_kv(inputs: PlanInputs, portions: Portions) -> int:
    """Keys and values in the model's dtype, where they are stored in another."""
    if inputs.kv_record_bytes in (None, inputs.plain_record_bytes):
        return 0
    values = 2 * inputs.config.n_kv_heads * inputs.kv_tokens * inputs.config.head_dim
    return portions.stretch_rows * values * (inputs.dtype.itemsize if inputs.hardware.has_gpu else 8)


def allocator_bytes(nbytes: int) -> int:
    """What torch's CUDA allocator takes for a tensor: from 10 MiB on whole 2 MiB."""
    return nbytes if nbytes < 10 * MIB else round_up(nbytes, 2 * MIB)


def _rounding(inputs: PlanInputs, placement: Placement) -> int:
    """What torch's allocator adds to weights and slots."""
    if placement.mode == "full" and not inputs.in_format:
        taken = [tensor.nbytes for layout in inputs.layouts.values() for tensor in layout.tensors]
    else:
        homes = [inputs.layouts[GroupId(layer, kind)].nbytes for layer in placement.residency.gpu for kind in KINDS]
        taken = [*homes, *[*map(inputs.kind_bytes, KINDS)] * placement.gpu_slots, inputs.gpu_globals_bytes]
    return sum(allocator_bytes(nbytes) - nbytes for nbytes in taken)


def cpu_lines(inputs: PlanInputs, placement: Placement) -> list[MemoryLine]:
    """What a run takes of the CPU's memory, but for KV."""
    if placement.mode == "full" and inputs.in_format:
        largest = max(layout.nbytes for layout in inputs.layouts.values())
        return [MemoryLine(MemoryKind.LOADING_TENSOR, "loading, one group at a time", largest)]
    if placement.mode == "full":
        largest = max(tensor.nbytes for layout in inputs.layouts.values() for tensor in layout.tensors)
        line = MemoryLine(MemoryKind.LOADING_TENSOR, "loading, one tensor at a time", largest)
        return [line] if inputs.hardware.has_gpu else []
    layer, residents = inputs.slot_bytes(), len(placement.residency.cpu)
    homes = sum(cpu_home_bytes(placement, inputs.layouts).values())
    lines = [
        MemoryLine(MemoryKind.WEIGHTS, f"weights resident, {residents} layers", homes),
        MemoryLine(MemoryKind.POOLS, f"pools, {placement.cpu_slots} slots a kind", placement.cpu_slots * layer),
    ]
    if inputs.embedding_on_cpu:
        lines.append(MemoryLine(MemoryKind.GLOBALS, "embedding", round_up(inputs.embedding_bytes, BLOCK)))
    # GPU residents come through the CPU layers' memory, or through slots of their own where there is too little; the
    # globals through any memory that is large enough, or through a buffer of their own.
    image, loading = inputs.layouts[None].nbytes, placement.loading_slots * layer
    loading += image if image > max(loading, homes + placement.cpu_slots * layer) else 0
    if loading:
        lines.append(MemoryLine(MemoryKind.LOADING, "loading buffers, freed after loading", loading))
    return lines
