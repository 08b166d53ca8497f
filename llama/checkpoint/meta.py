"""Meta directories: params.json and 1 to 8 consolidated .pth shards."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.base import SourceFile, one_float_dtype, read_json, source_file
from llama.config import ModelConfig, UnusableInput

_MOST_SHARDS = 8
_EMBEDDING = "tok_embeddings.weight"
_ROW_PARALLEL = ("attention.wo.weight", "feed_forward.w2.weight")


class MetaCheckpoint:
    """Shards are mapped, each opened once; a tensor's parts are copied straight into the place where it is wanted.

    fairscale's model-parallel layers cut q, k, v, w1, w3 and the head by rows, wo and w2 by columns; the embedding was
    cut by columns in Llama 2 and by rows since. Norms are whole in every shard.

    Raises:
        UnusableInput: for a missing or damaged file, a missing tensor, or a model that does not run here.
    """

    def __init__(self, directory: Path) -> None:
        self.directory: Path | None = directory
        self._paths = sorted(directory.glob("consolidated.*.pth"))
        if not self._paths:
            raise UnusableInput(f"{directory} has params.json but no consolidated.NN.pth")
        if len(self._paths) > _MOST_SHARDS:
            raise UnusableInput(f"{directory} has {len(self._paths)} shards; at most {_MOST_SHARDS} are read")
        expected = [directory / f"consolidated.{number:02d}.pth" for number in range(len(self._paths))]
        if missing := sorted(set(expected) - set(self._paths)):
            raise UnusableInput(f"{directory} lacks {missing[0].name}: the download is incomplete")
        self._shards = [self._open(path) for path in self._paths]
        embedding = self._parts(_EMBEDDING)[0]
        self.config = ModelConfig.from_meta(
            read_json(directory / "params.json"), directory.name, vocab_size=self._vocab_size(directory)
        )
        self.dtype = one_float_dtype({embedding.dtype, self._parts("layers.0.attention.wq.weight")[0].dtype}, directory)
        if "output.weight" not in self._shards[0]:
            self.config = dataclasses.replace(self.config, tied_embeddings=True)

    def _open(self, path: Path) -> Mapping[str, Tensor]:
        try:
            shard = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, OSError, pickle.UnpicklingError, EOFError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UnusableInput(
                f"{path} is damaged or cut short ({reason}); download it from the original checkpoint again"
            ) from error
        if not isinstance(shard, dict):
            raise UnusableInput(f"{path} holds no dictionary of tensors")
        return shard

    def _vocab_size(self, directory: Path) -> int:
        """Rows of the whole embedding: a shard holds all of them where it was cut by columns."""
        parts = self._parts(_EMBEDDING)
        dim = read_json(directory / "params.json").get("dim")
        by_rows = parts[0].shape[1] == dim
        return sum(int(part.shape[0]) for part in parts) if by_rows else int(parts[0].shape[0])

    def _parts(self, name: str) -> list[Tensor]:
        parts = []
        for path, shard in zip(self._paths, self._shards, strict=True):
            if name not in shard:
                raise UnusableInput(f"{path} has no tensor {name}: the checkpoint is incomplete or of another model")
            parts.append(shard[name])
        return parts

    def sources(self) -> tuple[SourceFile, ...]:
        return tuple(source_file(path) for path in self._paths)

    def read_into(self, name: str, out: Tensor) -> None:
        parts = self._parts(name)
        if not all(part.is_floating_point() for part in parts):
            raise UnusableInput(f"{self._paths[0]}: {name} is {parts[0].dtype}, and only float weights run here")
        if len(parts) == 1 or out.dim() == 1:
            self._copy(name, out, parts[0])
            return
        columns = name.endswith(_ROW_PARALLEL) or (name == _EMBEDDING and parts[0].shape[1] != out.shape[1])
        axis, start = int(columns), 0
        if sum(part.shape[axis] for part in parts) != out.shape[axis]:
            raise UnusableInput(
                f"{self.directory}: the shards of {name} make {sum(part.shape[axis] for part in parts)} "
                f"along dimension {axis}, params.json asks for {out.shape[axis]}"
            )
        for part in parts:
            self._copy(name, out.narrow(axis, start, part.shape[axis]), part)
            start += part.shape[axis]

    def _copy(self, name: str, out: Tensor, part: Tensor) -> None:
        if out.shape != part.shape:
            raise UnusableInput(
                f"{self.directory}: {name} is {list(part.shape)}, params.json asks for {list(out.shape)}"
            )
        out.copy_(part)

    def close(self) -> None:
        self._shards = []
