"""A rank's share of a model: what of each tensor it holds, and the shape of the smaller model that it computes.

As in fairscale's model-parallel layers: q, k, v (by heads), w1, w3, the embedding and the head are cut by rows, wo and
w2 by columns; norms are whole on every rank. The share is a LLaMA of fewer heads, a narrower feed-forward block and a
smaller vocabulary, so layouts, KV and memory follow from its :class:`ModelConfig` as from any other.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from llama.checkpoint.base import Checkpoint, all_tensors
from llama.names import BY_COLUMNS, Cut
from wsm.errors import UnusableInput
from wsm.layout.model import Shard, SourceFile


class RankCheckpoint:
    """A checkpoint as one rank sees it: its share of every tensor, under the same name, and no more of it read."""

    def __init__(self, whole: Checkpoint, shard: Shard) -> None:
        self.whole, self.shard = whole, shard
        self.config = whole.config.share(shard.size)
        self.dtype = whole.dtype
        self.directory: Path | None = whole.directory
        self._shapes = dict(all_tensors(self.config))

    def _cut(self, name: str) -> Cut | None:
        shape = self._shapes.get(name)
        if shape is None:
            raise UnusableInput(f"{self.config.name} has no tensor {name}")
        if len(shape) == 1:
            return None
        axis = int(name.endswith(BY_COLUMNS))
        return Cut(axis, self.shard.rank * shape[axis], shape[axis])

    def sources(self) -> tuple[SourceFile, ...]:
        return self.whole.sources()

    def read_into(self, name: str, out: Tensor, cut: Cut | None = None) -> None:
        if cut is not None:
            raise ValueError("a rank's share is not cut once more")
        self.whole.read_into(name, out, self._cut(name))

    def first_row(self, name: str, cut: Cut | None = None) -> Tensor | None:
        if cut is not None:
            raise ValueError("a rank's share is not cut once more")
        return self.whole.first_row(name, self._cut(name))

    def close(self) -> None:
        self.whole.close()


def share_of(checkpoint: Checkpoint, shard: Shard) -> Checkpoint:
    """The share of ``shard``; the checkpoint itself where there is only one."""
    return checkpoint if shard.size == 1 else RankCheckpoint(checkpoint, shard)
