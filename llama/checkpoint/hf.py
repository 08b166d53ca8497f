"""Hugging Face directories: config.json and safetensors, sharded or not."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama.checkpoint.base import SourceFile, one_float_dtype, read_json, source_file
from llama.config import ModelConfig, UnusableInput

_LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_GLOBAL_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
INDEX = "model.safetensors.index.json"


def hf_name(name: str) -> str:
    """Hugging Face's name for one of Meta's."""
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    _, layer, rest = name.removesuffix(".weight").split(".", 2)
    return f"model.layers.{layer}.{_LAYER_NAMES[rest]}.weight"


def to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """q or k rows in Meta's order (pairs side by side) from HF's (halves): a view ``[heads, head_dim / 2, 2, dim]``."""
    rows, dim = weight.shape
    return weight.view(heads, 2, rows // heads // 2, dim).transpose(1, 2)


class HFCheckpoint:
    """Every file is mapped once, when first needed; a tensor is copied once, into the place where it is wanted.

    Raises:
        UnusableInput: for a missing or damaged file, a missing tensor, or a model that does not run here.
    """

    def __init__(self, directory: Path) -> None:
        self.directory: Path | None = directory
        self.config = ModelConfig.from_hf(read_json(directory / "config.json"), directory.name)
        self._files: dict[Path, Any] = {}
        self._lock = threading.Lock()
        self._where = self._index(directory)
        dtypes = {self._slice(name)[1] for name in ("tok_embeddings.weight", "layers.0.attention.wq.weight")}
        if odd := [dtype for dtype in dtypes if dtype not in _DTYPES]:
            raise UnusableInput(f"{directory} holds weights of dtype {odd[0]}; bfloat16, float16 and float32 run here")
        self.dtype = one_float_dtype({_DTYPES[dtype] for dtype in dtypes}, directory)
        if not self.config.tied_embeddings and "lm_head.weight" not in self._where:
            raise UnusableInput(f"{directory} has no lm_head.weight and config.json does not tie it to the embedding")

    def _index(self, directory: Path) -> dict[str, Path]:
        index = directory / INDEX
        if index.exists():
            content = read_json(index).get("weight_map")
            if not isinstance(content, dict) or not content:
                raise UnusableInput(f"{index} has no weight_map; take it from the original checkpoint again")
            where = {name: directory / file for name, file in content.items()}
            for path in sorted(set(where.values())):
                if not path.is_file():
                    raise UnusableInput(f"{index} names {path.name}, which is not there: the download is incomplete")
            return where
        paths = sorted(directory.glob("*.safetensors"))
        if not paths:
            other = next(iter(sorted(directory.glob("*.bin"))), None)
            hint = f" ({other.name} has to be converted to safetensors first)" if other else ""
            raise UnusableInput(f"{directory} holds no .safetensors file{hint}")
        return {name: path for path in paths for name in self._open(path).keys()}  # noqa: SIM118 - no mapping

    def _open(self, path: Path) -> Any:
        with self._lock:
            if path not in self._files:
                try:
                    self._files[path] = safe_open(path, framework="pt", device="cpu")
                except (SafetensorError, OSError) as error:
                    raise UnusableInput(
                        f"{path} is damaged or cut short ({error}); download it from the original checkpoint again"
                    ) from error
            return self._files[path]

    def _slice(self, name: str) -> tuple[Any, str]:
        theirs = hf_name(name)
        path = self._where.get(theirs)
        if path is None:
            raise UnusableInput(f"{self.directory} has no tensor {theirs}: the checkpoint is incomplete")
        try:
            found = self._open(path).get_slice(theirs)
        except SafetensorError as error:
            raise UnusableInput(f"{path} does not hold {theirs}, which its index names: {error}") from error
        return found, found.get_dtype()

    def sources(self) -> tuple[SourceFile, ...]:
        return tuple(source_file(path) for path in sorted(set(self._where.values())))

    def read_into(self, name: str, out: Tensor) -> None:
        found, dtype = self._slice(name)
        if tuple(found.get_shape()) != tuple(out.shape) or dtype not in _DTYPES:
            raise UnusableInput(
                f"{self._where[hf_name(name)]}: {hf_name(name)} is {dtype} {found.get_shape()}, "
                f"config.json asks for floats of {list(out.shape)}"
            )
        weight = self._open(self._where[hf_name(name)]).get_tensor(hf_name(name))
        heads = {"wq": self.config.n_heads, "wk": self.config.n_kv_heads}.get(name.split(".")[-2])
        if heads is None:
            out.copy_(weight)
        else:
            theirs = to_interleaved(weight, heads)
            out.view(theirs.shape).copy_(theirs)

    def close(self) -> None:
        self._files.clear()
