"""The packed product in Triton: few rows times a matrix as it lies. Imported only where there is a CUDA device.

A launch depends on shapes alone, so that it can be captured in CUDA graphs.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsm.formats.format import MOST_ROWS

COUNTERS = 1 << 16


class ProductTuning(NamedTuple):
    """Of the packed product: rows of the matrix a program takes, its warps and stages, and the programs to aim at: its
    inputs are split until there are as many, while each split has at least ``steps`` groups. The number of rows of
    ``x`` is not in it: a row's bits do not depend on the others."""

    rows: int
    warps: int
    stages: int
    programs: int
    steps: int


PRODUCT = {
    4: ProductTuning(rows=32, warps=2, stages=4, programs=264, steps=4),
    8: ProductTuning(rows=64, warps=8, stages=3, programs=528, steps=4),
}
"""By bits of a code."""


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


@triton.jit
def put(total, out, parts, arrivals, place, row, n, rows, out_stride, splits, SPLIT: tl.constexpr):
    """The ``total`` of a split into ``out``: the last of a row's splits to arrive adds up what all have left in
    ``parts``, in their order, and resets ``arrivals``."""
    kept = (place < n)[:, None] & (row < rows)
    mine = out + place[:, None] * out_stride + row
    if SPLIT:
        parts += place[:, None] * rows + row
        tl.store(parts + tl.program_id(1) * n * rows, total, mask=kept)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + tl.program_id(0), 1, sem="acq_rel") == splits - 1:
            total = tl.zeros_like(total)
            for split in range(splits):
                total += tl.load(parts + split * n * rows, mask=kept, other=0, cache_modifier=".cg")
            tl.store(mine, total.to(out.dtype.element_ty), mask=kept)
            tl.store(arrivals + tl.program_id(0), 0)
    else:
        tl.store(mine, total.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["n"])  # one binary for all numbers of rows: the same bits
def product_kernel(
    x, values, scales, zeros, out, parts, arrivals,
    n, rows, cols, row_bytes, groups, x_stride, out_stride, steps, splits,
    BITS: tl.constexpr, HAS_ZERO: tl.constexpr, PER_ROW: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
    SPLIT: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, ASSEMBLED: tl.constexpr,
):  # fmt: skip
    """Products with ROWS rows of the matrix over the inputs of one split: group by group ``x (q - zero)`` on the tensor
    cores, to which whole numbers are exact, times the scale in float32."""
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
    put(total, out, parts, arrivals, place, row, n, rows, out_stride, splits, SPLIT)


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
    rows, row_bytes = values.shape
    (n, cols), step, tuning = x.shape, group or 128, PRODUCT[bits]
    programs, steps = triton.cdiv(rows, tuning.rows), triton.cdiv(cols, step)
    splits = splits_of(tuning, programs, steps)
    parts = out if splits == 1 else x.new_empty((splits, n, rows), dtype=torch.float32)
    product_kernel[(programs, splits)](
        x, values, scales, values if zeros is None else zeros, out, parts, arrivals_on(x.device),
        n, rows, cols, row_bytes, scales.shape[1], x.stride(0), out.stride(0), triton.cdiv(steps, splits), splits,
        BITS=bits, HAS_ZERO=zeros is not None, PER_ROW=group == 0, STEP=step,
        EVEN=rows % tuning.rows == 0 and cols % step == 0, SPLIT=splits > 1, N=MOST_ROWS, ROWS=tuning.rows,
        ASSEMBLED=_ASSEMBLED, num_warps=tuning.warps, num_stages=tuning.stages,
    )  # fmt: skip


def splits_of(tuning: ProductTuning, programs: int, steps: int) -> int:
    """In how many parts the inputs are split: a power of two."""
    splits = 1
    while programs * splits < tuning.programs and steps >= 2 * splits * tuning.steps:
        splits *= 2
    return splits


@cache
def arrivals_on(device: torch.device) -> Tensor:
    """int32 ``[COUNTERS]``, 0 between launches: how many splits of a program's rows have left their part.

    All launches are of the one compute stream. To be made before any capture: what is made inside belongs to its graph.
    """
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
