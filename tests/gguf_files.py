"""GGUF files for tests, written by the ``gguf`` package: of random weights in any mix of types, or of a tiny LLaMA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from llama.checkpoint import Checkpoint
from llama.checkpoint.base import all_tensors
from llama.checkpoint.gguf import gguf_name
from llama.config import ModelConfig
from llama.names import BY_COLUMNS
from tests.tiny import tensors_of
from wsm.formats import registry
from wsm.formats.gguf_blocks import BlockType

CONFIG = ModelConfig("tiny", 256, 3, 4, 2, 64, 512, 320, rope_theta=10000.0, max_position=512)
"""Rows of one and of two blocks of 256 weights."""
K_QUANTS = {"attention.wv.weight": "q6_K", "feed_forward.w2.weight": "q6_K", "output.weight": "q6_K"}
"""As `Q4_K_M` has it, more or less: the rest is q4_K."""
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Values = tuple[np.ndarray[Any, Any], Type]


def typed(tensor: Tensor, kind: str) -> Values:
    """A float32 tensor in a type of GGUF; in those that the package cannot write, random blocks."""
    if tensor.dim() == 1:
        return tensor.numpy(), Type.F32
    if kind in PLAIN:
        narrow = tensor.to(PLAIN[kind])
        whole = narrow.view(torch.uint8).numpy() if kind == "BF16" else narrow.numpy()
        return whole, Type[kind]
    found, rows = Type[kind.upper()], tensor.shape[0]
    weights, _ = gguf.GGML_QUANT_SIZES[found]
    if found.name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        return gguf.quants.quantize(tensor.numpy(), found), found
    seed, block = int(tensor.sum() * 1e3) & 0xFFFF, registry.get(kind)
    assert isinstance(block, BlockType)
    return block.seeded(tensor.numel() // weights, tensor.shape[1] ** -0.5, seed).view(rows, -1).numpy(), found


def mixed(name: str) -> str:
    """The type of a tensor in the mix of :data:`K_QUANTS`."""
    return next((kind for ending, kind in K_QUANTS.items() if name.endswith(ending)), "q4_K")


def metadata(config: ModelConfig) -> dict[str, Any]:
    """What a converter writes of a model's shape."""
    return {
        "llama.block_count": config.n_layers,
        "llama.context_length": config.max_position,
        "llama.embedding_length": config.dim,
        "llama.feed_forward_length": config.ffn_dim,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
    }


def random_tensors(config: ModelConfig = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    """Weights of the order of 1 / sqrt(inputs), by Meta's names."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in all_tensors(config):
        drawn = torch.randn(shape, generator=generator)
        found[name] = 1 + drawn * 0.05 if len(shape) == 1 else drawn / shape[1] ** 0.5
    return found


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    kind: Callable[[str], str] = mixed,
    *,
    fields: Mapping[str, Any] | None = None,
    architecture: str = "llama",
    extra: Mapping[str, Tensor] | None = None,
    **split: int,
) -> Path:
    """A file of ``tensors`` (Meta's names), each of the type ``kind`` says; ``fields`` add to the metadata, None: not
    there. ``split_max_tensors`` makes it several files, of which the first is returned."""
    writer = gguf.GGUFWriter(path, architecture, **split)  # type: ignore[arg-type]
    for key, value in {**metadata(config), **(fields or {})}.items():
        _add(writer, key, value)
    for name, tensor in tensors.items():
        values, found = typed(tensor.float(), kind(name))
        writer.add_tensor(gguf_name(name), values, raw_dtype=found)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return next(iter(sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))), path)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def dequantised(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, by its own name, as the ``gguf`` package reads and decodes it."""
    return {
        tensor.name: torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32))
        for tensor in gguf.GGUFReader(path).tensors
    }


def gguf_of(path: Path, checkpoint: Checkpoint, kind: str = "F32", **more: Any) -> Path:
    """A file of another checkpoint's weights, all in one type."""
    return write_gguf(path, tensors_of(checkpoint), checkpoint.config, lambda name: kind, **more)


def cut_of(name: str, tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's share of a tensor."""
    if tensor.dim() == 1:
        return tensor
    return tensor.chunk(ranks, dim=1 if name.endswith(BY_COLUMNS) else 0)[rank]


def byte_signs() -> list[str]:
    """GPT-2's sign of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    signs = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [signs[byte] for byte in range(256)]


def bpe_fields(size: int, pre: str = "llama-bpe", merges: list[str] | None = None, **more: Any) -> dict[str, Any]:
    """A tokenizer of all bytes, what ``merges`` make, BOS, EOS (both control), and unused tokens up to ``size``."""
    tokens = [*byte_signs(), *(merge.replace(" ", "") for merge in merges or ["\u0120 \u0120"])]
    special = [len(tokens), len(tokens) + 1]
    tokens += ["<|begin|>", "<|end|>"]
    types = [1] * special[0] + [3, 3] + [5] * (size - len(tokens))
    tokens += [f"<unused{number}>" for number in range(size - len(tokens))]
    named = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": merges or ["\u0120 \u0120"],
        "bos_token_id": special[0],
        "eos_token_id": special[1],
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in named.items()}
