"""Meta directories: params.json and 1 to 8 consolidated .pth shards."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint import base
from llama.checkpoint.base import Checkpoint, Stored, all_tensors, stretch
from llama.config import ModelConfig
from llama.files import AGAIN, read_json, refuse_pointer
from llama.names import BY_COLUMNS, Cut
from wsm.errors import UnusableInput
from wsm.words import counted

MOST_SHARDS = 8
_EMBEDDING = "tok_embeddings.weight"
_ZIP_MAGIC = b"PK\x03\x04"


class MetaCheckpoint(Checkpoint):
    """Shards are mapped, each opened once; a tensor's parts are copied straight into the place where it is wanted.

    fairscale's model-parallel layers cut q, k, v, w1, w3 and the head by rows, wo and w2 by columns; the embedding was
    cut by columns in Llama 2 and by rows since. Norms are whole in every shard.
    UnusableInput for a missing or damaged file, a missing tensor, or a model that does not run here.
    """

    def __init__(self, directory: Path) -> None:
        paths = _shard_paths(directory)
        params, name = read_json(directory / "params.json"), directory.resolve().name
        # Before the shards are opened: what params.json refuses is named first; the 1 stands for "not known".
        ModelConfig.from_meta(params, name, vocab_size=1)
        self._shards = {path: _open_shard(path) for path in paths}
        config = ModelConfig.from_meta(params, name, vocab_size=self._vocab_size(params["dim"]))
        if not any("output.weight" in shard for shard in self._shards.values()):
            config = dataclasses.replace(config, tied_embeddings=True)
        shapes = dict(all_tensors(config))
        dtype = base.weights_dtype([self._check(name, shape, directory) for name, shape in shapes.items()])
        found = sorted({str(name) for shard in self._shards.values() for name in shard})
        base.refuse_unknown_tensors(directory, found, set(shapes))
        super().__init__(config, dtype, directory, paths)

    def _parts(self, name: str) -> list[Tensor]:
        for path, shard in self._shards.items():
            if not isinstance(shard.get(name), Tensor):
                raise UnusableInput(f"{path} has no tensor {name}: the checkpoint is incomplete or of another model")
        return [shard[name] for shard in self._shards.values()]

    def _vocab_size(self, dim: int) -> int:
        """Rows of the whole embedding: a shard holds all of them where it was cut by columns."""
        parts = self._parts(_EMBEDDING)
        if any(part.dim() != 2 for part in parts):
            raise UnusableInput(f"{next(iter(self._shards))}: {_EMBEDDING} is no matrix; {AGAIN}")
        by_rows = parts[0].shape[1] == dim
        return sum(int(part.shape[0]) for part in parts) if by_rows else int(parts[0].shape[0])

    def _check(self, name: str, shape: tuple[int, ...], directory: Path) -> Stored:
        parts = self._parts(name)
        if len(parts) > 1 and len(shape) == 2 and parts[0].dim() == 2:
            axis = _cut_axis(name, parts[0], shape)
            if shape[axis] % len(parts):
                raise UnusableInput(
                    f"{directory}: dimension {axis} of {name}, {shape[axis]}, cannot be cut in {len(parts)} "
                    "shards: params.json and shards are not of the same model"
                )
            shape = tuple(size // len(parts) if axis == place else size for place, size in enumerate(shape))
        for path, part in zip(self._shards, parts, strict=True):
            stored = Stored(path, name, str(part.dtype).removeprefix("torch."), tuple(part.shape))
            base.check_stored(stored, shape, f"params.json, over {counted(len(parts), 'shard')},")
        return stored

    def fill(self, name: str, out: Tensor, cut: Cut) -> None:
        parts, shape = self._parts(name), self._shapes[name]
        if len(shape) == 1:
            parts = [parts[0].view(1, -1)]
        elif _cut_axis(name, parts[0], shape) == 1:
            parts, out, cut = [part.T for part in parts], out.T, Cut(cut.column, cut.row, cut.columns, cut.rows)
        begin = 0
        for part in parts:  # one below the other
            low, high = max(begin, cut.row), min(begin + len(part), cut.row + cut.rows)
            if low < high:
                found = stretch(part, Cut(low - begin, cut.column, high - low, cut.columns))
                out[low - cut.row : high - cut.row].copy_(found)
            begin += len(part)

    def close(self) -> None:
        self._shards = {path: {} for path in self._shards}


def _cut_axis(name: str, part: Tensor, shape: tuple[int, ...]) -> int:
    """The axis along which the shards cut a matrix of ``shape``."""
    return int(name.endswith(BY_COLUMNS) or (name == _EMBEDDING and part.shape[1] != shape[1]))


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
    base.refuse_foreign_tensors(path, map(str, shard))
    return {name: _plain(path, name, value) if isinstance(value, Tensor) else value for name, value in shard.items()}


def _plain(path: Path, name: object, tensor: Tensor) -> Tensor:
    """The tensor's numbers without what training hung on them; UnusableInput if there are none to be read."""
    if tensor.device.type == "meta":
        raise UnusableInput(f"{path}: {name} is on the meta device, a shape without numbers; save the loaded model")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise UnusableInput(f"{path}: {name} is a sparse tensor, which is not read here; save it after .to_dense()")
    return tensor.detach()
