"""Scales and zeros for groups of weights: round to nearest, or a search weighted with what the inputs are.

After AWQ's and OmniQuant's clip search and llama.cpp's ``make_qkx2_quants``: candidates of clip and zero, the best of
them refined by least squares.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wsm.errors import UnusableInput

_CLIPS = tuple(1.0 - 0.025 * step for step in range(-2, 19))
"""Of the range of a group that the codes span: 1.05 down to 0.55."""
_REFINEMENTS = 3


class Grid(NamedTuple):
    """The values that codes of ``bits`` can name: ``(code - zero) * scale``.

    Groups are float32 ``[rows, groups, width]``, scales and zeros float32 ``[rows, groups, 1]``, scales already rounded
    to ``scale_dtype``.
    """

    bits: int
    has_zero: bool
    scale_dtype: torch.dtype

    def codes(self, weights: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The nearest codes, whole numbers in float32."""
        inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
        return torch.mul(weights, inverse).round_().add_(zeros).clamp_(0, (1 << self.bits) - 1)

    def nearest(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros that span each group's range."""
        low, high = weights.amin(-1, keepdim=True).clamp_(max=0), weights.amax(-1, keepdim=True).clamp_(min=0)
        return self._spanning(low, high)

    def search(self, weights: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros of the least squared error weighted with ``importance [1, groups, width]``; never a larger
        error than :meth:`nearest` has."""
        low, high = weights.amin(-1, keepdim=True).clamp_(max=0), weights.amax(-1, keepdim=True).clamp_(min=0)
        scales, zeros = self._spanning(low, high)
        best = _Best(scales, zeros, self._error(weights, importance, scales, zeros))
        for clip in _CLIPS:
            scales, middle = self._spanning(low * clip, high * clip)
            for shift in (-1, 0, 1) if self.has_zero else (0,):
                zeros = (middle + shift).clamp_(0, (1 << self.bits) - 1)
                best.offer_(scales, zeros, self._error(weights, importance, scales, zeros))
        for _ in range(_REFINEMENTS):
            steps = self.codes(weights, best.scales, best.zeros).sub_(best.zeros)
            fitted = (importance * weights * steps).sum(-1, keepdim=True)
            scales = self._rounded(fitted / (importance * steps.square_()).sum(-1, keepdim=True).clamp_(min=1e-30))
            best.offer_(scales, best.zeros, self._error(weights, importance, scales, best.zeros))
        return best.scales, best.zeros

    def _spanning(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        middle, top = 1 << (self.bits - 1), (1 << self.bits) - 1
        if not self.has_zero:
            scales = self._rounded(torch.maximum(high / (top - middle), low / -middle))
            return scales, torch.full_like(scales, middle)
        scales = self._rounded(high / top - low / top)
        return scales, torch.where(scales == 0, 0.0, -low / scales).round_().clamp_(0, top)

    def _rounded(self, scales: Tensor) -> Tensor:
        largest = torch.finfo(self.scale_dtype).max
        return scales.clamp(-largest, largest).to(self.scale_dtype).float()

    def _error(self, weights: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        steps = self.codes(weights, scales, zeros).sub_(zeros)
        return steps.mul_(scales).sub_(weights).square_().mul_(importance).sum(-1, keepdim=True)


class _Best:
    """The best scales and zeros so far of each group."""

    def __init__(self, scales: Tensor, zeros: Tensor, error: Tensor) -> None:
        self.scales, self.zeros, self.error = scales, zeros, error

    def offer_(self, scales: Tensor, zeros: Tensor, error: Tensor) -> None:
        better = error < self.error
        self.scales = torch.where(better, scales, self.scales)
        self.zeros = torch.where(better, zeros, self.zeros)
        self.error = torch.where(better, error, self.error)


def weights_of(importance: Tensor) -> Tensor:
    """What errors are weighted with, of the mean square of each input channel ``[cols]``: 1 at most, none of them 0."""
    wide = importance.float()
    if not bool(wide.isfinite().all()) or bool((wide < 0).any()):
        raise UnusableInput("the importance of a matrix's inputs holds a value that is NaN, infinite or below 0")
    largest = wide.amax()  # the mean would depend on the number of threads
    return (wide / largest).clamp_(min=1e-9) if float(largest) > 0 else torch.ones_like(wide)
