"""The decoders and the packed product in Triton. Imported only where there is a CUDA device.

Each decoder gives the bits of its format's torch reference. A launch depends on shapes alone, so that all of them can
be captured in CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsm.formats import row_kernel
from wsm.formats.arrivals import arrivals

VERSION: str = triton.__version__
MOST_ROWS = 16
"""Of ``x`` in a packed product: the smallest tile of the tensor cores, so 16 rows take the time of one."""

_ESCAPE_BLOCK = 1 << 16
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class DecodeTuning(NamedTuple):
    """Bytes of codes that a program decodes, and its warps."""

    tile: int
    warps: int


class ProductTuning(NamedTuple):
    """Of the packed product: rows of the matrix a program takes, its warps and stages, and the programs to aim at: its
    inputs are split until there are as many, while each split has at least ``steps`` groups. The number of rows of
    ``x`` is not in it: a row's bits do not depend on the others."""

    rows: int
    warps: int
    stages: int
    programs: int
    steps: int


EXACT, INT4, BYTES = DecodeTuning(1024, 8), DecodeTuning(4096, 8), DecodeTuning(8192, 8)
PRODUCT = {
    4: ProductTuning(rows=32, warps=2, stages=4, programs=264, steps=4),
    8: ProductTuning(rows=64, warps=8, stages=3, programs=528, steps=4),
}
"""By bits of a code."""


@triton.jit
def exact_kernel(signs, codes, base, out, pairs, TILE: tl.constexpr):
    """Two weights a lane: ``signs`` as int16 pairs, ``codes`` uint8, ``out`` as int32 pairs of bfloat16."""
    at = tl.program_id(0) * TILE + tl.max_contiguous(tl.arange(0, TILE), 4)
    inside = at < pairs
    sign = tl.load(signs + at, mask=inside, other=0).to(tl.int32)
    code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    first = tl.load(base).to(tl.int32)
    low = (sign & 0x7F) | ((sign & 0x80) << 8) | (((code & 15) + first) << 7)
    high = ((sign & 0x7F00) << 8) | ((sign & 0x8000) << 16) | (((code >> 4) + first) << 23)
    tl.store(out + at, low | high, mask=inside)


@triton.jit
def escapes_kernel(signs, counts, places, exponents, out, WEIGHTS: tl.constexpr, TILE: tl.constexpr):
    """The escapes of one block: ``signs`` and ``exponents`` uint8, ``counts`` int32, ``places`` and ``out`` int16."""
    block = tl.program_id(0)
    begin = tl.load(counts + block - 1, mask=block > 0, other=0)
    end = tl.load(counts + block)
    for start in range(begin, end, TILE):
        listed = start + tl.arange(0, TILE)
        inside = listed < end
        at = block * WEIGHTS + (tl.load(places + listed, mask=inside, other=0).to(tl.int32) & 0xFFFF)
        sign = tl.load(signs + at, mask=inside, other=0).to(tl.int32)
        exponent = tl.load(exponents + listed, mask=inside, other=0).to(tl.int32)
        bits = (sign & 0x7F) | ((sign & 0x80) << 8) | (exponent << 7)
        tl.store(out + at, bits.to(tl.int16), mask=inside)


def decode_exact_(planes: Mapping[str, Tensor], out: Tensor) -> None:
    """``exact`` into ``out``: an even number of weights in bfloat16, aligned to 4 bytes."""
    signs, codes, pairs = planes["signs"], planes["codes"], out.numel() // 2
    whole = out.view(-1)
    exact_kernel[(triton.cdiv(pairs, EXACT.tile),)](
        signs.view(torch.int16), codes, planes["base"], whole.view(torch.int32), pairs,
        TILE=EXACT.tile, num_warps=EXACT.warps,
    )  # fmt: skip
    if planes["places"].numel():
        counts, places = planes["counts"].view(torch.int32), planes["places"].view(torch.int16)
        escapes_kernel[(counts.numel(),)](
            signs, counts, places, planes["exponents"], whole.view(torch.int16),
            WEIGHTS=_ESCAPE_BLOCK, TILE=32, num_warps=1,
        )  # fmt: skip


@triton.jit
def int4_kernel(
    values, scales, zeros, out, row_bytes, groups,
    HAS_ZERO: tl.constexpr, PER_ROW: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """PARTS parts of a row, of PART bytes each and inside of one group; ``out`` as pairs of TO in one integer."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) * PARTS + tl.arange(0, PARTS)
    byte = part[:, None] * PART + tl.max_contiguous(tl.arange(0, PART), 4)[None, :]
    inside = byte < row_bytes
    group = row * groups + (part * 0 if PER_ROW else part)
    known = part * PART < row_bytes
    scale = tl.load(scales + group, mask=known, other=0).to(tl.float32)[:, None]
    zero = tl.load(zeros + group, mask=known, other=0).to(tl.int32)[:, None] if HAS_ZERO else 8
    pair = tl.load(values + row * row_bytes + byte, mask=inside, other=0).to(tl.int32)
    low = (((pair & 15) - zero).to(tl.float32) * scale).to(TO)
    high = (((pair >> 4) - zero).to(tl.float32) * scale).to(TO)
    if TO == tl.float32:  # noqa: SIM300 (a type, which ruff takes for a constant)
        first = low.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        both = first | (high.to(tl.int32, bitcast=True).to(tl.int64) << 32)
    else:
        first = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        both = first | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    tl.store(out + row * row_bytes + byte, both, mask=inside)


def decode_int4_(values: Tensor, scales: Tensor, zeros: Tensor | None, out: Tensor, *, group: int) -> None:
    """4-bit codes into ``out [rows, cols]``: an even number of columns, aligned to a pair of values."""
    rows, row_bytes = values.shape
    part = group // 2 or 64
    parts = _parts(row_bytes, part, INT4)
    int4_kernel[(rows, triton.cdiv(row_bytes, part * parts))](
        values, scales, values if zeros is None else zeros,
        out.view(torch.int64 if out.dtype == torch.float32 else torch.int32), row_bytes, scales.shape[1],
        HAS_ZERO=zeros is not None, PER_ROW=group == 0, PART=part, PARTS=parts, TO=_TYPES[out.dtype],
        num_warps=INT4.warps,
    )  # fmt: skip


@triton.jit
def bytes_kernel(
    values, scales, zeros, out, cols, groups,
    E4M3: tl.constexpr, HAS_ZERO: tl.constexpr, PER_ROW: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    TO: tl.constexpr,
):  # fmt: skip
    """As :func:`int4_kernel`, of codes of a byte: whole numbers, or E4M3 without NaN. ``groups`` 0: one scale."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) * PARTS + tl.arange(0, PARTS)
    col = part[:, None] * PART + tl.max_contiguous(tl.arange(0, PART), 8)[None, :]
    inside = col < cols
    group = row * groups + (part * 0 if PER_ROW else part)
    known = part * PART < cols
    scale = tl.load(scales + group, mask=known, other=0).to(tl.float32)[:, None]
    code = tl.load(values + row * cols + col, mask=inside, other=0).to(tl.int16)
    if E4M3:
        # As the bits of a float16, whose exponents begin 8 lower: also the subnormals fall into place.
        half = ((code & 0x7F) << 7) | ((code & 0x80) << 8)
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        zero = tl.load(zeros + group, mask=known, other=0).to(tl.int16)[:, None] if HAS_ZERO else 128
        value = (code - zero).to(tl.float32)
    tl.store(out + row * cols + col, (value * scale).to(TO), mask=inside)


def decode_bytes_(
    values: Tensor, scales: Tensor, zeros: Tensor | None, out: Tensor, *, group: int = 0, e4m3: bool = False
) -> None:
    """Codes of a byte into ``out [rows, cols]``; ``scales [rows, groups]``, or ``[1, 1]`` for the whole matrix."""
    rows, cols = out.shape
    part = group or 128
    parts = _parts(cols, part, BYTES)
    groups = scales.shape[1] if scales.shape[0] == rows else 0
    bytes_kernel[(rows, triton.cdiv(cols, part * parts))](
        values, scales, values if zeros is None else zeros, out, cols, groups,
        E4M3=e4m3, HAS_ZERO=zeros is not None, PER_ROW=group == 0, PART=part, PARTS=parts, TO=_TYPES[out.dtype],
        num_warps=BYTES.warps,
    )  # fmt: skip


def _parts(row_bytes: int, part: int, tuning: DecodeTuning) -> int:
    """Parts of a row that a program decodes: a power of two, no more of them than a row has use for."""
    return int(min(tuning.tile // part, triton.next_power_of_2(triton.cdiv(row_bytes, part))))


# Both codes of a byte in one register: compiled from Python it would be twice as many instructions.
_PAIR = "{{ .reg .b32 p, one; mul.lo.u32 p, $1, 0x1001; lop3.b32 p, p, 0x000F000F, {0}, 0xEA; mov.b32 one, {1}; {2} }}"
_BFLOAT16_PAIR = tl.constexpr(_PAIR.format("0x43004300", "0x3F803F80", "fma.rn.bf16x2 $0, p, one, $2;"))
_FLOAT16_PAIR = tl.constexpr(_PAIR.format("0x64006400", "0x3C003C00", "fma.rn.f16x2 $0, p, one, $2;"))


@triton.jit
def shifted_pairs(code, zero, TO: tl.constexpr, ASSEMBLED: tl.constexpr):
    """``q - zero`` of two 4-bit codes a byte: ``code [rows, bytes]``, ``zero [rows, 1]`` -> TO ``[rows, 2 x bytes]``.

    A code in the lowest bits of 128.0 (bfloat16) or 1024.0 (float16) adds itself, and the difference is exact.
    """
    if ASSEMBLED:
        HALF: tl.constexpr = TO == tl.float16  # noqa: SIM300 (a type, which ruff takes for a constant)
        minus = zero * 0x10001 + ((0xE400E400 if HALF else 0xC300C300) - (1 << 32))
        asm: tl.constexpr = _FLOAT16_PAIR if HALF else _BFLOAT16_PAIR
        pair = tl.inline_asm_elementwise(asm, "=r,r,r", [code, minus], dtype=tl.int32, is_pure=True, pack=1)
        low = pair.to(tl.int16).to(TO, bitcast=True)
        high = (pair >> 16).to(tl.int16).to(TO, bitcast=True)
    else:
        low = ((code & 15) - zero).to(tl.float32).to(TO)
        high = ((code >> 4) - zero).to(tl.float32).to(TO)
    return tl.join(low, high).reshape(code.shape[0], 2 * code.shape[1])


@triton.jit(do_not_specialize=["n"])  # one binary for all numbers of rows: the same bits
def product_kernel(
    x, values, scales, zeros, out, parts, arrived,
    n, rows, cols, row_bytes, groups, x_stride, out_stride, steps, splits,
    BITS: tl.constexpr, HAS_ZERO: tl.constexpr, PER_ROW: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
    SPLIT: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, ASSEMBLED: tl.constexpr,
):  # fmt: skip
    """Products with ROWS rows of the matrix over the inputs of one split: group by group ``x (q - zero)`` on the tensor
    cores, to which whole numbers are exact, times the scale in float32. The last of a row's splits to arrive adds up
    what all have left in ``parts``, in their order, and resets ``arrived``."""
    TO: tl.constexpr = x.dtype.element_ty
    BYTES: tl.constexpr = STEP * BITS // 8
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    place = tl.arange(0, N)
    col, byte = tl.arange(0, STEP), tl.arange(0, BYTES)
    given = (place < n)[:, None]
    xs_at, codes_at = x + place[:, None] * x_stride + col, values + row.to(tl.int64)[:, None] * row_bytes + byte
    group = row * groups
    total = tl.zeros((N, ROWS), dtype=tl.float32)
    begin = tl.program_id(1) * steps
    for step in range(begin, tl.minimum(begin + steps, tl.cdiv(cols, STEP))):
        one = 0 if PER_ROW else step
        if EVEN:
            xs = tl.load(xs_at + step * STEP, mask=given, other=0)
            code = tl.load(codes_at + step * BYTES).to(tl.int32)
            scale = tl.load(scales + group + one).to(tl.float32)
            zero = tl.load(zeros + group + one).to(tl.int32)[:, None] if HAS_ZERO else (1 << (BITS - 1))
        else:
            xs = tl.load(xs_at + step * STEP, mask=given & (step * STEP + col < cols), other=0)
            inside = real[:, None] & (step * BYTES + byte < row_bytes)
            code = tl.load(codes_at + step * BYTES, mask=inside, other=0).to(tl.int32)
            scale = tl.load(scales + group + one, mask=real, other=0).to(tl.float32)
            zero = (
                tl.load(zeros + group + one, mask=real, other=0).to(tl.int32)[:, None]
                if HAS_ZERO
                else (1 << (BITS - 1))
            )
        weight = shifted_pairs(code, zero, TO, ASSEMBLED) if BITS == 4 else (code - zero).to(tl.float32).to(TO)
        total += tl.dot(xs, tl.trans(weight)) * scale[None, :]
    kept = given & real
    mine = out + place[:, None] * out_stride + row
    if SPLIT:
        parts += place[:, None] * rows + row
        tl.store(parts + tl.program_id(1) * n * rows, total, mask=kept)
        tl.debug_barrier()
        if tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel") == splits - 1:
            total = tl.zeros((N, ROWS), dtype=tl.float32)
            for split in range(splits):
                total += tl.load(parts + split * n * rows, mask=kept, other=0, cache_modifier=".cg")
            tl.store(mine, total.to(TO), mask=kept)
            tl.store(arrived + tl.program_id(0), 0)
    else:
        tl.store(mine, total.to(TO), mask=kept)


_ASSEMBLED = isinstance(product_kernel, triton.JITFunction)  # not where Triton interprets


def can_multiply(x: Tensor) -> bool:
    """Whether :func:`multiply_` takes ``x [n, cols]``: few rows of 16-bit values."""
    return x.shape[0] <= MOST_ROWS and x.stride(1) == 1 and x.dtype in (torch.bfloat16, torch.float16)


def multiply_(
    x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, out: Tensor, *, bits: int, group: int
) -> None:
    """``x weight^T`` into ``out [n, rows]``, whose rows may lie apart, of an ``x`` that :func:`can_multiply` takes.

    One at a time on a device: they share the counters of arrivals.
    """
    if row_kernel.can_multiply(x, bits=bits, group=group):
        row_kernel.multiply_(x, values, scales, zeros, out, bits=bits, group=group)
        return
    rows, row_bytes = values.shape
    (n, cols), step, tuning = x.shape, group or 128, PRODUCT[bits]
    programs, steps = triton.cdiv(rows, tuning.rows), triton.cdiv(cols, step)
    splits = 1
    while programs * splits < tuning.programs and steps >= 2 * splits * tuning.steps:
        splits *= 2
    parts = out if splits == 1 else x.new_empty((splits, n, rows), dtype=torch.float32)
    product_kernel[(programs, splits)](
        x, values, scales, values if zeros is None else zeros, out, parts, arrivals(x.device),
        n, rows, cols, row_bytes, scales.shape[1], x.stride(0), out.stride(0), triton.cdiv(steps, splits), splits,
        BITS=bits, HAS_ZERO=zeros is not None, PER_ROW=group == 0, STEP=step,
        EVEN=rows % tuning.rows == 0 and cols % step == 0, SPLIT=splits > 1, N=MOST_ROWS, ROWS=tuning.rows,
        ASSEMBLED=_ASSEMBLED, num_warps=tuning.warps, num_stages=tuning.stages,
    )  # fmt: skip


def try_out(device: torch.device) -> None:
    """RuntimeError, or whatever Triton raises, where a kernel cannot be compiled and run on ``device``."""
    out = torch.empty(1, 32, dtype=torch.float32, device=device)
    decode_bytes_(out.new_full((1, 32), 129, dtype=torch.uint8), out.new_full((1, 1), 0.5), None, out)
    if not bool((out == 0.5).all()):
        raise RuntimeError("a kernel gave wrong values")
    arrivals(out.device)  # now: one that is made inside of a capture belongs to its graph
