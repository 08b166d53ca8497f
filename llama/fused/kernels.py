"""The Triton kernels of the model's own passes: small ones that do in one go what torch does in several.

Imported only where there is a CUDA device. No result depends on the mode, on where rows stand, or on what stands beside
them; a launch depends on shapes alone, so that all can be captured in CUDA graphs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def rotary_kernel(
    heads, freqs, window, places, positions,
    rotated, queries, kv_heads, token_stride, row_stride, head_stride, position_stride,
    DIM: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token: the first ``rotated`` are turned in place, in float32 and rounded once. With WRITE keys
    and values, the heads from ``queries`` on, also go into their token's place in the ``window`` of the KV cache."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    every = queries + 2 * kv_heads if WRITE else rotated
    col, pair = tl.arange(0, 2 * PAIRS)[None, :], tl.arange(0, PAIRS)
    inside = (head < every) & (col < DIM)
    at = heads + token * token_stride + head * DIM + col
    x = tl.load(at, mask=inside, other=0)
    turn = freqs + token * DIM + 2 * pair
    cosine = tl.load(turn, mask=2 * pair < DIM, other=0)[None, :]
    sine = tl.load(turn + 1, mask=2 * pair < DIM, other=0)[None, :]
    even, odd = tl.split(x.to(tl.float32).reshape(HEADS, PAIRS, 2))
    turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine).reshape(HEADS, 2 * PAIRS)
    found = tl.where(head < rotated, turned.to(x.dtype), x)
    tl.store(at, found, mask=inside & (head < rotated))
    if WRITE:
        new = head - queries
        is_value = new >= kv_heads
        row, position = tl.load(places + token), tl.load(positions + token)
        into = window + row * row_stride + tl.where(is_value, new - kv_heads, new).to(tl.int64) * head_stride
        tl.store(into + position * position_stride + tl.where(is_value, DIM, 0) + col, found, mask=inside & (new >= 0))


@triton.jit
def norm_kernel(x, part, weight, out, dim, x_stride, eps, COLS: tl.constexpr, ADDED: tl.constexpr):
    """The root-mean-square norm of one row of at most COLS values, in float32 and rounded once. ADDED: of ``x + part``,
    rounded, which takes the place of ``x``."""
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, COLS)
    inside = col < dim
    wide = tl.load(x + row * x_stride + col, mask=inside, other=0).to(tl.float32)
    if ADDED:
        both = (wide + tl.load(part + row * dim + col, mask=inside, other=0).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + row * x_stride + col, both, mask=inside)
        wide = both.to(tl.float32)
    gain = tl.load(weight + col, mask=inside, other=0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / dim + eps)
    tl.store(out + row * dim + col, (wide * scale * gain).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated(gate, up, LIBRARY: tl.constexpr):
    """``silu(gate) * up`` with the bits of torch's two operations: each is rounded.

    ``tl.exp`` and a plain division are less exact than torch's; the interpreter has no LIBRARY of the device.
    """
    wide = gate.to(tl.float32)
    faded = libdevice.exp(-wide) if LIBRARY else tl.exp(-wide)
    silu = tl.div_rn(wide, 1.0 + faded).to(gate.dtype)
    return (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def gate_kernel(gate, up, count, TILE: tl.constexpr, LIBRARY: tl.constexpr):
    """``silu(gate) * up`` into ``gate``."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < count
    x, y = tl.load(gate + at, mask=inside, other=0), tl.load(up + at, mask=inside, other=0)
    tl.store(gate + at, gated(x, y, LIBRARY), mask=inside)


@triton.jit
def read_once(at, inside, EVEN: tl.constexpr):
    """Weights as float32: they leave the cache first."""
    if EVEN:
        found = tl.load(at, eviction_policy="evict_first")
    else:
        found = tl.load(at, mask=inside, other=0, eviction_policy="evict_first")
    return found.to(tl.float32)


@triton.jit
def row_product_kernel(
    x, weight, second, residual, out, rows, cols,
    GATED: tl.constexpr, ADDED: tl.constexpr, EVEN: tl.constexpr, LIBRARY: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row ``x`` times ROWS rows of ``weight``, summed in float32 and rounded once.

    GATED: ``silu(x weight^T) * (x second^T)``, each step rounded; ADDED: on top of ``residual``.
    """
    TO: tl.constexpr = out.dtype.element_ty
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, STEP)
    apart = row.to(tl.int64)[:, None] * cols + col[None, :]
    total = tl.zeros((ROWS, STEP), dtype=tl.float32)
    other = tl.zeros((ROWS, STEP), dtype=tl.float32)
    for begin in tl.range(0, cols, STEP, num_stages=STAGES):
        known = begin + col < cols
        inside = (row < rows)[:, None] & known[None, :]
        values = tl.load(x + begin + col, mask=known, other=0).to(tl.float32)[None, :]
        total += read_once(weight + apart + begin, inside, EVEN) * values
        if GATED:
            other += read_once(second + apart + begin, inside, EVEN) * values
    found = tl.sum(total, axis=1)
    if GATED:
        found = gated(found.to(TO), tl.sum(other, axis=1).to(TO), LIBRARY)
    if ADDED:
        found += tl.load(residual + row, mask=row < rows, other=0).to(tl.float32)
    tl.store(out + row, found.to(TO), mask=row < rows)


@triton.jit
def last_to_arrive(arrivals, place, splits):
    """Whether all other splits of ``place`` have left their part; then the counter stands at 0 again."""
    tl.debug_barrier()
    last = tl.atomic_add(arrivals + place, 1, sem="acq_rel") == splits - 1
    if last:
        tl.store(arrivals + place, 0)
    return last


@triton.jit
def no_keys(SHARED: tl.constexpr, COLS: tl.constexpr):
    """A softmax over no keys yet: of each query head the largest score, the sum of weights, and of weighted values."""
    largest = tl.full((SHARED,), float("-inf"), dtype=tl.float32)
    return largest, tl.zeros((SHARED,), dtype=tl.float32), tl.zeros((SHARED, COLS), dtype=tl.float32)


@triton.jit
def joined(largest, weights, total, its_largest, its_weights, its_total):
    """A softmax over two sets of keys from those of each. A set without any key to be seen weighs nothing."""
    top = tl.maximum(largest, its_largest)
    least = tl.where(top == float("-inf"), 0.0, top)
    faded, its = tl.exp(largest - least), tl.exp(its_largest - least)
    return top, weights * faded + its_weights * its, total * faded[:, None] + its_total * its[:, None]


@triton.jit
def attention_kernel(
    q, keys, values, mask, out, parts, facts, arrivals,
    scale, tokens, kv_heads, q_stride, row_stride, head_stride, position_stride, mask_stride, splits,
    SHARED: tl.constexpr, REP: tl.constexpr, DIM: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """WIDTH keys of one row and KV head, for the REP query heads that share them (Dao et al. 2023, "Flash-Decoding").

    Blocks that the mask hides are not read. Each split leaves its sum of values in ``parts`` (float32 ``[row and head,
    split, SHARED, COLS]``), in ``facts`` its largest score and its sum of weights; the last one joins them, in order.
    """
    TO: tl.constexpr = q.dtype.element_ty
    both, split = tl.program_id(0), tl.program_id(1)
    row, head = (both // kv_heads).to(tl.int64), both % kv_heads
    shared, col = tl.arange(0, SHARED), tl.arange(0, COLS)
    real = (shared < REP)[:, None] & (col < DIM)[None, :]
    queries = tl.load(q + row * q_stride + (head * REP + shared)[:, None] * DIM + col[None, :], mask=real, other=0)
    start = row * row_stride + head.to(tl.int64) * head_stride
    largest, weights, total = no_keys(SHARED, COLS)
    for begin in range(split * WIDTH, tl.minimum(split * WIDTH + WIDTH, tokens), BLOCK):
        token = begin + tl.arange(0, BLOCK)
        hidden = tl.load(mask + row * mask_stride + token, mask=token < tokens, other=float("-inf")).to(tl.float32)
        if tl.max(hidden, axis=0) > float("-inf"):
            inside = (token < tokens)[:, None] & (col < DIM)[None, :]
            at = start + token.to(tl.int64)[:, None] * position_stride + col[None, :]
            key = tl.load(keys + at, mask=inside, other=0)
            value = tl.load(values + at, mask=inside, other=0)
            scores = tl.dot(queries, tl.trans(key)) * scale + hidden[None, :]
            highest = tl.max(scores, axis=1)
            weight = tl.exp(scores - highest[:, None])
            found = tl.dot(weight.to(TO), value)
            largest, weights, total = joined(largest, weights, total, highest, tl.sum(weight, axis=1), found)
    if SPLIT:
        place = both.to(tl.int64) * splits
        left = parts + place * SHARED * COLS + shared[:, None] * COLS + col[None, :]
        told = facts + place * SHARED * 2 + shared
        tl.store(left + split * SHARED * COLS, total)
        tl.store(told + split * SHARED * 2, largest)
        tl.store(told + split * SHARED * 2 + SHARED, weights)
        if last_to_arrive(arrivals, both, splits):
            largest, weights, total = no_keys(SHARED, COLS)
            for other in range(splits):
                part = tl.load(left + other * SHARED * COLS, cache_modifier=".cg")
                its_largest = tl.load(told + other * SHARED * 2, cache_modifier=".cg")
                its_weights = tl.load(told + other * SHARED * 2 + SHARED, cache_modifier=".cg")
                largest, weights, total = joined(largest, weights, total, its_largest, its_weights, part)
            store_heads(out, row * kv_heads + head, total / weights[:, None], real, TO, REP, DIM, SHARED, COLS)
    else:
        store_heads(out, row * kv_heads + head, total / weights[:, None], real, TO, REP, DIM, SHARED, COLS)


@triton.jit
def store_heads(
    out, both, found, real, TO: tl.constexpr, REP: tl.constexpr, DIM: tl.constexpr, SHARED: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    shared, col = tl.arange(0, SHARED), tl.arange(0, COLS)
    tl.store(out + (both * REP + shared[:, None]) * DIM + col[None, :], found.to(TO), mask=real)
