"""Named tensors of a model, lazily: Meta .pth shards, Hugging Face safetensors, synthetic weights."""

from pathlib import Path

from llama.checkpoint.base import Checkpoint, SourceFile
from llama.checkpoint.hf import HFCheckpoint
from llama.checkpoint.meta import MetaCheckpoint
from llama.checkpoint.synthetic import SyntheticCheckpoint, synthetic_checkpoint
from llama.config import UnusableInput

__all__ = ["Checkpoint", "SourceFile", "SyntheticCheckpoint", "open_checkpoint", "synthetic_checkpoint"]


def open_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint in ``directory``: Meta's if it holds params.json, Hugging Face's if it holds config.json.

    Raises:
        UnusableInput: if there is no such directory, or nothing in it that runs here.
    """
    if not directory.is_dir():
        raise UnusableInput(f"--checkpoints {directory}: no such directory")
    if (directory / "params.json").exists():
        return MetaCheckpoint(directory)
    if (directory / "config.json").exists():
        return HFCheckpoint(directory)
    raise UnusableInput(
        f"--checkpoints {directory}: neither params.json (Meta) nor config.json (Hugging Face) is in it"
    )
