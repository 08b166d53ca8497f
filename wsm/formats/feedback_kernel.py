"""The inner loop of :mod:`wsm.formats.feedback` in Triton. Imported only where there is a CUDA device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16
"""Of the block that a program keeps in registers."""


@triton.jit
def round_block_kernel(
    block, upper, scales, zeros, codes, errors, rows, width, code_stride, top,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Columns from left to right; ``block`` and ``errors`` float32 ``[rows, width]``, ``upper`` ``[width, width]``."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.arange(0, WIDTH)
    real = (row < rows)[:, None] & (col < width)[None, :]
    at = row[:, None] * width + col[None, :]
    weights = tl.load(block + at, mask=real, other=0)
    scale = tl.load(scales + row, mask=row < rows, other=0)
    zero = tl.load(zeros + row, mask=row < rows, other=0)
    inverse = tl.where(scale == 0, 0.0, 1.0 / tl.where(scale == 0, 1.0, scale))
    found = tl.zeros((ROWS, WIDTH), dtype=tl.int32)
    left = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for column in range(width):
        here = (col == column)[None, :]
        ours = tl.sum(tl.where(here, weights, 0.0), 1)
        factors = tl.load(upper + column * width + col, mask=col < width, other=0)
        own = tl.load(upper + column * width + column)
        # Adding 1.5 x 2^23 leaves a float32 without fraction, rounded half to even, as torch rounds.
        near = tl.clamp(ours * inverse, -4194304.0, 4194304.0) + 12582912.0
        code = tl.clamp((near - 12582912.0) + zero, 0.0, top)
        error = (ours - (code - zero) * scale) / own
        weights -= error[:, None] * factors[None, :]
        found = tl.where(here, code.to(tl.int32)[:, None], found)
        left = tl.where(here, error[:, None], left)
    tl.store(codes + row[:, None] * code_stride + col[None, :], found.to(tl.uint8), mask=real)
    tl.store(errors + at, left, mask=real)


def round_block_(
    block: Tensor, upper: Tensor, scales: Tensor, zeros: Tensor, codes: Tensor, errors: Tensor, *, top: int
) -> None:
    """Fill ``codes`` (uint8, its rows may lie apart) and ``errors`` of a contiguous float32 ``block [rows, width]``."""
    rows, width = block.shape
    round_block_kernel[(triton.cdiv(rows, _ROWS),)](
        block, upper, scales, zeros, codes, errors, rows, width, codes.stride(0), float(top),
        ROWS=_ROWS, WIDTH=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
