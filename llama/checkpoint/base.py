"""What every checkpoint offers, whatever its files look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import xxhash
from torch import Tensor

from llama.config import ModelConfig, UnusableInput


class SourceFile(NamedTuple):
    """A file that weights come from; ``digest`` is a sample of its content, cheap at any size."""

    name: str
    size: int
    digest: str


class Checkpoint(Protocol):
    """Named tensors, lazily, in Meta's names and Meta's RoPE convention."""

    config: ModelConfig
    dtype: torch.dtype
    """Of the stored weights."""
    directory: Path | None

    def sources(self) -> tuple[SourceFile, ...]:
        """The files behind it; for synthetic weights, their recipe."""

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill ``out`` (the tensor's shape, any float dtype) with the tensor of that full name; thread-safe.

        Raises:
            UnusableInput: if the checkpoint has no such tensor, or one of another shape, or a file is damaged.
        """

    def close(self) -> None:
        """Let go of the files."""


SAMPLES, SAMPLE_BYTES = 16, 64 << 10


def sampled_digest(path: Path) -> str:
    """xxh3-128 of a file's size and of 64 KiB at 16 even places: notices another file without reading 140 GB."""
    size = path.stat().st_size
    digest = xxhash.xxh3_128(str(size).encode())
    with path.open("rb") as file:
        for place in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * place // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def source_file(path: Path) -> SourceFile:
    """The entry for one file of a checkpoint."""
    return SourceFile(path.name, path.stat().st_size, sampled_digest(path))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        UnusableInput: if it is missing, no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnusableInput(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UnusableInput(
            f"{path} is damaged (no JSON: {error}); take it from the original checkpoint again"
        ) from error
    if not isinstance(content, dict):
        raise UnusableInput(f"{path} holds no JSON object; take it from the original checkpoint again")
    return content


def one_float_dtype(dtypes: set[torch.dtype], where: Path) -> torch.dtype:
    """The dtype of the weights: the widest of a mixture.

    Raises:
        UnusableInput: for a dtype that is not bfloat16, float16 or float32.
    """
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if dtype in dtypes:
            found = dtype
            break
    if odd := dtypes - {torch.float32, torch.bfloat16, torch.float16}:
        raise UnusableInput(f"{where} holds weights of dtype {odd.pop()}; bfloat16, float16 and float32 run here")
    return found
