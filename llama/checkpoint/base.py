"""What every checkpoint offers, whatever its files look like: named tensors, whole or a rank's share of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.files import source_file
from llama.config import ModelConfig
from llama.names import BY_COLUMNS, Cut
from wsm.errors import UnusableInput
from wsm.layout.groups import pass_order
from wsm.layout.model import Shard, SourceFile


class Checkpoint(ABC):
    """Named tensors, lazily, in Meta's names and Meta's RoPE convention.

    Args:
        dtype: of the stored weights.
        directory: None for weights that are in no file.
        paths: the files that hold the weights.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, directory: Path | None = None, paths: Sequence[Path] = ()
    ) -> None:
        self.config, self.dtype, self.directory = config, dtype, directory
        self._paths = paths
        self._shapes = dict(all_tensors(config))

    def sources(self) -> tuple[SourceFile, ...]:
        """The files behind it; for synthetic weights, their recipe."""
        return tuple(map(source_file, self._paths))

    def read_into(self, name: str, out: Tensor, cut: Cut | None = None) -> None:
        """Fill ``out`` (the tensor's shape, any float dtype) with the tensor of that full name; thread-safe.

        Args:
            cut: the stretch of the matrix that is wanted, and the shape of ``out``; q and k are cut between heads.

        Raises:
            UnusableInput: if the model has no such tensor, or one of another shape.
        """
        shape = self._shapes.get(name)
        if shape is not None and cut is not None:
            shape = (*shape[: cut.axis], cut.length, *shape[cut.axis + 1 :])
        if shape != tuple(out.shape):
            raise UnusableInput(f"{self.config.name} has no tensor {name} of shape {list(out.shape)}")
        self._fill(name, out, cut)

    @abstractmethod
    def _fill(self, name: str, out: Tensor, cut: Cut | None) -> None:
        """As :meth:`read_into`, of a tensor that is there."""

    @abstractmethod
    def first_row(self, name: str, cut: Cut | None = None) -> Tensor | None:
        """The first row of a matrix (or of a stretch of it), or a whole vector, without reading the rest.

        None where there are no weights.
        """

    def share(self, shard: Shard) -> Checkpoint:
        """What a rank holds of it, under the same names; itself where there is only one rank."""
        return self if shard.size == 1 else RankCheckpoint(self, shard)

    def close(self) -> None:  # noqa: B027
        """Let go of the files, where there are any."""


class RankCheckpoint(Checkpoint):
    """A rank's share of a checkpoint; no more of it is read.

    As in fairscale's model-parallel layers: q, k, v (by heads), w1, w3, the embedding and the head are cut by rows, wo
    and w2 by columns; norms are whole on every rank. The share is a LLaMA of fewer heads, a narrower feed-forward block
    and a smaller vocabulary, so layouts, KV and memory follow from its :class:`ModelConfig` as from any other.
    """

    def __init__(self, whole: Checkpoint, shard: Shard) -> None:
        super().__init__(whole.config.share(shard.size), whole.dtype, whole.directory)
        self._whole, self._shard = whole, shard

    def _cut(self, name: str, cut: Cut | None) -> Cut | None:
        if cut is not None:
            raise ValueError("a rank's share is not cut once more")
        shape = self._shapes[name]
        if len(shape) == 1:
            return None
        axis = int(name.endswith(BY_COLUMNS))
        return Cut(axis, self._shard.rank * shape[axis], shape[axis])

    def sources(self) -> tuple[SourceFile, ...]:
        return self._whole.sources()

    def _fill(self, name: str, out: Tensor, cut: Cut | None) -> None:
        self._whole.read_into(name, out, self._cut(name, cut))

    def first_row(self, name: str, cut: Cut | None = None) -> Tensor | None:
        return self._whole.first_row(name, self._cut(name, cut))

    def close(self) -> None:
        self._whole.close()


def all_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Full name and shape of every tensor of the model, globals first, then in pass order."""
    for group in (None, *pass_order(config.n_layers)):
        for spec in config.specs(group.kind if group else None):
            yield config.full_name(group, spec.name), spec.shape


def stretch(matrix: Tensor, cut: Cut | None) -> Tensor:
    """A view of the rows or columns that ``cut`` names; all of it without."""
    return matrix if cut is None else matrix.narrow(*cut)
