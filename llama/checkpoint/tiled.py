"""Synthetic weights in a weight format: planes that are tiled like the weights themselves, as fast as memory."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from wsm.formats.exact import BLOCK_WEIGHTS, WINDOW, Exact, count_exponents
from wsm.formats.format import Plane, WeightFormat
from wsm.formats.gguf_blocks import BlockType

_ROWS, _COLUMNS = 1023, 1024
"""Of the matrix whose planes are tiled."""
_GGUF_BLOCKS = 32771
"""A prime number of them: no two rows of a matrix of fewer rows are alike."""
_COUNTED = 4096
"""Exponents are counted once for so many weights of the block."""


def tile_(out: Tensor, block: Tensor, start: int) -> None:
    """Fill ``out`` with ``block``, a list of elements or of rows of them, over and over, from its ``start`` on.

    By numpy, each thread alone: torch would cut every copy into shares for threads of its own, for each of those here.
    """
    flat, source, place = out.view(-1, *block.shape[1:]).numpy(), block.numpy(), 0
    while place < len(flat):
        count = min(len(flat) - place, len(source) - start)
        flat[place : place + count] = source[start : start + count]
        place, start = place + count, 0


def start_of(text: str) -> int:
    """Where the tiling of what is called ``text`` begins; to be taken modulo the block's length."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


class PlaneBlocks:
    """Blocks of the planes of random matrices, for formats whose sizes follow from shapes.

    Each plane is tiled by itself: a group's scale is that of other weights, which have the same distribution. Blocks
    are of odd length, so that no two rows are alike. GGUF's types are tiled in whole blocks of their own.
    """

    def __init__(self, unit: Tensor, std: float, seed: int) -> None:
        self._matrix = (unit[: _ROWS * _COLUMNS] * std).view(_ROWS, _COLUMNS)
        self._std, self._seed = std, seed
        self._blocks: dict[str, dict[str, Tensor]] = {}
        self._lock = threading.Lock()

    def fill_(self, name: str, weight_format: WeightFormat, planes: Mapping[str, Tensor]) -> None:
        """Fill the planes of the matrix called ``name``."""
        blocks = self._of(weight_format)
        for plane, out in planes.items():
            block = blocks[plane]
            tile_(out.view(block.dtype), block, start_of(f"{self._seed} {name} {plane}") % len(block))

    def _of(self, weight_format: WeightFormat) -> dict[str, Tensor]:
        with self._lock:
            if weight_format.name not in self._blocks and isinstance(weight_format, BlockType):
                blocks = weight_format.seeded(_GGUF_BLOCKS, self._std, self._seed)
                self._blocks[weight_format.name] = {"blocks": blocks}
            elif weight_format.name not in self._blocks:
                made = weight_format.encode(self._matrix)
                assert made is not None
                flat = {name: plane.flatten() for name, plane in made.items()}
                odd = {name: plane[: plane.numel() - (plane.numel() + 1) % 2] for name, plane in flat.items()}
                # As whole numbers of their size, which can be copied on every device.
                whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
                self._blocks[weight_format.name] = {n: p.view(whole[p.dtype.itemsize]) for n, p in odd.items()}
            return self._blocks[weight_format.name]


class TiledExact:
    """What ``exact`` makes of a bfloat16 block that is tiled, without tiling it first: the same planes.

    With an odd period N, weight i is ``block[(start + i) % N]``, so pair j is ``pairs[(start + 2 j) % N]``: a tiling
    too, of the pairs in steps of two.
    """

    def __init__(self, block: Tensor) -> None:
        bits = block.contiguous().view(torch.int16)
        self._period, self._bits = block.numel(), bits
        parts = [count_exponents(part) for part in bits.split(_COUNTED)]
        self._counted = torch.stack([torch.zeros(256, dtype=torch.int64), *parts]).cumsum(0)
        self._exponents = (bits >> 7).to(torch.uint8)
        self._signs = ((bits >> 8 & 0x80) | (bits & 0x7F)).to(torch.uint8)
        self._pairs: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def planes(self, shape: tuple[int, int], start: int) -> tuple[Plane, ...] | None:
        """The planes of a matrix that begins at ``start``; None where it stays plain."""
        return Exact().planes_of(shape, self._seen(start % self._period, shape[0] * shape[1]))

    def fill_(self, planes: Mapping[str, Tensor], shape: tuple[int, int], start: int) -> None:
        """Fill planes of these sizes."""
        start, weights = start % self._period, shape[0] * shape[1]
        base = Exact().base_of(self._seen(start, weights))
        planes["base"].fill_(base)
        tile_(planes["signs"], self._signs, start)
        tile_(planes["codes"], self._in_pairs(base), start * (self._period + 1) // 2 % self._period)
        if weights % 2:
            planes["signs"][-1] = 0
            planes["codes"][-1] &= 15
        escapes = (self._codes(base) == WINDOW).nonzero().flatten()
        rounds = torch.arange(-(-(start + weights) // self._period)).unsqueeze(1) * self._period
        at = (rounds + escapes - start).flatten()
        inside = (at >= 0) & (at < weights)
        listed = at[inside]
        ends = torch.arange(1, planes["counts"].numel() + 1) * BLOCK_WEIGHTS
        planes["counts"].copy_(torch.searchsorted(listed, ends))
        planes["places"].copy_(listed % BLOCK_WEIGHTS)
        planes["exponents"].copy_(self._exponents[escapes].repeat(len(rounds))[inside])

    def _seen(self, start: int, weights: int) -> Tensor:
        whole, end = divmod(start + weights, self._period)
        return whole * self._counted[-1] + self._before(end) - self._before(start)

    def _before(self, place: int) -> Tensor:
        """How often each exponent is in the block's first weights."""
        known = place // _COUNTED
        return self._counted[known] + count_exponents(self._bits[known * _COUNTED : place])

    def _codes(self, base: int) -> Tensor:
        return (self._exponents - base).clamp_(max=WINDOW)

    def _in_pairs(self, base: int) -> Tensor:
        with self._lock:
            if base not in self._pairs:
                codes = self._codes(base)
                pairs = codes | codes.roll(-1) << 4
                self._pairs[base] = pairs[torch.arange(self._period) * 2 % self._period]
            return self._pairs[base]
