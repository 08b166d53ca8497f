"""GGUF's block types in Triton: decoding, and the packed product. Imported only where there is a CUDA device.

All blocks are of an even number of bytes: they are read as pairs of bytes, int16, which hold the codes of neighbours. A
part is a block of 32 weights, or a quarter of one of 256, which is 64 weights. A pair of its codes gives the values of
two neighbours in the low bits of its bytes, and of two more, APART pairs further on, in the high ones; but in ``q8_0``,
whose codes fill the bytes. A type is known by its SIZE, the pairs of bytes of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsm.formats.format import MOST_ROWS
from wsm.formats.kernels import DecodeTuning, joined, triton_type
from wsm.formats.product_kernels import ProductTuning, arrivals_on, put, splits_of

BLOCKS = DecodeTuning(4096, 8)
"""Its tile is in pairs of values."""
PRODUCT = ProductTuning(rows=32, warps=4, stages=3, programs=264, steps=2)
"""A step is 256 inputs."""
_SIZES = {"q4_0": 9, "q4_1": 10, "q5_0": 11, "q5_1": 12, "q8_0": 17, "q4_K": 72, "q5_K": 88, "q6_K": 105}


@triton.jit
def blocks_kernel(blocks, out, count, SIZE: tl.constexpr, TILE: tl.constexpr, TO: tl.constexpr):
    """TILE of ``count`` parts: ``blocks`` int16, ``out`` as pairs of TO in one integer."""
    PARTS: tl.constexpr = 4 if SIZE > 64 else 1
    PAIRS: tl.constexpr = 16 if SIZE > 16 else 8
    first = tl.program_id(0).to(tl.int64) * TILE  # whole blocks
    part, pair = tl.arange(0, TILE), tl.max_contiguous(tl.arange(0, PAIRS), 4)
    known = first + part < count
    start = blocks + (first // PARTS) * SIZE + (part // PARTS) * SIZE
    low0, low1, high0, high1 = values(start, part % PARTS, pair, known, SIZE)
    to = out + first * (32 if SIZE > 64 else 16) + place_of(part, SIZE)[:, None] + pair[None, :]
    inside = known[:, None] & (pair < PAIRS)[None, :]
    tl.store(to, joined(low0, low1, TO), mask=inside)
    if SIZE != 17:
        tl.store(to + apart(SIZE), joined(high0, high1, TO), mask=inside)


@triton.jit
def apart(SIZE: tl.constexpr):
    """Pairs of values from those of the low bits to those of the high ones."""
    APART: tl.constexpr = 32 if SIZE == 105 else (16 if SIZE > 64 else 8)
    return APART


@triton.jit
def place_of(part, SIZE: tl.constexpr):
    """Which pair of values is the first of a part."""
    if SIZE == 105:
        return part // 2 * 64 + part % 2 * 16
    else:  # noqa: RET505 (Triton compiles what follows an if, whatever it returns)
        return part * (32 if SIZE > 64 else 16)


@triton.jit
def values(start, quarter, pair, known, SIZE: tl.constexpr):
    """Four float32 ``[parts, pairs]``, the two of the low bits first, of the blocks at ``start [parts]``; where a part
    is not ``known``, 0."""
    inside = known[:, None] & (pair >= 0)[None, :]
    if SIZE == 105:
        return q6_k_values(start, quarter, pair, known, inside)
    elif SIZE > 64:  # noqa: RET505
        return grouped_values(start, quarter, pair, known, inside, SIZE)
    else:
        return small_values(start, pair, known, inside, SIZE)


@triton.jit
def small_values(start, pair, known, inside, SIZE: tl.constexpr):
    """Of 32 weights: the scale, a min (``_1``), a fifth bit of each weight (``q5``), the codes."""
    PAIRS: tl.constexpr = 16 if SIZE == 17 else 8
    scale = half_at(start, known)[:, None]
    code = tl.load(start[:, None] + (SIZE - PAIRS) + pair[None, :], mask=inside, other=0).to(tl.int32)
    if SIZE == 17:
        first, second = signed_first(code) * scale, signed_second(code) * scale
        return first, second, first, second
    low, high = code & 0x0F0F, (code >> 4) & 0x0F0F
    if SIZE > 10:
        low |= fifth_bits(start + (SIZE - 10), pair, known)
        high |= fifth_bits(start + (SIZE - 9), pair, known)
    if SIZE % 2 == 0:
        least = half_at(start + 1, known)[:, None]
        return (
            first_of(low) * scale + least, second_of(low) * scale + least,
            first_of(high) * scale + least, second_of(high) * scale + least,
        )  # fmt: skip
    else:  # noqa: RET505
        zero: tl.constexpr = 16 if SIZE > 10 else 8
        return (
            (first_of(low) - zero) * scale, (second_of(low) - zero) * scale,
            (first_of(high) - zero) * scale, (second_of(high) - zero) * scale,
        )  # fmt: skip


@triton.jit
def grouped_values(start, quarter, pair, known, inside, SIZE: tl.constexpr):
    """Of ``q4_K`` and ``q5_K``: scale and min, 12 bytes of the groups' own, ``q5_K``'s fifth bits, the codes. The low
    codes of a quarter are a group, the high ones the next."""
    # Of both groups at once, in two bytes: 6 bits as they are; of the last four 4 bits, and the two that others left.
    one = tl.load(start + 2 + quarter, mask=known, other=0).to(tl.int32)
    two = tl.load(start + 4 + quarter, mask=known, other=0).to(tl.int32)
    left = tl.load(start + 2 + quarter % 2, mask=known, other=0).to(tl.int32)
    scales = tl.where(quarter < 2, one & 0x3F3F, (two & 0x0F0F) | ((left >> 2) & 0x3030))
    mins = tl.where(quarter < 2, two & 0x3F3F, ((two >> 4) & 0x0F0F) | ((one >> 2) & 0x3030))
    scale, least = half_at(start, known), half_at(start + 1, known)
    low_scale, high_scale = (first_of(scales) * scale)[:, None], (second_of(scales) * scale)[:, None]
    low_min, high_min = (first_of(mins) * least)[:, None], (second_of(mins) * least)[:, None]
    at = start[:, None] + (SIZE - 64) + (quarter * 16)[:, None] + pair[None, :]
    code = tl.load(at, mask=inside, other=0).to(tl.int32)
    low, high = code & 0x0F0F, (code >> 4) & 0x0F0F
    if SIZE == 88:
        fifth = tl.load(start[:, None] + 8 + pair[None, :], mask=inside, other=0).to(tl.int32) >> (2 * quarter)[:, None]
        low |= (fifth << 4) & 0x1010
        high |= (fifth << 3) & 0x1010
    return (
        first_of(low) * low_scale - low_min, second_of(low) * low_scale - low_min,
        first_of(high) * high_scale - high_min, second_of(high) * high_scale - high_min,
    )  # fmt: skip


@triton.jit
def q6_k_values(start, quarter, pair, known, inside):
    """The low codes, two high bits of each weight, a scale of each 16 weights, the block's. Two quarters are a half,
    and low and high codes of a quarter 32 weights each: two scales, which are a pair of bytes."""
    half, odd = quarter // 2, quarter % 2
    scale = half_at(start + 104, known)[:, None]
    of_low = tl.load(start + 96 + half * 4 + odd, mask=known, other=0).to(tl.int32)[:, None]
    of_high = tl.load(start + 98 + half * 4 + odd, mask=known, other=0).to(tl.int32)[:, None]
    code = tl.load(start[:, None] + (quarter * 16)[:, None] + pair[None, :], mask=inside, other=0).to(tl.int32)
    above = tl.load(start[:, None] + 64 + (half * 16)[:, None] + pair[None, :], mask=inside, other=0).to(tl.int32)
    above = above >> (2 * odd)[:, None]
    low, high = (code & 0x0F0F) | ((above << 4) & 0x3030), ((code >> 4) & 0x0F0F) | (above & 0x3030)
    begins = (pair < 8)[None, :]
    low_scale = tl.where(begins, signed_first(of_low) * scale, signed_second(of_low) * scale)
    high_scale = tl.where(begins, signed_first(of_high) * scale, signed_second(of_high) * scale)
    return (
        (first_of(low) - 32) * low_scale, (second_of(low) - 32) * low_scale,
        (first_of(high) - 32) * high_scale, (second_of(high) - 32) * high_scale,
    )  # fmt: skip


@triton.jit
def half_at(at, known):
    """The float16 there, as float32."""
    return tl.load(at, mask=known, other=0).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def fifth_bits(at, pair, known):
    """The fifth bits of both codes of each pair, int32 ``[parts, pairs]``, of the 16 bits there."""
    mine = tl.load(at, mask=known, other=0).to(tl.int32)[:, None] >> (2 * pair)[None, :]
    return ((mine & 1) << 4) | ((mine & 2) << 11)


@triton.jit
def first_of(codes):
    """What is in the low byte, float32."""
    return (codes & 0xFF).to(tl.float32)


@triton.jit
def second_of(codes):
    """What is in the byte above, float32."""
    return ((codes >> 8) & 0xFF).to(tl.float32)


@triton.jit
def signed_first(codes):
    """As :func:`first_of`, of int8."""
    return ((codes << 24) >> 24).to(tl.float32)


@triton.jit
def signed_second(codes):
    """As :func:`second_of`, of int8."""
    return (codes >> 8).to(tl.float32)


def decode_blocks_(name: str, blocks: Tensor, out: Tensor) -> None:
    """Blocks of the type ``name``, at an even address, into ``out``, at that of a pair of values."""
    size = _SIZES[name]
    pairs = 32 if size > 64 else 16  # of a part
    count, tile = out.numel() // (2 * pairs), BLOCKS.tile // pairs
    blocks_kernel[(triton.cdiv(count, tile),)](
        blocks.view(-1).view(torch.int16),
        out.view(-1).view(torch.int64 if out.dtype == torch.float32 else torch.int32),
        count, SIZE=size, TILE=tile, TO=triton_type(out.dtype), num_warps=BLOCKS.warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n"])  # one binary for all numbers of rows: the same bits
def blocks_product_kernel(
    x, blocks, out, parts, arrivals, n, rows, cols, row_pairs, x_stride, out_stride, steps, splits,
    SIZE: tl.constexpr, SPLIT: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Products with ROWS rows over the inputs of one split, with the values that decoding gives, 256 inputs a step.

    Values of low and of high bits, first and second, are four matrices; of ``x`` are taken the columns of each.
    """
    TO: tl.constexpr = x.dtype.element_ty
    PARTS: tl.constexpr = 4 if SIZE > 64 else 8
    PAIRS: tl.constexpr = 16 if SIZE > 16 else 8
    K: tl.constexpr = PARTS * PAIRS
    STEP: tl.constexpr = 256
    line, part = tl.arange(0, ROWS * PARTS) // PARTS + tl.program_id(0) * ROWS, tl.arange(0, ROWS * PARTS) % PARTS
    pair, place, at = tl.max_contiguous(tl.arange(0, PAIRS), 4), tl.arange(0, N), tl.arange(0, 2 * K)
    col = 2 * place_of(at // (2 * PAIRS), SIZE) + at % (2 * PAIRS)
    begin = blocks + line.to(tl.int64) * row_pairs
    total = tl.zeros((N, ROWS), dtype=tl.float32)
    first = tl.program_id(1) * steps
    for step in range(first, tl.minimum(first + steps, tl.cdiv(cols, STEP))):
        known = (line < rows) & (step * STEP + part * (STEP // PARTS) < cols)
        start = begin + (step * SIZE if SIZE > 64 else (step * PARTS + part) * SIZE)
        low0, low1, high0, high1 = values(start, part if SIZE > 64 else part * 0, pair, known, SIZE)
        given = (place < n)[:, None] & (step * STEP + col < cols)[None, :]
        xs = x + place[:, None] * x_stride + step * STEP + col[None, :]
        x0, x1 = tl.split(tl.load(xs, mask=given, other=0).reshape(N, K, 2))
        total = tl.dot(x0, tl.trans(low0.to(TO).reshape(ROWS, K)), total)
        total = tl.dot(x1, tl.trans(low1.to(TO).reshape(ROWS, K)), total)
        if SIZE != 17:
            x0, x1 = tl.split(tl.load(xs + 2 * apart(SIZE), mask=given, other=0).reshape(N, K, 2))
            total = tl.dot(x0, tl.trans(high0.to(TO).reshape(ROWS, K)), total)
            total = tl.dot(x1, tl.trans(high1.to(TO).reshape(ROWS, K)), total)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    put(total, out, parts, arrivals, place, row, n, rows, out_stride, splits, SPLIT)


def multiply_blocks_(name: str, x: Tensor, blocks: Tensor, out: Tensor) -> None:
    """``x weight^T`` into ``out [n, rows]``, as ``multiply_`` of the other product."""
    (n, cols), rows, steps = x.shape, blocks.shape[0], triton.cdiv(x.shape[1], 256)
    programs = triton.cdiv(rows, PRODUCT.rows)
    splits = splits_of(PRODUCT, programs, steps)
    parts = out if splits == 1 else x.new_empty((splits, n, rows), dtype=torch.float32)
    blocks_product_kernel[(programs, splits)](
        x, blocks.view(torch.int16), out, parts, arrivals_on(x.device),
        n, rows, cols, blocks.shape[1] // 2, x.stride(0), out.stride(0), triton.cdiv(steps, splits), splits,
        SIZE=_SIZES[name], SPLIT=splits > 1, N=MOST_ROWS, ROWS=PRODUCT.rows,
        num_warps=PRODUCT.warps, num_stages=PRODUCT.stages,
    )  # fmt: skip
