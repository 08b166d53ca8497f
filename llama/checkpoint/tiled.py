"""Synthetic weights in a weight format: planes that are tiled like the weights themselves, as fast as memory."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from typing import NamedTuple

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


class Rows(NamedTuple):
    """Weights of a matrix that is tiled: ``stretches`` of ``length`` weights each, one behind the other.

    The first begins at ``start`` in the endless tiling, each later one ``stride`` weights behind the one before. Whole
    rows of a matrix are one stretch; of a part of its columns each row is one.
    """

    start: int
    stride: int
    stretches: int
    length: int

    @property
    def weights(self) -> int:
        return self.stretches * self.length

    @property
    def in_pairs(self) -> bool:
        """Whether pairs of weights are pairs of the tiling: none is of two stretches."""
        return self.stretches == 1 or self.length % 2 == self.stride % 2 == 0


def tile_rows_(out: Tensor, twice: Tensor, rows: Rows) -> None:
    """Fill ``out`` with ``rows`` of the tiling of a block that ``twice`` holds two times: many rows in one copy.

    ``length`` is at most the block's. By numpy, as :func:`tile_`.
    """
    matrix, period, row = out.view(rows.stretches, rows.length).numpy(), len(twice) // 2, 0
    while row < rows.stretches:
        begin = (rows.start + row * rows.stride) % period
        count = min(rows.stretches - row, -(-(period - begin) // rows.stride))  # that begin before the block's end
        matrix[row : row + count] = twice.as_strided((count, rows.length), (rows.stride, 1), begin).numpy()
        row += count


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
        self._signs = ((bits >> 8 & 0x80) | (bits & 0x7F)).to(torch.uint8).repeat(2)
        self._pairs: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def planes(self, shape: tuple[int, int], rows: Rows) -> tuple[Plane, ...] | None:
        """The planes of a matrix of these rows; None where it stays plain."""
        return Exact().planes_of(shape, self._seen(rows))

    def fill_(self, planes: Mapping[str, Tensor], rows: Rows) -> None:
        """Fill the planes of rows that are ``in_pairs``, no stretch of several longer than the block."""
        base = Exact().base_of(self._seen(rows))
        planes["base"].fill_(base)
        pairs = rows._replace(
            start=rows.start * (self._period + 1) // 2, stride=rows.stride // 2, length=-(-rows.length // 2)
        )
        for name, block, part in (("signs", self._signs, rows), ("codes", self._in_pairs(base), pairs)):
            if rows.stretches == 1:
                tile_(planes[name], block[: self._period], part.start % self._period)
            else:
                tile_rows_(planes[name], block, part)
        if rows.weights % 2:
            planes["signs"][-1] = 0
            planes["codes"][-1] &= 15
        self._list_escapes_(planes, (self._codes(base) == WINDOW).nonzero().flatten(), rows)

    def _list_escapes_(self, planes: Mapping[str, Tensor], escapes: Tensor, rows: Rows) -> None:
        """Of a matrix, by those of the block."""
        begins = self._begins(rows)
        rounds = torch.arange(-(-(int(begins.max()) + rows.length) // self._period)).unsqueeze(1) * self._period
        endless = (rounds + escapes).flatten()
        first, end = torch.searchsorted(endless, begins), torch.searchsorted(endless, begins + rows.length)
        found = end - first
        row = torch.arange(rows.stretches).repeat_interleave(found)
        inside = torch.arange(len(row)) + (end - found.cumsum(0))[row]
        at = endless[inside] - begins[row] + row * rows.length
        ends = torch.arange(1, planes["counts"].numel() + 1) * BLOCK_WEIGHTS
        planes["counts"].copy_(torch.searchsorted(at, ends))
        planes["places"].copy_(at % BLOCK_WEIGHTS)
        planes["exponents"].copy_(self._exponents[endless[inside] % self._period])

    def _begins(self, rows: Rows) -> Tensor:
        return (rows.start % self._period + torch.arange(rows.stretches) * rows.stride) % self._period

    def _seen(self, rows: Rows) -> Tensor:
        """How often each exponent is in these rows."""
        if rows.stretches == 1:
            start = rows.start % self._period
            whole, end = divmod(start + rows.length, self._period)
            return whole * self._counted[-1] + self._before(end) - self._before(start)
        begins, (whole, rest) = self._begins(rows), divmod(rows.length, self._period)
        ends = begins + rest
        # In how many stretches each weight of the block is, by where they begin and end.
        inside = torch.zeros(self._period, dtype=torch.float64)
        inside.index_add_(0, begins, torch.ones(rows.stretches, dtype=torch.float64))
        inside.index_add_(0, ends % self._period, torch.ones(rows.stretches, dtype=torch.float64), alpha=-1)
        inside[0] += int((ends >= self._period).sum()) + whole * rows.stretches
        return self._exponents.bincount(inside.cumsum_(0), minlength=256).long()  # sums below 2^53 are exact

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
                self._pairs[base] = pairs[torch.arange(self._period) * 2 % self._period].repeat(2)
            return self._pairs[base]
