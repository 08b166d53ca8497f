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


EXACT, INT4, BYTES = DecodeTuning(2048, 8), DecodeTuning(2048, 4), DecodeTuning(4096, 4)
PRODUCT = ProductTuning(rows=64, warps=4, stages=4, programs=512, steps=4)


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


@triton.jit(do_not_specialize=["n"])  # one binary for all numbers of rows: the same bits
def product_kernel(
    x, values, scales, zeros, out, n, rows, row_bytes, groups, x_stride, out_stride, split_stride, steps,
    BITS: tl.constexpr, HAS_ZERO: tl.constexpr, PER_ROW: tl.constexpr, BYTES: tl.constexpr, TO: tl.constexpr,
    N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Products with ROWS rows of the matrix over the inputs of one split: group by group ``x (q - zero)`` on the tensor
    cores, to which whole numbers are exact, times the scale in float32. For 4 bits ``x`` comes as int32 pairs."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    place = tl.arange(0, N)
    given = place < n
    total = tl.zeros((N, ROWS), dtype=tl.float32)
    begin = tl.program_id(1) * steps
    for step in range(begin, tl.minimum(begin + steps, tl.cdiv(row_bytes, BYTES))):
        byte = step * BYTES + tl.arange(0, BYTES)
        inside = byte < row_bytes
        group = row.to(tl.int64) * groups + (0 if PER_ROW else step)
        scale = tl.load(scales + group, mask=real, other=0).to(tl.float32)
        zero = tl.load(zeros + group, mask=real, other=0).to(tl.int32)[:, None] if HAS_ZERO else (1 << (BITS - 1))
        at = row.to(tl.int64)[:, None] * row_bytes + byte[None, :]
        code = tl.load(values + at, mask=real[:, None] & inside[None, :], other=0).to(tl.int32)
        xs = tl.load(x + place[:, None] * x_stride + byte[None, :], mask=given[:, None] & inside[None, :], other=0)
        if BITS == 4:
            low = ((code & 15) - zero).to(tl.float32).to(TO)
            high = ((code >> 4) - zero).to(tl.float32).to(TO)
            part = tl.dot((xs & 0xFFFF).to(tl.int16).to(TO, bitcast=True), tl.trans(low))
            part = tl.dot((xs >> 16).to(tl.int16).to(TO, bitcast=True), tl.trans(high), part)
        else:
            part = tl.dot(xs, tl.trans((code - zero).to(tl.float32).to(TO)))
        total += part * scale[None, :]
    to = out + tl.program_id(1).to(tl.int64) * split_stride + place[:, None] * out_stride + row[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=given[:, None] & real[None, :])


@triton.jit
def sum_kernel(parts, out, splits, rows, split_stride, out_stride, TILE: tl.constexpr):
    """One row of the result: the splits' float32 parts ``[splits, n, rows]``, added in their order."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < rows
    total = tl.zeros((TILE,), dtype=tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * split_stride + tl.program_id(1) * rows + at, mask=inside, other=0)
    tl.store(out + tl.program_id(1) * out_stride + at, total.to(out.dtype.element_ty), mask=inside)


def can_multiply(x: Tensor, cols: int) -> bool:
    """Whether :func:`multiply_` takes ``x [n, cols]``: few rows of 16-bit values, which can be read in pairs."""
    in_pairs = cols % 2 == 0 and x.stride(1) == 1 and x.stride(0) % 2 == 0 and x.storage_offset() % 2 == 0
    return in_pairs and x.shape[0] <= MOST_ROWS and x.dtype in (torch.bfloat16, torch.float16)


def multiply_(
    x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, out: Tensor,
    *, bits: int, group: int, tuning: ProductTuning = PRODUCT,
) -> None:  # fmt: skip
    """``x weight^T`` into ``out [n, rows]``, whose rows may lie apart, of an ``x`` that :func:`can_multiply` takes."""
    rows, row_bytes = values.shape
    n, width = x.shape[0], (group or 128) * bits // 8
    programs, steps = triton.cdiv(rows, tuning.rows), triton.cdiv(row_bytes, width)
    splits = 1
    while programs * splits < tuning.programs and steps >= 2 * splits * tuning.steps:
        splits *= 2
    parts = out if splits == 1 else x.new_empty((splits, n, rows), dtype=torch.float32)
    given = x.view(torch.int32) if bits == 4 else x
    product_kernel[(programs, splits)](
        given, values, scales, values if zeros is None else zeros, parts, n, rows, row_bytes, scales.shape[1],
        given.stride(0), parts.stride(-2), n * rows, triton.cdiv(steps, splits),
        BITS=bits, HAS_ZERO=zeros is not None, PER_ROW=group == 0, BYTES=width, TO=_TYPES[x.dtype],
        N=MOST_ROWS, ROWS=tuning.rows, num_warps=tuning.warps, num_stages=tuning.stages,
    )  # fmt: skip
    if splits > 1:
        sum_kernel[(triton.cdiv(rows, 512), n)](
            parts, out, splits, rows, n * rows, out.stride(0), TILE=512, num_warps=4
        )


def try_out(device: torch.device) -> None:
    """RuntimeError, or whatever Triton raises, where a kernel cannot be compiled and run on ``device``."""
    out = torch.empty(1, 32, dtype=torch.float32, device=device)
    decode_bytes_(out.new_full((1, 32), 129, dtype=torch.uint8), out.new_full((1, 1), 0.5), None, out)
    if not bool((out == 0.5).all()):
        raise RuntimeError("a kernel gave wrong values")
