"""What every checkpoint offers, whatever its files look like."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llama.config import ModelConfig


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
