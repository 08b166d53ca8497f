"""GGUF models, of one file or split: metadata, tensors, and blocks that stay as they are."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint import base
from llama.checkpoint.base import FLOATS, Checkpoint, Stored, all_tensors
from llama.checkpoint.gguf_config import gguf_config, refuse_named, unknown_fields
from llama.checkpoint.gguf_file import GGUFFile, GGUFTensor, damaged
from llama.checkpoint.gguf_vocabulary import STOPS, Vocabulary
from llama.names import Cut, renamed
from wsm.errors import StoreError, UnusableInput
from wsm.formats import registry
from wsm.formats.format import WeightFormat, pieces
from wsm.formats.spread import each_piece

_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BLOCKS = {name.upper(): name for name in registry.BLOCK_TYPES}
_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}
_SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",
}
"""As a chat template names a token, and as GGUF does."""
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", "chat_template.jinja")
_EMBEDDING, _HEAD, _ROPE = "token_embd.weight", "output.weight", "rope_freqs.weight"
_CPU = torch.device("cpu")
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")


def gguf_name(name: str) -> str:
    """llama.cpp's name for one of Meta's."""
    return renamed(name, _NAMES, "blk")


def gguf_files(where: Path) -> list[Path]:
    """The files of the model that a file, a part of a split one, or a directory with one model stands for.

    None in a directory without any; UnusableInput for parts that are not there, or a directory with several models.
    """
    if where.is_dir():
        models = {_parts(path)[0]: _parts(path) for path in sorted(where.glob("*.gguf"))}
        if len(models) > 1:
            names = ", ".join(path.name for path in models)
            raise UnusableInput(f"--checkpoints {where} holds several models: name one of {names:.300}")
        paths = next(iter(models.values()), [])
    else:
        paths = _parts(where)
    if missing := [path.name for path in paths if not path.exists()]:
        raise UnusableInput(f"{where}: {missing[0]} is not there: the download is incomplete")
    return paths


def _parts(path: Path) -> list[Path]:
    if (match := _PART.fullmatch(path.stem)) is None:
        return [path]
    count = int(match["count"])
    return [path.with_name(f"{match['stem']}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]


class GGUFCheckpoint(Checkpoint):
    """Matrices of the layers in block types lie at rest as they are, all else is decoded when read.

    q and k are in Meta's order already: llama.cpp's converter puts Hugging Face's back into it for this architecture.
    UnusableInput for a damaged file, a missing tensor, or a model or a tensor type that does not run here.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        first = paths[0]
        files = [GGUFFile(first, partial(refuse_named, file=str(first))), *map(GGUFFile, paths[1:])]
        metadata = files[0].fields
        self._tensors = _merged(files)
        self._files = {file.path: file for file in files}
        embedding = self._tensors.get(_EMBEDDING)
        config = gguf_config(
            metadata,
            str(first),
            _PART.sub(r"\g<stem>", first.stem),
            vocab_size=embedding.shape[0] if embedding is not None else None,
            tied=_HEAD not in self._tensors,
            rope_factors=self._rope_factors(),
        )
        stored = [self._check(name, shape, first) for name, shape in all_tensors(config)]
        known = {tensor.name for tensor in stored} | {_ROPE}
        base.refuse_foreign_tensors(first, self._tensors)
        base.refuse_unknown_tensors(first, self._tensors, known)
        plain = [one._replace(dtype=_PLAIN[one.dtype]) for one in stored if one.dtype in _PLAIN]
        whole = len(plain) == len(stored)
        super().__init__(config, base.weights_dtype(plain) if whole else torch.bfloat16, first.parent, paths)
        self.warnings = tuple(filter(None, [unknown_fields(metadata, str(first))]))
        self._first = files[0]
        self._decoding = threading.Lock()

    @property
    def vocabulary(self) -> Vocabulary | None:
        return Vocabulary.from_metadata(self._first.fields, self._first.path)

    def own_files(self) -> list[Path]:
        """Only its own, and other models': stores of them may be in the same directory."""
        return [path for path in super().own_files() if path.suffix == ".gguf" or path.name in _BESIDE]

    @property
    def stop_ids(self) -> frozenset[int]:
        named = (self._first.fields.get(f"tokenizer.ggml.{which}_token_id") for which in STOPS)
        return frozenset(token for token in named if type(token) is int and 0 <= token < self.config.vocab_size)

    @property
    def chat_template(self) -> str | None:
        template = self._first.fields.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    @property
    def special_tokens(self) -> Mapping[str, str]:
        tokens = self._first.fields.get("tokenizer.ggml.tokens")
        ids = {name: self._first.fields.get(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in _SPECIAL.items()}
        if not isinstance(tokens, list):
            return {}
        return {name: str(tokens[n]) for name, n in ids.items() if type(n) is int and 0 <= n < len(tokens)}

    def _check(self, name: str, shape: tuple[int, ...], first: Path) -> Stored:
        theirs = gguf_name(name)
        if (tensor := self._tensors.get(theirs)) is None:
            raise UnusableInput(f"{first} has no tensor {theirs}: the model is incomplete or of another architecture")
        _check_type(tensor)
        as_float = Stored(tensor.path, theirs, next(iter(FLOATS)), tensor.shape)
        base.check_stored(as_float, shape, "its metadata")
        return as_float._replace(dtype=tensor.type)

    def _rope_factors(self) -> list[float] | None:
        if (tensor := self._tensors.get(_ROPE)) is None:
            return None
        if tensor.type != "F32":
            raise UnusableInput(f"{tensor.path}: {_ROPE} is of type {tensor.type}, not F32")
        factors = torch.empty(math.prod(tensor.shape))
        self._files[tensor.path].read_into(tensor, factors)
        return list(factors.tolist())

    def native(self, name: str) -> str | None:
        return _BLOCKS.get(self._tensors[gguf_name(name)].type)

    def fill_planes(self, name: str, planes: Mapping[str, Tensor], weight_format: WeightFormat, cut: Cut) -> None:
        tensor, blocks = self._tensors[gguf_name(name)], planes["blocks"]
        if cut.columns == tensor.shape[-1]:
            self._files[tensor.path].read_into(tensor, blocks, cut.row * tensor.row_bytes)
        else:  # a row's bytes stand for its columns, and no cut parts a block
            begin = cut.column * tensor.row_bytes // tensor.shape[-1]
            for rows, content in self._rows(tensor, cut):
                blocks[rows] = content[:, begin : begin + blocks.shape[1]]
        try:
            weight_format.check((cut.rows, cut.columns), planes)
        except StoreError as error:
            raise damaged(tensor.path, f"{tensor.name}: {error}") from error

    def fill(self, name: str, out: Tensor, cut: Cut) -> None:
        tensor, columns = self._tensors[gguf_name(name)], slice(cut.column, cut.column + cut.columns)
        if tensor.type in _PLAIN:
            for rows, content in self._rows(tensor, cut):
                out[rows] = content.view(FLOATS[_PLAIN[tensor.type]])[:, columns]
            return

        def decode(rows: slice) -> None:
            decoded = out.new_empty(rows.stop - rows.start, tensor.shape[-1])
            blocks = {"blocks": self._content(tensor, cut, rows)}
            registry.get(_BLOCKS[tensor.type]).decode_(blocks, decoded)
            out[rows] = decoded[:, columns]

        with self._decoding:  # each matrix by all threads: several at once would only wait for each other
            each_piece(decode, cut.rows, _CPU, tensor.shape[-1])

    def _rows(self, tensor: GGUFTensor, cut: Cut) -> Iterator[tuple[slice, Tensor]]:
        """The rows of a cut, a piece at a time: which of the cut's they are, and their bytes, all columns."""
        for rows in pieces(cut.rows, _CPU, tensor.shape[-1]):
            yield rows, self._content(tensor, cut, rows)

    def _content(self, tensor: GGUFTensor, cut: Cut, rows: slice) -> Tensor:
        """The bytes of some rows of a cut, all columns."""
        content = torch.empty(rows.stop - rows.start, tensor.row_bytes, dtype=torch.uint8)
        self._files[tensor.path].read_into(tensor, content, (cut.row + rows.start) * tensor.row_bytes)
        return content

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _merged(files: Sequence[GGUFFile]) -> dict[str, GGUFTensor]:
    """The tensors of all parts; UnusableInput where the parts are not of one split model."""
    first, tensors = files[0], dict[str, GGUFTensor]()
    for number, file in enumerate(files):
        split = {key: file.fields.get(f"split.{key}") for key in ("no", "count")}
        if split != {"no": number, "count": len(files)} and (len(files) > 1 or split["count"] not in (None, 0, 1)):
            raise UnusableInput(
                f"{file.path} is part {split['no']!r:.20} of {split['count']!r:.20} by its metadata, "
                f"{number + 1} of {len(files)} by its name: take all parts, under the names they were given"
            )
        for name, tensor in file.tensors.items():
            if name in tensors:
                raise damaged(file.path, f"{name} is in {tensors[name].path.name} as well")
            tensors[name] = tensor
    told = first.fields.get("split.tensors.count", len(tensors))
    if told != len(tensors):
        raise UnusableInput(
            f"{first.path}: the parts hold {len(tensors)} tensors, not {told!r:.20}; take them all again"
        )
    return tensors


def _check_type(tensor: GGUFTensor) -> None:
    if tensor.type not in _PLAIN and tensor.type not in _BLOCKS:
        raise UnusableInput(
            f"{tensor.path}: {tensor.name} is of type {tensor.type}, which does not run here; "
            f"{', '.join((*_PLAIN, *_BLOCKS))} do"
        )
