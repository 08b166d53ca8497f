"""Hugging Face directories: config.json and safetensors, sharded or not, in float weights or quantised."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint import base
from llama.checkpoint.base import FLOATS, Checkpoint, all_tensors, stretch
from llama.checkpoint.hf_files import TensorFiles
from llama.checkpoint.hf_matrix import QuantisedMatrix
from llama.checkpoint.hf_quantised import NOT_USED, quantised_matrix
from llama.checkpoint.hf_scheme import read_quantisation
from llama.config import ModelConfig
from llama.files import read_json
from llama.names import Cut, renamed
from llama.rope import ambiguous_rope
from wsm.errors import UnusableInput
from wsm.formats.format import WeightFormat

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
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_COMPARED_ROWS = 4096


def hf_name(name: str) -> str:
    """Hugging Face's name for one of Meta's."""
    return renamed(name, _NAMES, "model.layers")


def to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """q or k rows in Meta's order (pairs side by side) from HF's (halves): a view ``[heads, head_dim / 2, 2, dim]``."""
    rows, dim = weight.shape
    return weight.view(heads, 2, rows // heads // 2, dim).transpose(1, 2)


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """The inverse, as a new matrix: q or k rows in HF's order from Meta's."""
    rows, dim = weight.shape
    return weight.view(heads, rows // heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


class HFCheckpoint(Checkpoint):
    """A tensor is copied once, into the place where it is wanted; quantised matrices are unpacked there.

    UnusableInput for a missing or damaged file, a missing tensor, or a model that does not run here.
    """

    def __init__(self, directory: Path) -> None:
        fields, name = read_json(directory / "config.json"), directory.resolve().name
        config = ModelConfig.from_hf(fields, name)
        _refuse_adapter(directory)
        self._quantisation, doubtful = read_quantisation(directory, fields)
        self._files = TensorFiles(directory, fields)
        self._embedding, found = _EMBEDDING, [ambiguous_rope(fields, f"{name}/config.json"), *doubtful]
        if config.tied_embeddings and _HEAD in self._files:
            config, warning = self._untie(config, directory)
            found.append(warning)
        self.warnings = tuple(warning for warning in found if warning)
        self._quantised = self._find_quantised(config)
        theirs = {name for matrix in self._quantised.values() for name in matrix.names} | self._not_used(config)
        base.refuse_foreign_tensors(directory, (name for name in self._files if name not in theirs))
        stored = []
        for full_name, shape in all_tensors(config):
            if full_name not in self._quantised:
                stored.append(self._files.describe(self._stored_name(full_name)))
                base.check_stored(stored[-1], shape, "config.json")
        tied_head = {_HEAD} if config.tied_embeddings else set[str]()
        base.refuse_unknown_tensors(directory, self._files, {one.name for one in stored} | tied_head | theirs)
        dtype = base.weights_dtype(stored) if self._quantisation is None else _computed_in(fields, name)
        # What the codes mean, the description says: changed, it is another model.
        described = [] if self._quantisation is None else [directory / self._quantisation.place]
        super().__init__(config, dtype, directory, [*self._files.paths, *described])

    def _find_quantised(self, config: ModelConfig) -> dict[str, QuantisedMatrix]:
        """By full name, the matrices that the files hold in codes."""
        found = dict[str, QuantisedMatrix]()
        if self._quantisation is None:
            return found
        there = {name.rpartition(".")[0] for name in self._files}
        for name, shape in all_tensors(config):
            module = self._stored_name(name).removesuffix(".weight")
            if len(shape) == 2 and module in there and (scheme := self._quantisation.scheme(module)) is not None:
                matrix = quantised_matrix(self._files, module, (shape[0], shape[1]), scheme)
                if matrix is not None:
                    found[name] = matrix
        return found

    def _not_used(self, config: ModelConfig) -> set[str]:
        """Scales of quantised activations and KV, which a model may bring that was made for them."""
        if self._quantisation is None:
            return set()
        modules = {self._stored_name(name).removesuffix(".weight") for name, _ in all_tensors(config)}
        modules |= {module.rsplit(".", 1)[0] for module in modules if "self_attn" in module}
        return {f"{module}.{part}" for module in modules for part in NOT_USED}

    def _untie(self, config: ModelConfig, directory: Path) -> tuple[ModelConfig, str | None]:
        """The configuration that a stored head asks for although config.json ties it; the warning where it differs.

        As transformers 5 has it: a head that differs from the embedding counts, and where there is no embedding the
        head is both.
        """
        if _EMBEDDING not in self._files:
            self._embedding = _HEAD
            return config, None
        for name in (_EMBEDDING, _HEAD):
            base.check_stored(self._files.describe(name), (config.vocab_size, config.dim), "config.json")
        embedding, head = (self._files.part(name) for name in (_EMBEDDING, _HEAD))
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
        if (matrix := self._quantised.get(name)) is not None:
            weight = torch.empty(cut.rows, cut.columns, dtype=out.dtype)
            matrix.weight_format.decode_(matrix.planes(cut), weight)
        else:
            weight = stretch(self._files.tensor(self._stored_name(name)), cut)
        if _is_rotated(name, cut):
            weight = to_interleaved(weight, cut.rows // self.config.head_dim)
        out.view(weight.shape).copy_(weight)

    def native(self, name: str) -> str | None:
        matrix = self._quantised.get(name)
        return None if matrix is None else matrix.weight_format.name

    def fill_planes(self, name: str, planes: Mapping[str, Tensor], weight_format: WeightFormat, cut: Cut) -> None:
        matrix = self._quantised[name]
        if not _is_rotated(name, cut):
            matrix.fill(planes, cut)
            return
        for plane, found in matrix.planes(cut).items():
            if found.shape[0] == cut.rows:  # rows move with their scales; one scale for all stays
                found = to_interleaved(found.view(cut.rows, -1), cut.rows // self.config.head_dim)
            planes[plane].view(found.shape).copy_(found)

    def close(self) -> None:
        self._files.close()


def _is_rotated(name: str, cut: Cut) -> bool:
    """Whether rows are to be put into Meta's order, in which the first row of a head stays where it is."""
    return name.split(".")[-2] in ("wq", "wk") and cut.rows > 1


def _refuse_adapter(directory: Path) -> None:
    if (directory / "adapter_config.json").exists():
        raise UnusableInput(f"{directory} holds a LoRA adapter; merge it into the weights and save the whole model")


def _computed_in(fields: Mapping[str, Any], name: str) -> torch.dtype:
    """What a quantised model is computed in: what config.json says, else bfloat16."""
    for field in ("dtype", "torch_dtype"):
        if (told := fields.get(field)) not in (None, "auto"):
            if not isinstance(told, str) or told not in FLOATS:
                raise UnusableInput(f"{name}/config.json: {field} must be one of {', '.join(FLOATS)}, not {told!r:.40}")
            return FLOATS[told]
    return torch.bfloat16
