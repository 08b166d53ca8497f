"""Attention of nodes in Triton (flash decoding: Dao et al. 2023). Imported only where there is a CUDA device.

A program takes one node, one KV head and one split of the keys: some whole blocks before the root's, or the node's
window. The splits and the order in which they are added up follow from the width alone.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.nodes.tree import NodeBatch
from wsm.layout.kv import KV_BLOCK_TOKENS
from wsm.plan.memory import NODE_SPLITS

WARPS = 4
_TILE_BYTES = 1 << 14


@triton.jit
def split_kernel(
    q, keys, values, window, prefix, tops, sums, parts,
    nodes, q_stride, row_stride, head_stride, column_stride, split_tokens, scale,
    N_REP: tl.constexpr, REPS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What the query heads of a KV head attend to in one split: the largest score, the sum of the weights, and their
    values' sum ``parts [nodes, n_kv_heads, splits, REPS, DIMS]``; of a split beyond the row's keys the first alone.
    """
    node, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    in_window = split == tl.num_programs(2) - 1
    rep, dim = tl.arange(0, REPS), tl.arange(0, DIMS)
    windowed = tl.where(in_window, BLOCK, 0)
    begin = tl.where(in_window, 0, split * split_tokens)
    end = tl.where(in_window, BLOCK, tl.minimum(begin + split_tokens, tl.load(prefix + node // nodes).to(tl.int32)))
    at = (node // nodes).to(tl.int64) * row_stride + head.to(tl.int64) * head_stride
    window += node.to(tl.int64) * BLOCK
    given = (rep < N_REP)[:, None] & (dim < HEAD_DIM)[None, :]
    query = tl.load(q + node.to(tl.int64) * q_stride + (head * N_REP + rep)[:, None] * HEAD_DIM + dim, given, other=0)
    top = tl.full((REPS,), float("-inf"), tl.float32)
    total = tl.zeros((REPS,), tl.float32)
    out = tl.zeros((REPS, DIMS), tl.float32)
    for start in range(begin, end, TILE):
        place = start + tl.arange(0, TILE)
        column = tl.load(window + place, mask=place < windowed, other=-1)
        column = tl.where(in_window, column, place.to(tl.int64))
        shown = column >= 0
        inside = shown[:, None] & (dim < HEAD_DIM)[None, :]
        record = at + column[:, None] * column_stride + dim[None, :]
        key = tl.load(keys + record, mask=inside, other=0)
        value = tl.load(values + record, mask=inside, other=0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(shown[None, :], score, float("-inf"))
        now = tl.maximum(top, tl.max(score, 1))
        finite = tl.where(now == float("-inf"), 0.0, now)
        weight = tl.exp(score - finite[:, None])
        fades = tl.exp(top - finite)
        total = total * fades + tl.sum(weight, 1)
        out = out * fades[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        top = now
    mine = (node.to(tl.int64) * tl.num_programs(1) + head) * tl.num_programs(2) + split
    tl.store(tops + mine * REPS + rep, top)
    if end > begin:
        tl.store(sums + mine * REPS + rep, total)
        tl.store(parts + (mine * REPS + rep)[:, None] * DIMS + dim[None, :], out)


@triton.jit
def join_kernel(
    tops, sums, parts, out, splits,
    N_REP: tl.constexpr, REPS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The splits of a node and KV head, one after the other."""
    node, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rep, dim = tl.arange(0, REPS), tl.arange(0, DIMS)
    first = (node * tl.num_programs(1) + head) * splits
    top = tl.full((REPS,), float("-inf"), tl.float32)
    for split in range(splits):
        top = tl.maximum(top, tl.load(tops + (first + split) * REPS + rep))
    total = tl.zeros((REPS,), tl.float32)
    joined = tl.zeros((REPS, DIMS), tl.float32)
    for split in range(splits):
        mine = first + split
        own = tl.load(tops + mine * REPS + rep)
        has = own > float("-inf")
        share = tl.exp(own - top)
        total += share * tl.load(sums + mine * REPS + rep, mask=has, other=0)
        part = tl.load(parts + (mine * REPS + rep)[:, None] * DIMS + dim[None, :], mask=has[:, None], other=0)
        joined += share[:, None] * part
    kept = (rep < N_REP)[:, None] & (dim < HEAD_DIM)[None, :]
    into = out + ((node * tl.num_programs(1) + head) * N_REP + rep)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(into, (joined / total[:, None]).to(out.dtype.element_ty), mask=kept)


def attend(q: Tensor, keys: Tensor, values: Tensor, batch: NodeBatch) -> Tensor:
    """As :func:`llama.nodes.attention.attend_nodes`; keys and values are read where they lie, strided alike."""
    rows, nodes, n_heads, head_dim = q.shape
    n_kv_heads, width = keys.shape[1], keys.shape[2]
    n_rep = n_heads // n_kv_heads
    reps, dims = max(16, triton.next_power_of_2(n_rep)), max(16, triton.next_power_of_2(head_dim))
    blocks = triton.cdiv(width, KV_BLOCK_TOKENS)
    split_blocks = triton.cdiv(blocks, NODE_SPLITS)
    splits = triton.cdiv(blocks, split_blocks) + 1
    tops, sums = q.new_empty((2, rows * nodes, n_kv_heads, splits, reps), dtype=torch.float32)
    parts = q.new_empty((*tops.shape, dims), dtype=torch.float32)
    sizes = {"N_REP": n_rep, "REPS": reps, "HEAD_DIM": head_dim, "DIMS": dims}
    q = q if q.stride()[1:] == (q.stride(1), head_dim, 1) and q.stride(0) == nodes * q.stride(1) else q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    split_kernel[(rows * nodes, n_kv_heads, splits)](
        q, keys, values, batch.window.contiguous(), batch.prefix, tops, sums, parts,
        nodes, q.stride(1), keys.stride(0), keys.stride(1), keys.stride(2), split_blocks * KV_BLOCK_TOKENS,
        1 / math.sqrt(head_dim), **sizes, TILE=tile(dims, q.dtype), BLOCK=KV_BLOCK_TOKENS, num_warps=WARPS,
    )  # fmt: skip
    join_kernel[(rows * nodes, n_kv_heads)](tops, sums, parts, out, splits, **sizes, num_warps=WARPS)
    return out


def tile(dims: int, dtype: torch.dtype) -> int:
    """Keys that a program reads at once: so many that they are some 16 KiB."""
    return max(16, min(64, _TILE_BYTES // (dims * dtype.itemsize)))
