"""The decoders of GGUF's block types in Triton. Imported only where there is a CUDA device.

All blocks are of an even number of bytes: they are read as pairs of bytes, int16, which hold codes of neighbours. Rows
are whole blocks, so a matrix is one list of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsm.formats.kernels import DecodeTuning, joined, triton_type

SMALL, LARGE = DecodeTuning(4096, 8), DecodeTuning(4096, 8)
"""Of blocks of 32 weights and of 256, in pairs of values."""


@triton.jit
def small_blocks_kernel(
    blocks, out, count,
    SIZE: tl.constexpr, BITS: tl.constexpr, HAS_MIN: tl.constexpr, TILE: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """TILE blocks of 32 weights, of SIZE pairs of bytes: ``blocks`` int16, ``out`` as pairs of TO in one integer."""
    PAIRS: tl.constexpr = 16 if BITS == 8 else 8  # of bytes with codes
    first = tl.program_id(0).to(tl.int64) * TILE
    block, pair = tl.arange(0, TILE), tl.max_contiguous(tl.arange(0, PAIRS), 4)
    known = first + block < count
    inside = known[:, None] & (pair < PAIRS)[None, :]
    start = blocks + first * SIZE + block * SIZE
    scale = tl.load(start, mask=known, other=0).to(tl.float16, bitcast=True).to(tl.float32)[:, None]
    code = tl.load(start[:, None] + (SIZE - PAIRS) + pair[None, :], mask=inside, other=0).to(tl.int32)
    to = out + first * 16 + block[:, None] * 16 + pair[None, :]
    if BITS == 8:
        tl.store(
            to, joined(((code << 24) >> 24).to(tl.float32) * scale, (code >> 8).to(tl.float32) * scale, TO), inside
        )
    else:
        low, high = code & 0x0F0F, (code >> 4) & 0x0F0F
        if BITS == 5:  # one bit of each weight, those of the low codes first
            fifth = start + (SIZE - PAIRS - 2)
            low |= spread(tl.load(fifth, mask=known, other=0), pair)
            high |= spread(tl.load(fifth + 1, mask=known, other=0), pair)
        if HAS_MIN:
            least = tl.load(start + 1, mask=known, other=0).to(tl.float16, bitcast=True).to(tl.float32)[:, None]
            tl.store(to, joined(first_of(low) * scale + least, second_of(low) * scale + least, TO), inside)
            tl.store(to + 8, joined(first_of(high) * scale + least, second_of(high) * scale + least, TO), inside)
        else:
            ZERO: tl.constexpr = 1 << (BITS - 1)
            tl.store(to, joined((first_of(low) - ZERO) * scale, (second_of(low) - ZERO) * scale, TO), inside)
            tl.store(to + 8, joined((first_of(high) - ZERO) * scale, (second_of(high) - ZERO) * scale, TO), inside)


@triton.jit
def first_of(codes):
    """The code in the low byte, float32."""
    return (codes & 0xFF).to(tl.float32)


@triton.jit
def second_of(codes):
    """The code in the byte above, float32."""
    return ((codes >> 8) & 0xFF).to(tl.float32)


@triton.jit
def spread(bits, pair):
    """The fifth bit of both codes of each pair: ``bits`` int16 ``[blocks]`` -> int32 ``[blocks, pairs]``."""
    mine = bits.to(tl.int32)[:, None] >> (2 * pair)[None, :]
    return ((mine & 1) << 4) | ((mine & 2) << 11)


@triton.jit
def grouped_blocks_kernel(blocks, out, count, BITS: tl.constexpr, TILE: tl.constexpr, TO: tl.constexpr):
    """``q4_K`` and ``q5_K``: TILE quarters of a block; the low codes of a quarter are a group, the high ones the next.

    ``count`` is that of quarters. A block: scale and min, 12 bytes of the groups' own, ``q5_K``'s fifth bits, codes.
    """
    SIZE: tl.constexpr = 72 if BITS == 4 else 88
    first = tl.program_id(0).to(tl.int64) * TILE  # whole blocks
    quarter, pair = tl.arange(0, TILE), tl.max_contiguous(tl.arange(0, 16), 4)
    known = first + quarter < count
    inside = known[:, None] & (pair < 16)[None, :]
    start, which = blocks + (first // 4) * SIZE + (quarter // 4) * SIZE, quarter % 4
    # Of both groups at once, in two bytes: 6 bits as they are; of the last four 4 bits, and the two that others left.
    one = tl.load(start + 2 + which, mask=known, other=0).to(tl.int32)
    two = tl.load(start + 4 + which, mask=known, other=0).to(tl.int32)
    left = tl.load(start + 2 + which % 2, mask=known, other=0).to(tl.int32)
    scales = tl.where(which < 2, one & 0x3F3F, (two & 0x0F0F) | ((left >> 2) & 0x3030))
    mins = tl.where(which < 2, two & 0x3F3F, ((two >> 4) & 0x0F0F) | ((one >> 2) & 0x3030))
    scale = tl.load(start, mask=known, other=0).to(tl.float16, bitcast=True).to(tl.float32)
    least = tl.load(start + 1, mask=known, other=0).to(tl.float16, bitcast=True).to(tl.float32)
    low_scale, high_scale = (first_of(scales) * scale)[:, None], (second_of(scales) * scale)[:, None]
    low_min, high_min = (first_of(mins) * least)[:, None], (second_of(mins) * least)[:, None]
    at = start[:, None] + (SIZE - 64) + (which * 16)[:, None] + pair[None, :]
    code = tl.load(at, mask=inside, other=0).to(tl.int32)
    low, high = code & 0x0F0F, (code >> 4) & 0x0F0F
    if BITS == 5:
        fifth = tl.load(start[:, None] + 8 + pair[None, :], mask=inside, other=0).to(tl.int32) >> (2 * which)[:, None]
        low |= (fifth << 4) & 0x1010
        high |= (fifth << 3) & 0x1010
    to = out + first * 32 + quarter[:, None] * 32 + pair[None, :]
    tl.store(to, joined(first_of(low) * low_scale - low_min, second_of(low) * low_scale - low_min, TO), inside)
    tl.store(
        to + 16, joined(first_of(high) * high_scale - high_min, second_of(high) * high_scale - high_min, TO), inside
    )


@triton.jit
def q6_k_kernel(blocks, out, count, TILE: tl.constexpr, TO: tl.constexpr):
    """As :func:`grouped_blocks_kernel`: low and high codes of a quarter are 32 weights each, two quarters before the
    next half of the block. Each 16 weights have a scale: both of 32 are a pair of bytes."""
    first = tl.program_id(0).to(tl.int64) * TILE
    quarter, pair = tl.arange(0, TILE), tl.max_contiguous(tl.arange(0, 16), 4)
    known = first + quarter < count
    inside = known[:, None] & (pair < 16)[None, :]
    start = blocks + (first // 4) * 105 + (quarter // 4) * 105
    half, odd = quarter // 2 % 2, quarter % 2
    scale = tl.load(start + 104, mask=known, other=0).to(tl.float16, bitcast=True).to(tl.float32)
    of_low = tl.load(start + 96 + half * 4 + odd, mask=known, other=0).to(tl.int32)
    of_high = tl.load(start + 98 + half * 4 + odd, mask=known, other=0).to(tl.int32)
    code = tl.load(start[:, None] + (quarter % 4 * 16)[:, None] + pair[None, :], mask=inside, other=0).to(tl.int32)
    above = tl.load(start[:, None] + 64 + (half * 16)[:, None] + pair[None, :], mask=inside, other=0).to(tl.int32)
    above = above >> (2 * odd)[:, None]
    low = (code & 0x0F0F) | ((above << 4) & 0x3030)
    high = ((code >> 4) & 0x0F0F) | (above & 0x3030)
    begins = (pair < 8)[None, :]
    low_scale = tl.where(begins, signed_first(of_low, scale), signed_second(of_low, scale))
    high_scale = tl.where(begins, signed_first(of_high, scale), signed_second(of_high, scale))
    to = out + first * 32 + (quarter // 2 * 64 + odd * 16)[:, None] + pair[None, :]
    tl.store(to, joined((first_of(low) - 32) * low_scale, (second_of(low) - 32) * low_scale, TO), inside)
    tl.store(to + 32, joined((first_of(high) - 32) * high_scale, (second_of(high) - 32) * high_scale, TO), inside)


@triton.jit
def signed_first(pairs, scale):
    """The int8 in the low byte times ``scale``: float32 ``[n, 1]``."""
    return (((pairs << 24) >> 24).to(tl.float32) * scale)[:, None]


@triton.jit
def signed_second(pairs, scale):
    """The int8 in the byte above, as :func:`signed_first`."""
    return ((pairs >> 8).to(tl.float32) * scale)[:, None]


def _small(size: int, bits: int, *, has_min: bool) -> Callable[[Tensor, Tensor], None]:
    def decode_(blocks: Tensor, out: Tensor) -> None:
        count, tile = out.numel() // 32, SMALL.tile // 16
        small_blocks_kernel[(triton.cdiv(count, tile),)](
            blocks, _pairs(out), count,
            SIZE=size, BITS=bits, HAS_MIN=has_min, TILE=tile, TO=triton_type(out.dtype), num_warps=SMALL.warps,
        )  # fmt: skip

    return decode_


def _large(kernel: triton.JITFunction, **constants: int) -> Callable[[Tensor, Tensor], None]:
    def decode_(blocks: Tensor, out: Tensor) -> None:
        count, tile = out.numel() // 64, LARGE.tile // 32
        kernel[(triton.cdiv(count, tile),)](
            blocks, _pairs(out), count, **constants, TILE=tile, TO=triton_type(out.dtype), num_warps=LARGE.warps
        )

    return decode_


def _pairs(out: Tensor) -> Tensor:
    """Two values in one integer."""
    return out.view(-1).view(torch.int64 if out.dtype == torch.float32 else torch.int32)


_DECODERS: Mapping[str, Callable[[Tensor, Tensor], None]] = {
    "q4_0": _small(9, 4, has_min=False),
    "q4_1": _small(10, 4, has_min=True),
    "q5_0": _small(11, 5, has_min=False),
    "q5_1": _small(12, 5, has_min=True),
    "q8_0": _small(17, 8, has_min=False),
    "q4_K": _large(grouped_blocks_kernel, BITS=4),
    "q5_K": _large(grouped_blocks_kernel, BITS=5),
    "q6_K": _large(q6_k_kernel),
}


def decode_blocks_(name: str, blocks: Tensor, out: Tensor) -> None:
    """Blocks of the type ``name``, at an even address, into ``out``, at that of a pair of values."""
    _DECODERS[name](blocks.view(-1).view(torch.int16), out)
