"""Matrices of the shapes that formats find hardest, and the names of formats that are tested on them."""

from __future__ import annotations

import torch
from torch import Tensor

from wsm.formats.format import WeightFormat
from wsm.formats.gguf_blocks import BlockType
from wsm.formats.registry import NAMES

FORMATS = (*NAMES, "fp8-tensor", "int4-row-float16-sym", "int4-g32-float32", "int8-g32-zero", "int8-row-float16")
"""Those of the flag, and what imports use."""
SHAPES = ((33, 576), (7, 100), (50, 1), (1, 1), (3, 33), (130, 1024))
"""Rows whose last group is short, or is the only one; odd ones; and more than one tile, block and piece."""
_BLOCK_SHAPES = ((1, 256), (3, 2304), (70, 768), (130, 1024))
_ODD_BLOCK_SHAPES = ((1, 32), (33, 576), (5, 96))


def block_shapes(form: BlockType) -> tuple[tuple[int, int], ...]:
    """As :data:`SHAPES`, of matrices that the blocks of a type fill."""
    return _BLOCK_SHAPES if form.weights == 256 else (*_BLOCK_SHAPES, *_ODD_BLOCK_SHAPES)


def random_blocks(form: BlockType, shape: tuple[int, int], seed: int = 0) -> Tensor:
    """A plane of any bytes at all, but for scales that are finite."""
    (plane,) = form.planes(shape)
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (plane.nbytes // form.nbytes, form.nbytes), dtype=torch.uint8, generator=generator)
    for at in scales_of(form):
        blocks[:, at + 1] = torch.where(blocks[:, at + 1] & 0x7C == 0x7C, blocks[:, at + 1] & 0xBF, blocks[:, at + 1])
    return blocks.view(plane.shape)


def scales_of(form: BlockType) -> tuple[int, ...]:
    """Where a block has its float16 numbers."""
    return (form.scale_at,) if form.min_at is None else (form.scale_at, form.min_at)


def matrix(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal weights with a few outliers, the same for the same ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 0.02
    outliers = torch.rand(shape, generator=generator) < 1e-3
    return torch.where(outliers, values * 30, values).to(dtype)


def planes_of(form: WeightFormat, weight: Tensor) -> dict[str, Tensor]:
    """Of ``weight``; of GGUF's types, which encode nothing, seeded blocks like it."""
    if isinstance(form, BlockType):
        (plane,) = form.planes((weight.shape[0], weight.shape[1]))
        blocks = form.seeded(plane.nbytes // form.nbytes, 0.02, seed=1)
        return {plane.name: blocks.view(plane.shape).to(weight.device)}
    planes = form.encode(weight)
    assert planes is not None
    return planes
