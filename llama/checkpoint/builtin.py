"""The built-in model: 48 tiny layers of seeded random weights, written once and then opened like any other model."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from llama.checkpoint.base import Checkpoint, all_tensors
from llama.checkpoint.hf import HFCheckpoint, hf_name, to_halves
from llama.checkpoint.hf_files import SINGLE
from llama.checkpoint.synthetic import SyntheticCheckpoint
from llama.config import ModelConfig
from wsm.disk.atomic import NO_ROOM
from wsm.errors import DoesNotFit, UnusableInput

_HF_CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 768,
    "vocab_size": 320,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 256,
    "eos_token_id": 257,
}
"""Layers enough for the default flags to leave some on every tier; room in the vocabulary for the byte tokenizer."""

# The name is part of the cache directory's: change it when the weights change.
BUILTIN = ModelConfig.from_hf(_HF_CONFIG, "builtin-v1")


def builtin_checkpoint(cache_dir: Path) -> Checkpoint:
    """The built-in model, bfloat16, about 80 MB; made in ``cache_dir`` at the first call.

    It is written beside its place and then renamed: an interrupted call leaves no half of a model, and of two
    processes that make it at once one wins and both go on. UnusableInput if it cannot be written, DoesNotFit if there
    is no room.
    """
    directory = cache_dir / BUILTIN.name
    if not directory.is_dir():
        try:
            _make(directory)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise DoesNotFit(
                    f"the built-in model takes 0.08 GB in {directory}: {error.strerror}; make room, or name another "
                    "--cache-dir"
                ) from error
            raise UnusableInput(
                f"the built-in model cannot be written to {directory} ({error.strerror}); name another --cache-dir"
            ) from error
    try:
        return HFCheckpoint(directory)
    except UnusableInput as error:
        raise UnusableInput(f"the built-in model in {directory} is damaged; delete that directory ({error})") from error


def _make(directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        (beside / SINGLE).write_bytes(save(_weights(), metadata={"format": "pt"}))  # its own writer has no OSError
        tokenizer: dict[str, object] = {"tokenizer_class": "ByteTokenizer"}  # as llama/tokenizer.py knows it
        for file, content in (("config.json", _HF_CONFIG), ("tokenizer_config.json", tokenizer)):
            (beside / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        # The temporary directory is the owner's alone, which would hide a shared cache.
        beside.chmod(0o755)
        with contextlib.suppress(OSError):  # another process was first, and its copy is the same
            os.rename(beside, directory)
        if not directory.is_dir():
            raise OSError(None, "the finished directory could not be renamed")
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _weights() -> dict[str, Tensor]:
    synthetic = SyntheticCheckpoint(BUILTIN, seed=0, dtype=torch.bfloat16)
    heads = {"wq": BUILTIN.n_heads, "wk": BUILTIN.n_kv_heads}
    tensors = {}
    for name, shape in all_tensors(BUILTIN):
        out = torch.empty(shape, dtype=torch.bfloat16)
        synthetic.read_into(name, out)
        short = name.split(".")[-2]
        tensors[hf_name(name)] = to_halves(out, heads[short]) if short in heads else out
    return tensors
