"""Named tensors of a model, lazily: Meta .pth shards, Hugging Face safetensors, GGUF, synthetic, the built-in model."""

from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.base import Checkpoint
from llama.checkpoint.builtin import builtin_checkpoint
from llama.checkpoint.gguf import GGUFCheckpoint, gguf_files
from llama.checkpoint.hf import HFCheckpoint
from llama.checkpoint.meta import MetaCheckpoint
from llama.checkpoint.synthetic import SyntheticCheckpoint
from llama.checkpoint.synthetic_spec import (
    SYNTHETIC_DRAFT,
    is_of_pair,
    shape_without_layers,
    synthetic_checkpoint,
    synthetic_draft,
)
from llama.config import ModelConfig
from llama.files import read_json
from llama.names import Cut
from wsm.errors import UnusableInput

__all__ = [
    "SYNTHETIC_DRAFT",
    "Checkpoint",
    "SyntheticCheckpoint",
    "WeightlessCheckpoint",
    "builtin_checkpoint",
    "has_weights",
    "is_of_pair",
    "open_checkpoint",
    "shape_without_layers",
    "synthetic_checkpoint",
    "synthetic_draft",
]


def open_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint there; UnusableInput for none.

    It is a GGUF file, or in a directory Meta's if it has params.json and shards, the one GGUF model that is alone
    there, or Hugging Face's.
    """
    if not directory.exists():
        raise UnusableInput(
            f"--checkpoints {directory}: no such directory or file; nothing is downloaded here, name one on this "
            "machine"
        )
    if not directory.is_dir():
        if directory.suffix == ".gguf":
            return GGUFCheckpoint(gguf_files(directory))
        raise UnusableInput(
            f"--checkpoints {directory}: this is no directory, nor a .gguf file; name the directory that holds the "
            "model's files"
        )
    has_shards = any(directory.glob("consolidated.*.pth"))
    has_config = (directory / "config.json").exists()
    if (directory / "params.json").exists() and (has_shards or not has_config):
        return MetaCheckpoint(directory)
    in_gguf = [] if has_shards or any(directory.glob("*.safetensors")) else gguf_files(directory)
    if in_gguf:
        return GGUFCheckpoint(in_gguf)
    if has_config:
        return HFCheckpoint(directory)
    if has_shards:
        raise UnusableInput(f"--checkpoints {directory}: params.json is missing beside the shards; download it too")
    if (directory / "adapter_config.json").exists():
        raise UnusableInput(f"--checkpoints {directory}: a LoRA adapter alone; merge it into its base model first")
    raise UnusableInput(
        f"--checkpoints {directory}: neither params.json (Meta) nor config.json (Hugging Face) nor a .gguf file is in "
        "it; name the directory that holds the model's files, or a GGUF file"
    )


def has_weights(directory: Path) -> bool:
    """Whether any file in ``directory`` can hold weights that run here."""
    return any(any(directory.glob(name)) for name in ("consolidated.*.pth", "*.safetensors", "*.gguf"))


class WeightlessCheckpoint(Checkpoint):
    """A directory without its shards: enough for a run from a packed store, which people keep when they delete them.

    ``config`` is what the store's manifest says; version 1 says nothing, and then the directory's own file counts;
    UnusableInput if there is none either.
    """

    has_weights = False

    def __init__(self, directory: Path, config: ModelConfig | None = None) -> None:
        for file, read in (("params.json", ModelConfig.from_meta), ("config.json", ModelConfig.from_hf)):
            if config is None and (directory / file).exists():
                config = read(read_json(directory / file), directory.resolve().name)
        if config is None:
            raise UnusableInput(
                f"--checkpoints {directory}: neither params.json nor config.json is in it; name the directory that "
                "holds the model's files"
            )
        super().__init__(config, torch.bfloat16, directory)

    def fill(self, name: str, out: Tensor, cut: Cut) -> None:
        raise UnusableInput(
            f"{self.directory} holds no weights: only a packed store of mode mixed, stream or preload runs"
        )
