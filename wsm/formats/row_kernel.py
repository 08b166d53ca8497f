"""The packed product of one row of ``x``, in Triton: no tensor cores, whose smallest tile would be empty but for a row,
and so a third of the instructions. Imported only where there is a CUDA device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsm.formats.arrivals import arrivals


class RowTuning(NamedTuple):
    """Rows of the matrix that a program takes, of each so many pieces of 16 bytes at once, its warps and stages, and
    the programs to aim at: the inputs are split until there are as many, while each split takes ``steps`` steps."""

    rows: int
    pieces: int
    warps: int
    stages: int
    programs: int
    steps: int


ROW = {
    4: RowTuning(rows=16, pieces=32, warps=4, stages=4, programs=528, steps=1),
    8: RowTuning(rows=16, pieces=32, warps=4, stages=4, programs=528, steps=1),
}
"""By bits of a code."""
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_MAGIC = tl.constexpr(0x4B000000)
"""The bits of 2^23 as float32: a code in its lowest bits adds itself."""


@triton.jit
def two_inputs(pairs, TO: tl.constexpr):
    """Both values of TO in 32 bits, as float32."""
    if TO == tl.bfloat16:  # noqa: SIM300 (a type, which ruff takes for a constant)
        even = (pairs << 16).to(tl.float32, bitcast=True)
        odd = (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        even = (pairs & 0xFFFF).to(tl.int16).to(TO, bitcast=True).to(tl.float32)
        odd = (pairs >> 16).to(tl.int16).to(TO, bitcast=True).to(tl.float32)
    return even, odd


@triton.jit
def product_of(codes, zero, value, BITS: tl.constexpr, PLACE: tl.constexpr):
    """``value (q - zero)`` of the codes PLACE bits up."""
    code = ((codes & (((1 << BITS) - 1) << PLACE)) | _MAGIC).to(tl.float32, bitcast=True)
    return (code - (8388608.0 + zero * (1 << PLACE))) * (value * (1.0 / (1 << PLACE)))


@triton.jit
def row_kernel(
    x, values, scales, zeros, out, parts, arrived,
    rows, row_pieces, groups, steps, splits,
    BITS: tl.constexpr, HAS_ZERO: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    TO: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS products over the inputs of one split: ``x`` as int32 pairs of TO, ``values`` as int32, four to a piece, a
    piece inside of one group of GROUP inputs (0: a whole row).

    A code is cut out as the lowest bits of a float32 of 2^23, or higher up, times a power of two by which ``x`` is
    divided: two instructions a weight and its product, all of them exact but the product.
    """
    A_WORD: tl.constexpr = 32 // BITS  # codes
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    piece, word = tl.arange(0, PIECES)[None, :, None], tl.arange(0, 4)[None, None, :]
    real = row < rows
    total = tl.zeros((ROWS, PIECES, 4), dtype=tl.float32)
    begin = tl.program_id(1) * steps
    for step in tl.range(begin, tl.minimum(begin + steps, tl.cdiv(row_pieces, PIECES)), num_stages=STAGES):
        at = step * PIECES + piece
        known = at < row_pieces
        group = row * groups + (at * (4 * A_WORD) // GROUP if GROUP else at * 0)
        codes_at = values + (row.to(tl.int64) * row_pieces + at) * 4 + word
        if EVEN:
            codes = tl.load(codes_at, eviction_policy="evict_first")
            scale = tl.load(scales + group).to(tl.float32)
            zero = tl.load(zeros + group).to(tl.float32) if HAS_ZERO else 1.0 * (1 << (BITS - 1))
        else:
            codes = tl.load(codes_at, mask=real & known, other=0)
            scale = tl.load(scales + group, mask=real & known, other=0).to(tl.float32)
            zero = (
                tl.load(zeros + group, mask=real & known, other=0).to(tl.float32)
                if HAS_ZERO
                else 1.0 * (1 << (BITS - 1))
            )
        found = tl.zeros((ROWS, PIECES, 4), dtype=tl.float32)
        for pair in tl.static_range(A_WORD // 2):
            pairs = tl.load(x + (at * 4 + word) * (A_WORD // 2) + pair, mask=known, other=0)
            even, odd = two_inputs(pairs, TO)
            # Codes of the upper half are brought down first: all bits of a code have to be below 2^23.
            half = codes if pair < A_WORD // 4 else codes >> 16
            found += product_of(half, zero, even, BITS, 2 * pair % (A_WORD // 2) * BITS)
            found += product_of(half, zero, odd, BITS, (2 * pair + 1) % (A_WORD // 2) * BITS)
        total += found * scale
    sums = tl.sum(tl.sum(total, axis=2), axis=1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = row < rows
    if SPLIT:
        tl.store(parts + tl.program_id(1) * rows + row, sums, mask=kept)
        tl.debug_barrier()
        if tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel") == splits - 1:
            sums = tl.zeros((ROWS,), dtype=tl.float32)
            for split in range(splits):
                sums += tl.load(parts + split * rows + row, mask=kept, other=0, cache_modifier=".cg")
            tl.store(out + row, sums.to(TO), mask=kept)
            tl.store(arrived + tl.program_id(0), 0)
    else:
        tl.store(out + row, sums.to(TO), mask=kept)


def can_multiply(x: Tensor, *, bits: int, group: int) -> bool:
    """Whether :func:`multiply_` takes ``x [n, cols]``: one row of 16-bit values, a matrix of whole pieces in groups."""
    a_piece = 128 // bits
    return (
        x.shape[0] == 1
        and x.stride(1) == 1
        and x.dtype in _TYPES
        and x.shape[1] % a_piece == 0
        and group % a_piece == 0
    )


def multiply_(
    x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, out: Tensor, *, bits: int, group: int
) -> None:
    """``x weight^T`` into ``out [1, rows]``, of an ``x`` that :func:`can_multiply` takes; one at a time on a device."""
    rows, row_pieces, tuning = values.shape[0], values.shape[1] // 16, ROW[bits]
    programs, steps, splits = triton.cdiv(rows, tuning.rows), triton.cdiv(row_pieces, tuning.pieces), 1
    while programs * splits < tuning.programs and steps >= 2 * splits * tuning.steps:
        splits *= 2
    parts = x.new_empty((splits if splits > 1 else 0, rows), dtype=torch.float32)
    row_kernel[(programs, splits)](
        x.view(torch.int32), values.view(torch.int32), scales, values if zeros is None else zeros, out, parts,
        arrivals(x.device), rows, row_pieces, scales.shape[1], triton.cdiv(steps, splits), splits,
        BITS=bits, HAS_ZERO=zeros is not None, GROUP=group, TO=_TYPES[x.dtype], SPLIT=splits > 1,
        EVEN=rows % tuning.rows == 0 and row_pieces % tuning.pieces == 0, ROWS=tuning.rows, PIECES=tuning.pieces,
        STAGES=tuning.stages, num_warps=tuning.warps,
    )  # fmt: skip
