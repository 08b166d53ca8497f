"""Named tensors of a model, lazily: Meta .pth shards, Hugging Face safetensors, synthetic, the built-in model."""

from pathlib import Path

from llama.checkpoint.base import Checkpoint
from llama.checkpoint.builtin import builtin_checkpoint
from llama.checkpoint.hf import HFCheckpoint
from llama.checkpoint.meta import MetaCheckpoint
from llama.checkpoint.synthetic import SyntheticCheckpoint, synthetic_checkpoint
from llama.checkpoint.weightless import WeightlessCheckpoint, has_weights
from wsm.errors import UnusableInput

__all__ = [
    "Checkpoint",
    "SyntheticCheckpoint",
    "WeightlessCheckpoint",
    "builtin_checkpoint",
    "has_weights",
    "open_checkpoint",
    "synthetic_checkpoint",
]


def open_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint in ``directory``: Meta's if it holds params.json and shards, else Hugging Face's.

    Raises:
        UnusableInput: if there is no such directory, or nothing in it that runs here.
    """
    if not directory.exists():
        raise UnusableInput(f"--checkpoints {directory}: no such directory")
    if not directory.is_dir():
        raise UnusableInput(f"--checkpoints {directory}: this is a file; name the directory that it lies in")
    has_shards = any(directory.glob("consolidated.*.pth"))
    has_config = (directory / "config.json").exists()
    if (directory / "params.json").exists() and (has_shards or not has_config):
        return MetaCheckpoint(directory)
    if has_config:
        return HFCheckpoint(directory)
    if has_shards:
        raise UnusableInput(f"--checkpoints {directory}: params.json is missing beside the shards; download it too")
    if (directory / "adapter_config.json").exists():
        raise UnusableInput(f"--checkpoints {directory}: a LoRA adapter alone; merge it into its base model first")
    raise UnusableInput(
        f"--checkpoints {directory}: neither params.json (Meta) nor config.json (Hugging Face) is in it; "
        "name the directory that holds the model's files"
    )
