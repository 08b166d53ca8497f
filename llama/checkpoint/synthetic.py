"""Random weights in a real model's shape: no file, and the same on every machine.

One block of seeded numbers is tiled over every tensor, each from a start of its own. The block's length is odd, so
that no two rows of a matrix are alike, and filling is a copy: as fast as memory.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from llama.checkpoint.base import Checkpoint, RankCheckpoint
from llama.checkpoint.tiled import PlaneBlocks, Rows, TiledExact, start_of
from llama.config import ModelConfig
from llama.names import Cut
from wsm.formats.exact import Exact
from wsm.formats.format import Plane, WeightFormat
from wsm.layout.groups import Encoded
from wsm.layout.model import Shard, SourceFile

BLOCK_VALUES = (1 << 20) + 1
"""2 MiB in bfloat16: stays in a core's cache while it is copied out."""
NORM_STD = 0.05
_SUMMED = 4


class SyntheticCheckpoint(Checkpoint):
    """Matrices around 0 with a standard deviation of 1 / sqrt(dim), norms around 1, from ``seed``.

    So the activations and the logits of a model of any depth are of the order of 1.
    """

    def __init__(self, config: ModelConfig, *, seed: int, dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        self._seed = seed
        self._unit = _unit_block(seed)
        self._blocks: dict[tuple[str, torch.dtype], Tensor] = {}
        self._lock = threading.Lock()
        self._planes = PlaneBlocks(self._unit, 1 / math.sqrt(config.dim), seed)
        self._exact: TiledExact | None = None

    def sources(self) -> tuple[SourceFile, ...]:
        recipe = f"1 {self.config.to_json()} seed={self._seed} block={BLOCK_VALUES} norm={NORM_STD}"
        return (SourceFile(f"synthetic:{self.config.name}", 0, hashlib.sha256(recipe.encode()).hexdigest()[:32]),)

    def fill(self, name: str, out: Tensor, cut: Cut) -> None:
        block = self._block("norm" if name.endswith("norm.weight") else "matrix", out.dtype)
        columns = self._shapes[name][-1]
        begin, row = self.start(name) + cut.row * columns + cut.column, 0
        while row < cut.rows:  # in as few copies as the block's end allows
            start = (begin + row * columns) % BLOCK_VALUES
            count = min(cut.rows - row, -(-(BLOCK_VALUES - start) // columns))
            out[row : row + count].copy_(block.as_strided((count, cut.columns), (columns, 1), start))
            row += count

    def start(self, name: str) -> int:
        """Where the tiling of a tensor begins in the endless block."""
        return start_of(f"{self._seed} {name}")

    def rows(self, name: str, cut: Cut) -> Rows:
        """A part of a matrix as stretches of the tiling."""
        columns = self._shapes[name][-1]
        start = self.start(name) + cut.row * columns + cut.column
        if cut.columns == columns:
            return Rows(start, 0, 1, cut.rows * columns)
        return Rows(start, columns, cut.rows, cut.columns)

    def share(self, shard: Shard) -> Checkpoint:
        return self if shard.size == 1 else SyntheticShare(self, shard)

    def encode(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        weight_format: WeightFormat,
        importance: Tensor | None = None,
    ) -> Mapping[str, Tensor] | None:
        if importance is not None:
            return super().encode(name, shape, dtype, weight_format, importance)
        return _tiled(self, name, shape, dtype, weight_format)

    def encode_into(self, name: str, out: Encoded, weight_format: WeightFormat) -> None:
        self.tile_into(name, self.rows(name, Cut(0, 0, *out.shape)), out, weight_format)

    def planes(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, weight_format: WeightFormat
    ) -> tuple[Plane, ...] | None:
        return self.tiled_planes(self.rows(name, Cut(0, 0, *shape)), (shape[0], shape[1]), dtype, weight_format)

    def tile_into(self, name: str, rows: Rows, out: Encoded, weight_format: WeightFormat) -> None:
        """Planes of a part of the tiling: in ``exact`` of those ``rows``, else blocks of their own."""
        if isinstance(weight_format, Exact):
            self._tiled_exact().fill_(out.planes, rows)
        else:
            self._planes.fill_(name, weight_format, out.planes)

    def tiled_planes(
        self, rows: Rows, shape: tuple[int, int], dtype: torch.dtype, weight_format: WeightFormat
    ) -> tuple[Plane, ...] | None:
        """The planes that :meth:`tile_into` fills; None where the matrix stays plain."""
        if isinstance(weight_format, Exact):
            return self._tiled_exact().planes(shape, rows)
        return weight_format.planes(shape, dtype)

    def _tiled_exact(self) -> TiledExact:
        block = self._block("matrix", torch.bfloat16)[:BLOCK_VALUES]
        with self._lock:
            self._exact = self._exact or TiledExact(block)
            return self._exact

    def _block(self, role: Literal["norm", "matrix"], dtype: torch.dtype) -> Tensor:
        """The block in a role, its beginning once more behind it: a row may go over its end."""
        with self._lock:
            if (role, dtype) not in self._blocks:
                values = 1 + self._unit * NORM_STD if role == "norm" else self._unit / math.sqrt(self.config.dim)
                widest = max(shape[-1] for shape in self._shapes.values())
                self._blocks[role, dtype] = torch.cat([values, values[:widest]]).to(dtype)
            return self._blocks[role, dtype]


def _tiled(
    source: Checkpoint, name: str, shape: tuple[int, ...], dtype: torch.dtype, weight_format: WeightFormat
) -> Mapping[str, Tensor] | None:
    """The planes that ``source`` tells of, filled by itself."""
    if (planned := source.planes(name, shape, dtype, weight_format)) is None:
        return None
    made = {plane.name: torch.empty(plane.shape, dtype=plane.dtype) for plane in planned}
    source.encode_into(name, Encoded(weight_format.name, shape, dtype, made), weight_format)
    return made


class SyntheticShare(RankCheckpoint):
    """A rank's share of synthetic weights; in a format whose planes are blocks of their own, the rank has its own."""

    def __init__(self, whole: SyntheticCheckpoint, shard: Shard) -> None:
        super().__init__(whole, shard)
        self._made = whole

    def encode(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        weight_format: WeightFormat,
        importance: Tensor | None = None,
    ) -> Mapping[str, Tensor] | None:
        if importance is not None or not self._is_tiled(name, weight_format):
            return super().encode(name, shape, dtype, weight_format, importance)
        return _tiled(self, name, shape, dtype, weight_format)

    def encode_into(self, name: str, out: Encoded, weight_format: WeightFormat) -> None:
        if self._is_tiled(name, weight_format):
            self._made.tile_into(f"{name} of rank {self._shard.rank}", self._rows(name), out, weight_format)
        else:
            super().encode_into(name, out, weight_format)

    def planes(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, weight_format: WeightFormat
    ) -> tuple[Plane, ...] | None:
        if self._is_tiled(name, weight_format):
            return self._made.tiled_planes(self._rows(name), (shape[0], shape[1]), dtype, weight_format)
        return super().planes(name, shape, dtype, weight_format)

    def _is_tiled(self, name: str, weight_format: WeightFormat) -> bool:
        """Whether planes are filled as tilings; else they are encoded, which takes many times as long."""
        return not isinstance(weight_format, Exact) or self._rows(name).in_pairs

    def _rows(self, name: str) -> Rows:
        return self._made.rows(name, self._in_whole(name, Cut(0, 0, *self._shapes[name])))


def _unit_block(seed: int) -> Tensor:
    """Nearly normal numbers of variance 1, float32: sums of four uniform ones.

    Whole numbers are drawn and summed, so every machine gets the same bits; torch's own normal numbers differ in the
    last ones with the processor's vector instructions.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(_SUMMED, BLOCK_VALUES, dtype=torch.int16).random_(generator=generator)  # 0 … 2^15 - 1
    middle, std = _SUMMED * (2**15 - 1) // 2, 2**15 * math.sqrt(_SUMMED / 12)
    return (drawn.sum(0, dtype=torch.int32) - middle).to(torch.float32) / std
