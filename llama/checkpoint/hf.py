"""Hugging Face directories: config.json and safetensors, sharded or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama.checkpoint import base
from llama.checkpoint.base import Checkpoint, Stored, all_tensors, stretch
from llama.config import ModelConfig
from llama.files import AGAIN, read_json, refuse_pointer
from llama.names import Cut
from wsm.errors import UnusableInput

_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
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
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def hf_name(name: str) -> str:
    """Hugging Face's name for one of Meta's."""
    short = name.removesuffix(".weight")
    if short in _NAMES:
        return f"{_NAMES[short]}.weight"
    _, layer, rest = short.split(".", 2)
    return f"model.layers.{layer}.{_NAMES[rest]}.weight"


def to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """q or k rows in Meta's order (pairs side by side) from HF's (halves): a view ``[heads, head_dim / 2, 2, dim]``."""
    rows, dim = weight.shape
    return weight.view(heads, 2, rows // heads // 2, dim).transpose(1, 2)


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """The inverse, as a new matrix: q or k rows in HF's order from Meta's."""
    rows, dim = weight.shape
    return weight.view(heads, rows // heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


class HFCheckpoint(Checkpoint):
    """Every file is mapped once; a tensor is copied once, into the place where it is wanted.

    UnusableInput for a missing or damaged file, a missing tensor, or a model that does not run here.
    """

    def __init__(self, directory: Path) -> None:
        config = ModelConfig.from_hf(read_json(directory / "config.json"), directory.resolve().name)
        if (directory / "adapter_config.json").exists():
            raise UnusableInput(f"{directory} holds a LoRA adapter; merge it into the weights and save the whole model")
        files = {path: _open_file(path) for path in _weight_files(directory)}
        where = {name: path for path, file in files.items() for name in file.keys()}  # noqa: SIM118
        self._files = {name: files[path] for name, path in where.items()}
        stored = []
        for name, shape in all_tensors(config):
            theirs = hf_name(name)
            if theirs not in where:
                raise UnusableInput(
                    f"{directory} has no tensor {theirs}: the checkpoint is incomplete or of another model"
                )
            found = self._files[theirs].get_slice(theirs)
            dtype = _DTYPES.get(found.get_dtype(), found.get_dtype())
            stored.append(Stored(where[theirs], theirs, dtype, tuple(found.get_shape())))
            base.check_stored(stored[-1], shape, "config.json")
        tied_head = {hf_name("output.weight")} if config.tied_embeddings else set[str]()
        base.refuse_unknown_tensors(directory, where, {one.name for one in stored} | tied_head)
        super().__init__(config, base.weights_dtype(stored), directory, list(files))

    def fill(self, name: str, out: Tensor, cut: Cut) -> None:
        # Views of the mapped file: only what is copied is read.
        weight = stretch(self._files[hf_name(name)].get_tensor(hf_name(name)), cut)
        # Un-permuting leaves the first row of a head where it is.
        if name.split(".")[-2] in ("wq", "wk") and cut.rows > 1:
            weight = to_interleaved(weight, cut.rows // self.config.head_dim)
        out.view(weight.shape).copy_(weight)

    def close(self) -> None:
        self._files = {}


def _weight_files(directory: Path) -> list[Path]:
    """The files that the index names; without an index ``model.safetensors``, or else every safetensors file."""
    index = directory / INDEX
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
            raise UnusableInput(f"{index} has no weight_map; {AGAIN}")
        paths = sorted({directory / file for file in shards.values()})
        for path in paths:
            if not path.is_file():
                raise UnusableInput(f"{index} names {path.name}, which is not there: the download is incomplete")
        return paths
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        if pickled := sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt*")):
            raise UnusableInput(
                f"{directory} holds {pickled[0].name} but no .safetensors file; convert it first: load it with "
                "transformers and call save_pretrained"
            )
        raise UnusableInput(f"{directory} holds no .safetensors file: the download is incomplete")
    return paths


def _open_file(path: Path) -> Any:
    refuse_pointer(path)
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise UnusableInput(f"{path} is damaged or cut short ({error}); {AGAIN}") from error
    base.refuse_foreign_tensors(path, file.keys())
    return file
