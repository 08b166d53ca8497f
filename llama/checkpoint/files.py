"""What is read and refused alike in every kind of checkpoint file."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash

from wsm.errors import UnusableInput
from wsm.layout.model import SourceFile


class Stored(NamedTuple):
    """A tensor as the files describe it: the file's path, what the file calls it, its dtype and shape."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLES, _SAMPLE_BYTES = 16, 64 << 10


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


def source_file(path: Path) -> SourceFile:
    """The entry for one file: the xxh3-128 of its size and of 64 KiB at 16 even places notices another file.

    So 140 GB need not be read.
    """
    size = path.stat().st_size
    digest = xxhash.xxh3_128(str(size).encode())
    with path.open("rb") as file:
        for place in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * place // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return SourceFile(path.name, size, digest.hexdigest())
