"""What every checkpoint offers, whatever its files look like."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import xxhash
from torch import Tensor

from llama.config import ModelConfig
from llama.names import Cut
from wsm.errors import UnusableInput
from wsm.layout.groups import pass_order
from wsm.layout.model import SourceFile


class Checkpoint(Protocol):
    """Named tensors, lazily, in Meta's names and Meta's RoPE convention."""

    config: ModelConfig
    dtype: torch.dtype
    """Of the stored weights."""
    directory: Path | None
    """None for weights that lie in no file."""

    def sources(self) -> tuple[SourceFile, ...]:
        """The files behind it; for synthetic weights, their recipe."""

    def read_into(self, name: str, out: Tensor, cut: Cut | None = None) -> None:
        """Fill ``out`` (the tensor's shape, any float dtype) with the tensor of that full name; thread-safe.

        Args:
            cut: the stretch of the matrix that is wanted, and the shape of ``out``; q and k are cut between heads.

        Raises:
            UnusableInput: if the model has no such tensor, or one of another shape.
        """

    def first_row(self, name: str, cut: Cut | None = None) -> Tensor | None:
        """The first row of a matrix (or of a stretch of it), or a whole vector, without reading the rest.

        None where there are no weights.
        """

    def close(self) -> None:
        """Let go of the files."""


class Stored(NamedTuple):
    """A tensor as the files describe it: the file's path, what the file calls it, its dtype and shape."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLES, _SAMPLE_BYTES = 16, 64 << 10


def all_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Full name and shape of every tensor of the model, globals first, then in pass order."""
    for group in (None, *pass_order(config.n_layers)):
        for spec in config.specs(group.kind if group else None):
            yield config.full_name(group, spec.name), spec.shape


def stretch(matrix: Tensor, cut: Cut | None) -> Tensor:
    """A view of the rows or columns that ``cut`` names; all of it without."""
    return matrix if cut is None else matrix.narrow(*cut)


def check_stored(stored: Stored, shape: tuple[int, ...], config_file: str) -> None:
    """Refuse a tensor that is no float or has another shape than ``config_file`` asks for.

    Raises:
        UnusableInput: naming the file and the tensor.
    """
    if stored.dtype not in FLOATS:
        raise UnusableInput(
            f"{stored.path}: {stored.name} is of dtype {stored.dtype}; only {', '.join(FLOATS)} weights run here, "
            "so take the unquantised checkpoint"
        )
    if stored.shape != shape:
        raise UnusableInput(
            f"{stored.path}: {stored.name} has shape {list(stored.shape)}, but {config_file} asks for {list(shape)}: "
            "the two are not of the same model"
        )


def weights_dtype(matrices: Iterable[Stored]) -> torch.dtype:
    """The dtype that holds every matrix without loss; norms do not count, they are often wider than the rest."""
    return functools.reduce(torch.promote_types, {FLOATS[stored.dtype] for stored in matrices if len(stored.shape) > 1})


def refuse_unknown_tensors(where: Path, names: Iterable[str], known: set[str]) -> None:
    """Refuse tensors that the model's shape has no place for: leaving them out would give another model's tokens.

    Raises:
        UnusableInput: naming the first such tensor.
    """
    for name in names:
        if name not in known and not name.endswith(("rotary_emb.inv_freq", "rope.freqs")):
            raise UnusableInput(
                f"{where} holds tensor {name}, which a plain LLaMA of this configuration has no place for: "
                "it is another architecture, or has more layers than its configuration says"
            )


def refuse_foreign_tensors(path: Path, names: Iterable[str]) -> None:
    """Refuse biases and LoRA adapters, which are no plain LLaMA's.

    Raises:
        UnusableInput: naming the file and the first such tensor.
    """
    for name in names:
        if name.endswith(".bias") or "lora_" in name:
            raise UnusableInput(
                f"{path}: tensor {name} belongs to no plain LLaMA; biases do not run here, and LoRA adapters have to "
                "be merged into the weights first"
            )


def sampled_digest(path: Path) -> str:
    """xxh3-128 of a file's size and of 64 KiB at 16 even places: notices another file without reading 140 GB."""
    size = path.stat().st_size
    digest = xxhash.xxh3_128(str(size).encode())
    with path.open("rb") as file:
        for place in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * place // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def source_file(path: Path) -> SourceFile:
    """The entry for one file of a checkpoint."""
    return SourceFile(path.name, path.stat().st_size, sampled_digest(path))
