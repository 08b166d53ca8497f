"""Named tensors of a model, lazily: Meta .pth shards, Hugging Face safetensors, synthetic weights."""

from llama.checkpoint.base import Checkpoint, SourceFile

__all__ = ["Checkpoint", "SourceFile"]
