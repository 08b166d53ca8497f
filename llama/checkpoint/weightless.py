"""A checkpoint directory without its weights: the model's shape and tokenizer, beside a packed store."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.base import Checkpoint
from llama.config import ModelConfig
from llama.files import read_json
from llama.names import Cut
from wsm.errors import UnusableInput


def has_weights(directory: Path) -> bool:
    """Whether any file in ``directory`` can hold weights that run here."""
    return any(directory.glob("consolidated.*.pth")) or any(directory.glob("*.safetensors"))


class WeightlessCheckpoint(Checkpoint):
    """Enough of a checkpoint for a run from a packed store, which people keep when they delete the shards.

    Args:
        config: what the store's manifest says; version 1 says nothing, and then the directory's own file counts.

    Raises:
        UnusableInput: if the directory says no model's shape either.
    """

    def __init__(self, directory: Path, config: ModelConfig | None = None) -> None:
        for file, read in (("params.json", ModelConfig.from_meta), ("config.json", ModelConfig.from_hf)):
            if config is None and (directory / file).exists():
                config = read(read_json(directory / file), directory.resolve().name)
        if config is None:
            raise UnusableInput(f"--checkpoints {directory}: neither params.json nor config.json is in it")
        super().__init__(config, torch.bfloat16, directory)

    def _fill(self, name: str, out: Tensor, cut: Cut | None) -> None:
        raise UnusableInput(
            f"{self.directory} holds no weights: only a packed store of mode mixed, stream or preload runs"
        )

    def first_row(self, name: str, cut: Cut | None = None) -> None:
        return None
