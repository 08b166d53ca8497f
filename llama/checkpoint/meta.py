"""Meta directories: params.json and 1 to 8 consolidated .pth shards."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.base import (
    Stored,
    all_tensors,
    check_stored,
    refuse_foreign_tensors,
    refuse_unknown_tensors,
    source_file,
    stretch,
    weights_dtype,
)
from llama.config import ModelConfig
from llama.files import AGAIN, read_json, refuse_pointer
from llama.names import BY_COLUMNS, Cut
from wsm.errors import UnusableInput
from wsm.layout.model import SourceFile

MOST_SHARDS = 8
_EMBEDDING = "tok_embeddings.weight"
_ZIP_MAGIC = b"PK\x03\x04"


class MetaCheckpoint:
    """Shards are mapped, each opened once; a tensor's parts are copied straight into the place where it is wanted.

    fairscale's model-parallel layers cut q, k, v, w1, w3 and the head by rows, wo and w2 by columns; the embedding was
    cut by columns in Llama 2 and by rows since. Norms are whole in every shard.

    Raises:
        UnusableInput: for a missing or damaged file, a missing tensor, or a model that does not run here.
    """

    def __init__(self, directory: Path) -> None:
        self.directory: Path | None = directory
        self._paths = _shard_paths(directory)
        params, name = read_json(directory / "params.json"), directory.resolve().name
        # Before the shards are opened, so that what params.json refuses is named first; the 1 stands for "not known".
        ModelConfig.from_meta(params, name, vocab_size=1)
        self._shards = [_open_shard(path) for path in self._paths]
        self.config = ModelConfig.from_meta(params, name, vocab_size=self._vocab_size(params["dim"]))
        if not any("output.weight" in shard for shard in self._shards):
            self.config = dataclasses.replace(self.config, tied_embeddings=True)
        self._shapes = dict(all_tensors(self.config))
        self.dtype = weights_dtype([self._check(name, shape) for name, shape in self._shapes.items()])
        found = {str(name) for shard in self._shards for name in shard}
        refuse_unknown_tensors(directory, sorted(found), set(self._shapes))

    def _parts(self, name: str) -> list[Tensor]:
        for path, shard in zip(self._paths, self._shards, strict=True):
            if not isinstance(shard.get(name), Tensor):
                raise UnusableInput(f"{path} has no tensor {name}: the checkpoint is incomplete or of another model")
        return [shard[name] for shard in self._shards]

    def _vocab_size(self, dim: int) -> int:
        """Rows of the whole embedding: a shard holds all of them where it was cut by columns."""
        parts = self._parts(_EMBEDDING)
        if any(part.dim() != 2 for part in parts):
            raise UnusableInput(f"{self._paths[0]}: {_EMBEDDING} is no matrix; {AGAIN}")
        by_rows = parts[0].shape[1] == dim
        return sum(int(part.shape[0]) for part in parts) if by_rows else int(parts[0].shape[0])

    def _cut_axis(self, name: str, part: Tensor, shape: tuple[int, ...]) -> int:
        """The axis along which the shards cut a matrix of ``shape``."""
        return int(name.endswith(BY_COLUMNS) or (name == _EMBEDDING and part.shape[1] != shape[1]))

    def _check(self, name: str, shape: tuple[int, ...]) -> Stored:
        parts = self._parts(name)
        expected = shape
        if len(parts) > 1 and len(shape) == 2 and parts[0].dim() == 2:
            axis = self._cut_axis(name, parts[0], shape)
            if shape[axis] % len(parts):
                raise UnusableInput(
                    f"{self.directory}: dimension {axis} of {name}, {shape[axis]}, cannot be cut in {len(parts)} "
                    "shards: params.json and shards are not of the same model"
                )
            expected = tuple(size // len(parts) if axis == place else size for place, size in enumerate(shape))
        found = [
            Stored(path, name, str(part.dtype).removeprefix("torch."), tuple(part.shape))
            for path, part in zip(self._paths, parts, strict=True)
        ]
        for stored in found:
            check_stored(stored, expected, f"params.json, over {len(parts)} shard(s),")
        return found[0]

    def sources(self) -> tuple[SourceFile, ...]:
        return tuple(source_file(path) for path in self._paths)

    def read_into(self, name: str, out: Tensor, cut: Cut | None = None) -> None:
        parts = self._parts(name)
        if len(parts) == 1 or out.dim() == 1:
            _copy(name, out, stretch(parts[0], cut))
            return
        axis = self._cut_axis(name, parts[0], self._shapes[name])
        for begin, part in _places(parts, axis):
            if cut is None or cut.axis != axis:
                _copy(name, out.narrow(axis, begin, part.shape[axis]), stretch(part, cut))
                continue
            low, high = max(begin, cut.start), min(begin + part.shape[axis], cut.start + cut.length)
            if low < high:
                _copy(name, out.narrow(axis, low - cut.start, high - low), part.narrow(axis, low - begin, high - low))

    def first_row(self, name: str, cut: Cut | None = None) -> Tensor:
        parts = self._parts(name)
        shape = self._shapes[name]
        if len(shape) == 1:
            return parts[0]
        row, columns = (cut.start, None) if cut is not None and cut.axis == 0 else (0, cut)
        axis = self._cut_axis(name, parts[0], shape)
        if len(parts) > 1 and axis == 1:
            whole = torch.cat([part[row] for part in parts])
        else:
            whole = next(part[row - begin] for begin, part in _places(parts, 0) if row < begin + part.shape[0])
        return whole if columns is None else whole.narrow(0, columns.start, columns.length)

    def close(self) -> None:
        self._shards = [{} for _ in self._paths]


def _shard_paths(directory: Path) -> list[Path]:
    paths = sorted(directory.glob("consolidated.*.pth"))
    if not paths:
        raise UnusableInput(f"{directory} has params.json but no consolidated.NN.pth: the download is incomplete")
    if len(paths) > MOST_SHARDS:
        raise UnusableInput(f"{directory} has {len(paths)} shards; at most {MOST_SHARDS} are read")
    expected = [directory / f"consolidated.{number:02d}.pth" for number in range(len(paths))]
    if missing := sorted(set(expected) - set(paths)):
        raise UnusableInput(f"{directory} lacks {missing[0].name}: the download is incomplete")
    return paths


def _open_shard(path: Path) -> Mapping[str, Tensor]:
    refuse_pointer(path)
    with path.open("rb") as file:
        if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
            raise UnusableInput(f"{path} is damaged, or saved in the format of torch before 1.6; {AGAIN}")
    try:
        shard = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnusableInput(f"{path} holds other things than tensors, or is damaged; {AGAIN}") from error
    except Exception as error:  # what a flipped byte makes the unpickler raise is of every kind
        reason = next(iter(str(error).splitlines()), type(error).__name__).partition(". ")[0]
        raise UnusableInput(f"{path} is damaged or cut short ({reason}); {AGAIN}") from error
    if not isinstance(shard, dict):
        raise UnusableInput(f"{path} holds no dictionary of tensors; {AGAIN}")
    refuse_foreign_tensors(path, map(str, shard))
    return shard


def _places(parts: Sequence[Tensor], axis: int) -> Iterator[tuple[int, Tensor]]:
    """Each shard's part and where it begins in the whole."""
    begin = 0
    for part in parts:
        yield begin, part
        begin += part.shape[axis]


def _copy(name: str, out: Tensor, part: Tensor) -> None:
    if out.shape != part.shape:
        raise UnusableInput(f"{name} has shape {list(part.shape)} in the checkpoint, not {list(out.shape)}")
    out.copy_(part)
