"""The safetensors files of a Hugging Face directory: which ones count, and their tensors by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama.checkpoint.base import Stored
from llama.files import AGAIN, read_json, refuse_pointer
from wsm.errors import UnusableInput

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class TensorFiles:
    """Every file is mapped once; a tensor is a view of its file, of which only what is copied is read.

    UnusableInput for a missing or damaged file. ``config`` is config.json.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        self.directory = directory
        files = {path: _open_file(path) for path in _weight_files(directory, config)}
        self.paths = list(files)
        self._where = {name: path for path, file in files.items() for name in file.keys()}  # noqa: SIM118
        self._files = {name: files[path] for name, path in self._where.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def path(self, name: str) -> Path:
        return self._where[name]

    def describe(self, name: str) -> Stored:
        """UnusableInput where there is no such tensor."""
        if name not in self._where:
            raise UnusableInput(
                f"{self.directory} has no tensor {name}: the checkpoint is incomplete or of another model"
            )
        found = self.part(name)
        return Stored(
            self._where[name], name, _DTYPES.get(found.get_dtype(), found.get_dtype()), tuple(found.get_shape())
        )

    def part(self, name: str) -> Any:
        """To be sliced: then no more is read."""
        return self._files[name].get_slice(name)

    def tensor(self, name: str) -> Tensor:
        found: Tensor = self._files[name].get_tensor(name)
        return found

    def close(self) -> None:
        self._files = {}


def _weight_files(directory: Path, config: Mapping[str, Any]) -> list[Path]:
    """The files with the weights, in transformers' order: what config.json names as ``transformers_weights``, then
    ``model.safetensors``, then the shards of the index; without any of them every safetensors file.
    """
    named = config.get("transformers_weights")
    if named is not None and (not isinstance(named, str) or Path(named).name != named):
        raise UnusableInput(f"{directory}/config.json: transformers_weights must name a file in it, not {named!r:.60}")
    for file in (named,) if named else (SINGLE, INDEX):
        if (directory / file).exists():
            return _shards(directory / file) if file.endswith(".index.json") else [directory / file]
    if named:
        raise UnusableInput(f"{directory} lacks {named}, which config.json names: the download is incomplete")
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        if pickled := sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt*")):
            raise UnusableInput(
                f"{directory} holds {pickled[0].name} but no .safetensors file; convert it first: load it with "
                "transformers and call save_pretrained"
            )
        raise UnusableInput(f"{directory} holds no .safetensors file: the download is incomplete")
    return paths


def _shards(index: Path) -> list[Path]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
        raise UnusableInput(f"{index} has no weight_map; {AGAIN}")
    paths = sorted({index.parent / file for file in shards.values()})
    for path in paths:
        if not path.exists():
            raise UnusableInput(f"{index} names {path.name}, which is not there: the download is incomplete")
    return paths


def _open_file(path: Path) -> Any:
    refuse_pointer(path)
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise UnusableInput(f"{path} is damaged or cut short ({error}); {AGAIN}") from error
    return file
