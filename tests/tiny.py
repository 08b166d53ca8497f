"""Tiny models for tests: random LLaMAs saved as Hugging Face directories and as Meta shards."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama.checkpoint import Checkpoint
from llama.names import full_name
from wsm.layout.groups import pass_order

LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def hf_model(**changes: Any) -> LlamaForCausalLM:
    """A random float32 LLaMA, seeded; small, with grouped queries and an explicit head_dim."""
    fields: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "initializer_range": 0.2,
        **changes,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**fields)).eval()


def hf_directory(directory: Path, model: LlamaForCausalLM, *, dtype: torch.dtype = torch.float32, **save: Any) -> Path:
    """``model`` saved as safetensors in ``directory``."""
    model.to(dtype).save_pretrained(directory, **save)
    model.to(torch.float32)
    return directory


def tensors_of(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by full name."""
    specs = [(None, spec) for spec in checkpoint.config.specs(None)]
    specs += [(g, spec) for g in pass_order(checkpoint.config.n_layers) for spec in checkpoint.config.specs(g.kind)]  # type: ignore[misc]
    tensors = {}
    for group, spec in specs:
        out = torch.full(spec.shape, float("nan"), dtype=dtype)
        checkpoint.read_into(full_name(group, spec.name), out)
        tensors[full_name(group, spec.name)] = out
    return tensors


def meta_params(checkpoint: Checkpoint) -> dict[str, Any]:
    """params.json for a checkpoint's model; its ffn_dim is met through multiple_of."""
    config = checkpoint.config
    params: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "multiple_of": config.ffn_dim,
        "ffn_dim_multiplier": config.ffn_dim / int(8 * config.dim / 3),
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "use_scaled_rope": config.rope_scaling is not None,
    }
    if config.rope_scaling is not None:
        params["rope_scaling_factor"] = config.rope_scaling.factor
    return params


def meta_directory(
    directory: Path, checkpoint: Checkpoint, shards: int = 1, *, columns_embedding: bool = False
) -> Path:
    """``checkpoint`` saved as Meta's consolidated shards, cut as fairscale's layers cut them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(meta_params(checkpoint)))
    tensors = tensors_of(checkpoint, checkpoint.dtype)
    for shard in range(shards):
        cut: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if tensor.dim() == 1:
                cut[name] = tensor
                continue
            by_columns = name.endswith(("wo.weight", "w2.weight")) or (columns_embedding and "tok_embeddings" in name)
            cut[name] = tensor.chunk(shards, dim=int(by_columns))[shard].clone()
        torch.save(cut, directory / f"consolidated.{shard:02d}.pth")
    return directory


def llama3_tokenizer(path: Path, merges: int = 40) -> int:
    """A ``tokenizer.model`` as Llama 3's: 256 bytes and ``merges`` pairs of letters; gives the number of its ids."""
    pairs = [bytes((first, second)) for first in b" abcdefghi" for second in b"etaoinshr"]
    tokens = [bytes([byte]) for byte in range(256)] + pairs[:merges]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    path.write_text("\n".join(lines) + "\n")
    return len(tokens) + 256


def hf_tokenizer(directory: Path, size: int = 300, **tokenizer_config: Any) -> Path:
    """A byte-level ``tokenizer.json`` of ``size`` ids, most of them bytes.

    256 and 257 are ``<s>`` and ``</s>``, which tokenizer_config.json names unless told otherwise.
    """
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate(letters)} | {"<s>": 256, "</s>": 257}
    vocabulary |= {f"token{place}": place for place in range(258, size)}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    named = tokenizer_config or {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    return directory
