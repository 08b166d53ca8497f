"""Matrices of the shapes that formats find hardest, and the names of formats that are tested on them."""

from __future__ import annotations

import torch
from torch import Tensor

from wsm.formats.registry import NAMES

FORMATS = (*NAMES, "fp8-tensor", "int4-row-float16-sym", "int4-g32-float32", "int8-g32-zero", "int8-row-float16")
"""Those of the flag, and what imports use."""
SHAPES = ((33, 576), (7, 100), (50, 1), (1, 1), (3, 33), (130, 1024))
"""Rows whose last group is short, or is the only one; odd ones; and more than one tile, block and piece."""


def matrix(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal weights with a few outliers, the same for the same ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 0.02
    outliers = torch.rand(shape, generator=generator) < 1e-3
    return torch.where(outliers, values * 30, values).to(dtype)
