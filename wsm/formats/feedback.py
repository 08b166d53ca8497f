"""Error feedback: the columns of a matrix are rounded one after the other, and those still to come make up for it.

GPTQ (Frantar et al. 2022), with this project's search of scale and zero at the beginning of each group. Which columns
can make up for which follows from the second moments of the matrix's inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wsm.errors import UnusableInput
from wsm.formats.backend import kernels_for
from wsm.formats.search import Grid, weights_of

_DAMPING = 0.01
"""Of the mean square of the inputs, added to each one's: channels that hardly vary stay solvable."""
_MOST_BLOCK = 128
"""Columns that are rounded before all later ones are corrected for them at once."""
_INVERTED = 2048
"""Columns of a triangle that are inverted at once."""


def round_with_feedback(grid: Grid, weights: Tensor, moments: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 ``[rows, cols]``, scales and zeros float32 ``[rows, groups]``.

    ``weights`` are float32 ``[rows, cols]``, and overwritten; ``moments`` are those of the inputs, float32 ``[cols,
    cols]``, on the same device.

    ``group`` columns share a scale, which is searched when all columns before them have been made up for.
    UnusableInput where the moments are not finite, or those of no inputs.
    """
    importance = weights_of(moments.diagonal())
    upper = _solver(moments)
    rows, cols = weights.shape
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=weights.device)
    scales, zeros = (weights.new_empty(rows, -(-cols // group)) for _ in range(2))
    step = next(size for size in range(min(group, _MOST_BLOCK), 0, -1) if group % size == 0)
    for begin in range(0, cols, step):
        if begin % group == 0:
            own = slice(begin, min(begin + group, cols))
            found = grid.search(weights[:, None, own].contiguous(), importance[None, None, own])
            scale, zero = (each[:, :, 0].contiguous() for each in found)
            scales[:, begin // group], zeros[:, begin // group] = scale[:, 0], zero[:, 0]
        part = slice(begin, min(begin + step, cols))
        block = weights[:, part].contiguous()
        errors = _round_block_(grid, block, upper[part, part].contiguous(), scale, zero, codes[:, part])
        weights[:, part.stop :].addmm_(errors, upper[part, part.stop :], alpha=-1)
    return codes, scales, zeros


def _solver(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped ``moments``: row j says how the columns after j make up
    for an error of column j."""
    damped = moments.float().flip(0, 1)  # a copy, from the last input to the first
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    if not bool(mean.isfinite()) or float(mean) <= 0:
        raise UnusableInput("the inputs of a matrix are not finite, or all zero: the text or the model cannot be used")
    diagonal.add_(_DAMPING * mean)
    lower, failed = damped.mT, torch.empty((), dtype=torch.int32, device=damped.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))  # in its own place: it has the columns' order that is wanted
    if int(failed):
        raise UnusableInput("the inputs of a matrix vary too little to tell its columns apart: take a longer text")
    # Turned round, the L of L L^T = moments from the last input to the first is the upper R of R R^T = moments, and
    # U = 1 / R has U^T U = 1 / moments.
    _invert_lower_(lower)
    return lower.flip(0, 1)


def _invert_lower_(lower: Tensor) -> None:
    """Put the inverse of a lower triangle in its place: of the largest matrices there is room for few.

    From the last columns to the first, ``[[A, 0], [B, C]]`` becomes ``[[1 / A, 0], [-1 / C B 1 / A, 1 / C]]``.
    """
    size = len(lower)
    for begin in reversed(range(0, size, _INVERTED)):
        own, below = slice(begin, min(begin + _INVERTED, size)), slice(begin + _INVERTED, size)
        corner = lower[own, own]
        inverse = torch.linalg.solve_triangular(corner, torch.eye(len(corner), device=lower.device), upper=False)
        lower[below, own] = -(lower[below, below] @ lower[below, own]) @ inverse
        corner.copy_(inverse)


def _round_block_(grid: Grid, block: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, codes: Tensor) -> Tensor:
    """Fill ``codes [rows, width]`` of one group's ``block``, which is overwritten; the errors that are left to others,
    float32 ``[rows, width]``."""
    errors = torch.empty_like(block)
    if kernels_for(block) is not None:
        from wsm.formats.feedback_kernel import round_block_

        round_block_(block, upper, scale, zero, codes, errors, top=(1 << grid.bits) - 1)
        return errors
    for column in range(block.shape[1]):
        ours = block[:, column : column + 1]
        code = grid.codes(ours, scale, zero)
        codes[:, column] = code[:, 0].to(torch.uint8)
        errors[:, column] = ((ours - (code - zero) * scale) / upper[column, column])[:, 0]
        block.addmm_(errors[:, column : column + 1], upper[column : column + 1], alpha=-1)
    return errors
