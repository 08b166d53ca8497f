"""Hugging Face directories: config.json and safetensors, sharded or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama.checkpoint import base
from llama.checkpoint.base import Checkpoint, Stored, all_tensors, stretch
from llama.config import ModelConfig
from llama.files import AGAIN, read_json, refuse_pointer
from llama.names import Cut
from llama.rope import ambiguous_rope
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
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_COMPARED_ROWS = 4096


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
        fields, name = read_json(directory / "config.json"), directory.resolve().name
        config = ModelConfig.from_hf(fields, name)
        _refuse_adapted(directory)
        files = {path: _open_file(path) for path in _weight_files(directory, fields)}
        where = {name: path for path, file in files.items() for name in file.keys()}  # noqa: SIM118
        self._files = {name: files[path] for name, path in where.items()}
        self._embedding, found = _EMBEDDING, [ambiguous_rope(fields, f"{name}/config.json")]
        if config.tied_embeddings and _HEAD in where:
            config, warning = self._untie(config, directory)
            found.append(warning)
        self.warnings = tuple(warning for warning in found if warning)
        stored = []
        for full_name, shape in all_tensors(config):
            theirs = self._stored_name(full_name)
            if theirs not in where:
                raise UnusableInput(
                    f"{directory} has no tensor {theirs}: the checkpoint is incomplete or of another model"
                )
            stored.append(_describe(self._files[theirs], where[theirs], theirs))
            base.check_stored(stored[-1], shape, "config.json")
        tied_head = {_HEAD} if config.tied_embeddings else set[str]()
        base.refuse_unknown_tensors(directory, where, {one.name for one in stored} | tied_head)
        super().__init__(config, base.weights_dtype(stored), directory, list(files))

    def _untie(self, config: ModelConfig, directory: Path) -> tuple[ModelConfig, str | None]:
        """The configuration that a stored head asks for although config.json ties it; the warning where it differs.

        As transformers 5 has it: a head that differs from the embedding counts, and where there is no embedding the
        head is both.
        """
        if _EMBEDDING not in self._files:
            self._embedding = _HEAD
            return config, None
        for name in (_EMBEDDING, _HEAD):
            base.check_stored(
                _describe(self._files[name], directory, name), (config.vocab_size, config.dim), "config.json"
            )
        embedding, head = (self._files[name].get_slice(name) for name in (_EMBEDDING, _HEAD))
        for row in range(0, config.vocab_size, _COMPARED_ROWS):
            rows = slice(row, row + _COMPARED_ROWS)
            if not torch.equal(embedding[rows].float(), head[rows].float()):
                return dataclasses.replace(config, tied_embeddings=False), (
                    f"{config.name}/config.json sets tie_word_embeddings, but {_HEAD} is stored and differs from the "
                    "embedding: the stored head is used, as in transformers"
                )
        return config, None

    def _stored_name(self, name: str) -> str:
        theirs = hf_name(name)
        return self._embedding if theirs == _EMBEDDING else theirs

    def fill(self, name: str, out: Tensor, cut: Cut) -> None:
        # Views of the mapped file: only what is copied is read.
        theirs = self._stored_name(name)
        weight = stretch(self._files[theirs].get_tensor(theirs), cut)
        # Un-permuting leaves the first row of a head where it is.
        if name.split(".")[-2] in ("wq", "wk") and cut.rows > 1:
            weight = to_interleaved(weight, cut.rows // self.config.head_dim)
        out.view(weight.shape).copy_(weight)

    def close(self) -> None:
        self._files = {}


def _describe(file: Any, path: Path, name: str) -> Stored:
    found = file.get_slice(name)
    return Stored(path, name, _DTYPES.get(found.get_dtype(), found.get_dtype()), tuple(found.get_shape()))


def _refuse_adapted(directory: Path) -> None:
    """Refuse (UnusableInput) what is no model in float weights, by the files that tell so beside config.json."""
    if (directory / "adapter_config.json").exists():
        raise UnusableInput(f"{directory} holds a LoRA adapter; merge it into the weights and save the whole model")
    for file, method in (("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")):
        if (directory / file).exists():
            raise UnusableInput(
                f"{directory} holds {file}: a model quantised with {method}, which does not run here; take the same "
                "model in bfloat16 or float16 weights"
            )


def _weight_files(directory: Path, config: Mapping[str, Any]) -> list[Path]:
    """The files with the weights, in transformers' order: what config.json names as ``transformers_weights``, then
    ``model.safetensors``, then the shards of the index; without any of them every safetensors file.
    """
    named = config.get("transformers_weights")
    if named is not None and (not isinstance(named, str) or Path(named).name != named):
        raise UnusableInput(f"{directory}/config.json: transformers_weights must name a file in it, not {named!r:.60}")
    for file in (named,) if named else (SINGLE, INDEX):
        if (directory / file).exists():
            return _shards(directory / file) if file.endswith(".index.json") else [directory / file]
    if named:
        raise UnusableInput(f"{directory} lacks {named}, which config.json names: the download is incomplete")
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        if pickled := sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt*")):
            raise UnusableInput(
                f"{directory} holds {pickled[0].name} but no .safetensors file; convert it first: load it with "
                "transformers and call save_pretrained"
            )
        raise UnusableInput(f"{directory} holds no .safetensors file: the download is incomplete")
    return paths


def _shards(index: Path) -> list[Path]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
        raise UnusableInput(f"{index} has no weight_map; {AGAIN}")
    paths = sorted({index.parent / file for file in shards.values()})
    for path in paths:
        if not path.exists():
            raise UnusableInput(f"{index} names {path.name}, which is not there: the download is incomplete")
    return paths


def _open_file(path: Path) -> Any:
    refuse_pointer(path)
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise UnusableInput(f"{path} is damaged or cut short ({error}); {AGAIN}") from error
    base.refuse_foreign_tensors(path, file.keys())
    return file
