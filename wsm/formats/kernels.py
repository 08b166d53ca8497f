"""The decoders in Triton. Imported only where there is a CUDA device.

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

from wsm.formats.product_kernels import arrivals_on

VERSION: str = triton.__version__
_ESCAPE_BLOCK = 1 << 16
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def triton_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's word for a compute dtype."""
    return _TYPES[dtype]


class DecodeTuning(NamedTuple):
    """Bytes of codes that a program decodes, and its warps."""

    tile: int
    warps: int


EXACT, INT4, BYTES = DecodeTuning(1024, 8), DecodeTuning(4096, 8), DecodeTuning(8192, 8)


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
def joined(low, high, TO: tl.constexpr):
    """Two float32, rounded to TO, as one integer, ``low`` first."""
    if TO == tl.float32:  # noqa: SIM300 (a type, which ruff takes for a constant)
        first = low.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        return first | (high.to(tl.int32, bitcast=True).to(tl.int64) << 32)
    else:  # noqa: RET505 (Triton compiles what follows an if, whatever it returns)
        first = low.to(TO).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return first | (high.to(TO).to(tl.int16, bitcast=True).to(tl.int32) << 16)


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
    low = ((pair & 15) - zero).to(tl.float32) * scale
    high = ((pair >> 4) - zero).to(tl.float32) * scale
    tl.store(out + row * row_bytes + byte, joined(low, high, TO), mask=inside)


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


def try_out(device: torch.device) -> None:
    """RuntimeError, or whatever Triton raises, where a kernel cannot be compiled and run on ``device``."""
    out = torch.empty(1, 32, dtype=torch.float32, device=device)
    decode_bytes_(out.new_full((1, 32), 129, dtype=torch.uint8), out.new_full((1, 1), 0.5), None, out)
    if not bool((out == 0.5).all()):
        raise RuntimeError("a kernel gave wrong values")
    arrivals_on(out.device)  # now: one that is made inside of a capture belongs to its graph
