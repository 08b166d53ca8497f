"""What every checkpoint offers, whole or a rank's share, and what is refused in all their files alike."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from llama.checkpoint.gguf_vocabulary import Vocabulary
from llama.config import ModelConfig
from llama.names import BY_COLUMNS, Cut
from wsm.errors import UnusableInput
from wsm.formats.format import Plane, WeightFormat
from wsm.formats.mix import Mix
from wsm.layout.groups import Encoded, is_encoded, pass_order
from wsm.layout.model import Shard, SourceFile

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLES, _SAMPLE_BYTES = 16, 64 << 10


class Checkpoint(ABC):
    """Named tensors, lazily, in Meta's names and Meta's RoPE convention.

    ``dtype`` is that of the stored weights, ``paths`` are their files; ``directory`` is None for weights in no file.
    """

    has_weights = True
    warnings: tuple[str, ...] = ()
    """What the files say twice, and differently, and which of it counts."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, directory: Path | None = None, paths: Sequence[Path] = ()
    ) -> None:
        self.config, self.dtype, self.directory = config, dtype, directory
        self._paths = paths

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The tokenizer in the weights' own files, if there is one; UnusableInput for one that is not read here."""
        return None

    @property
    def stop_ids(self) -> frozenset[int]:
        """What ends a text by the weights' own files, where they name it, whether their tokenizer is read or not."""
        return frozenset()

    @property
    def chat_template(self) -> str | None:
        """The template of a conversation in the weights' own files, if there is one."""
        return None

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The texts of ``bos_token`` and its like in the weights' own files, for such a template."""
        return {}

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """By full name; made when asked, for a config that no files prove may name any number of layers."""
        return dict(all_tensors(self.config))

    def sources(self) -> tuple[SourceFile, ...]:
        """The files behind it; for synthetic weights, their recipe."""
        return tuple(map(_source_file, self._paths))

    def own_files(self) -> list[Path]:
        """All files of the checkpoint, what is beside the weights included: nothing may be written over them."""
        return [] if self.directory is None else [path for path in self.directory.iterdir() if path.is_file()]

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill ``out``, any float dtype, with the tensor of that full name and shape, or UnusableInput; thread-safe."""
        if self._shapes.get(name) != tuple(out.shape):
            raise UnusableInput(f"{self.config.name} has no tensor {name} of shape {list(out.shape)}")
        matrix = out.view(-1, out.shape[-1])
        self.fill(name, matrix, Cut(0, 0, *matrix.shape))

    def first_row(self, name: str, dtype: torch.dtype) -> Tensor:
        """The first row of a matrix, or a whole vector, without reading the rest."""
        row = torch.empty(1, self._shapes[name][-1], dtype=dtype)
        self.fill(name, row, Cut(0, 0, *row.shape))
        return row[0]

    def native(self, name: str) -> str | None:
        """The weight format in which the checkpoint has the matrix of that full name; None where it is plain.

        What it names is taken plane by plane from :meth:`fill_planes`, and nothing is encoded.
        """
        return None

    def fill_planes(self, name: str, planes: Mapping[str, Tensor], weight_format: WeightFormat, cut: Cut) -> None:
        """Fill ``planes``, those of the part ``cut`` of a matrix that is in its native format; thread-safe.

        No border of ``cut`` is inside a block or group.
        """
        raise NotImplementedError(name)

    @cached_property
    def formats(self) -> Mix | None:
        """The formats that the checkpoint brings; None where every matrix is plain."""
        config = self.config
        names = (
            config.full_name(group, spec.name)
            for group in pass_order(config.n_layers)
            for spec in filter(is_encoded, config.specs(group.kind))
        )
        found = {name: format_name for name in names if (format_name := self.native(name)) is not None}
        return Mix(found) if found else None

    def encode(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        weight_format: WeightFormat,
        importance: Tensor | None = None,
    ) -> Mapping[str, Tensor] | None:
        """The planes of a matrix, taken as of ``dtype``, in a weight format; None where it stays plain.

        ``importance``: see :meth:`WeightFormat.encode`; the matrix is encoded on its device.
        """
        if self.native(name) == weight_format.name:
            planned = weight_format.planes((shape[0], shape[1]), dtype)
            assert planned is not None
            made = {plane.name: torch.empty(plane.shape, dtype=plane.dtype) for plane in planned}
            self.fill_planes(name, made, weight_format, Cut(0, 0, *shape))
            return made
        weight = torch.empty(shape, dtype=dtype)
        self.read_into(name, weight)
        try:
            return weight_format.encode(weight if importance is None else weight.to(importance.device), importance)
        except UnusableInput as error:
            raise UnusableInput(f"{name}: {error}") from error

    def encode_into(self, name: str, out: Encoded, weight_format: WeightFormat) -> None:
        """Fill ``out`` with the planes of a matrix, whose sizes are those of :meth:`planes`."""
        if self.native(name) == weight_format.name:
            self.fill_planes(name, out.planes, weight_format, Cut(0, 0, *out.shape))
            return
        planes = self.encode(name, out.shape, out.dtype, weight_format)
        assert planes is not None
        for plane, into in out.planes.items():
            into.copy_(planes[plane])

    def planes(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, weight_format: WeightFormat
    ) -> tuple[Plane, ...] | None:
        """Of which planes :meth:`encode` will give."""
        fixed = weight_format.planes((shape[0], shape[1]), dtype)
        if fixed is not None:
            return fixed
        found = self.encode(name, shape, dtype, weight_format)
        return None if found is None else tuple(Plane(n, p.dtype, tuple(p.shape)) for n, p in found.items())

    @abstractmethod
    def fill(self, name: str, out: Tensor, cut: Cut) -> None:
        """Fill ``out [cut.rows, cut.columns]`` from a tensor that is there; q and k are cut between heads."""

    def share(self, shard: Shard) -> Checkpoint:
        """What a rank holds of it, under the same names; itself where there is only one rank."""
        return self if shard.size == 1 else RankCheckpoint(self, shard)

    def close(self) -> None:  # noqa: B027
        """Let go of the files, where there are any."""


class RankCheckpoint(Checkpoint):
    """A rank's share of a checkpoint; no more of it is read.

    As in fairscale's model-parallel layers: q, k, v (by heads), w1, w3, the embedding and the head are cut by rows, wo
    and w2 by columns; norms are whole on every rank. The share is a LLaMA of fewer heads, a narrower feed-forward block
    and a smaller vocabulary, so layouts, KV and memory follow from its :class:`ModelConfig` as from any other.
    """

    def __init__(self, whole: Checkpoint, shard: Shard) -> None:
        super().__init__(whole.config.share(shard.size), whole.dtype, whole.directory)
        self.has_weights = whole.has_weights
        self._whole, self._shard = whole, shard

    def sources(self) -> tuple[SourceFile, ...]:
        return self._whole.sources()

    def fill(self, name: str, out: Tensor, cut: Cut) -> None:
        self._whole.fill(name, out, self._in_whole(name, cut))

    def native(self, name: str) -> str | None:
        return self._whole.native(name)

    def fill_planes(self, name: str, planes: Mapping[str, Tensor], weight_format: WeightFormat, cut: Cut) -> None:
        self._whole.fill_planes(name, planes, weight_format, self._in_whole(name, cut))

    def _in_whole(self, name: str, cut: Cut) -> Cut:
        """Where in the whole matrix a part of the share's is."""
        rows, columns = self._shapes[name] if len(self._shapes[name]) == 2 else (0, 0)
        if name.endswith(BY_COLUMNS):
            return cut._replace(column=cut.column + self._shard.rank * columns)
        return cut._replace(row=cut.row + self._shard.rank * rows)

    def close(self) -> None:
        self._whole.close()


def all_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Full name and shape of every tensor of the model, globals first, then in pass order."""
    for group in (None, *pass_order(config.n_layers)):
        for spec in config.specs(group.kind if group else None):
            yield config.full_name(group, spec.name), spec.shape


def stretch(tensor: Tensor, cut: Cut) -> Tensor:
    """A view ``[cut.rows, cut.columns]`` of a matrix, or of a vector as a matrix of one row."""
    matrix = tensor.view(-1, tensor.shape[-1])
    return matrix[cut.row : cut.row + cut.rows, cut.column : cut.column + cut.columns]


def _source_file(path: Path) -> SourceFile:
    """A file's entry; its digest, of its size and of 64 KiB at 16 even places, notices another file.

    So 140 GB need not be read.
    """
    size = path.stat().st_size
    digest = xxhash.xxh3_128(str(size).encode())
    with path.open("rb") as file:
        for place in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * place // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return SourceFile(path.name, size, digest.hexdigest())


class Stored(NamedTuple):
    """A tensor as the files describe it: the file's path, what the file calls it, its dtype and shape."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def check_stored(stored: Stored, shape: tuple[int, ...], config_file: str) -> None:
    """Refuse a tensor that is no float or has another shape than ``config_file`` asks for: UnusableInput."""
    if stored.dtype not in FLOATS:
        raise UnusableInput(
            f"{stored.path}: {stored.name} is of dtype {stored.dtype}; only {', '.join(FLOATS)} weights run here, "
            "so take the unquantised checkpoint"
        )
    if stored.shape != shape:
        raise UnusableInput(
            f"{stored.path}: {stored.name} has shape {list(stored.shape)}, but {config_file} asks for {list(shape)}: "
            "the two are not of the same model"
        )


def weights_dtype(matrices: Iterable[Stored]) -> torch.dtype:
    """The dtype that holds every matrix without loss; norms do not count, they are often wider than the rest."""
    return functools.reduce(torch.promote_types, {FLOATS[stored.dtype] for stored in matrices if len(stored.shape) > 1})


def refuse_unknown_tensors(where: Path, names: Iterable[str], known: set[str]) -> None:
    """Refuse (UnusableInput) what the model's shape has no place for: without it the tokens are another model's."""
    for name in names:
        if name not in known and not name.endswith(("rotary_emb.inv_freq", "rope.freqs")):
            raise UnusableInput(
                f"{where} holds tensor {name}, which a plain LLaMA of this configuration has no place for: "
                "it is another architecture, or has more layers than its configuration says"
            )


def refuse_foreign_tensors(path: Path, names: Iterable[str]) -> None:
    """Refuse (UnusableInput) quantised weights, biases and LoRA adapters, which are no plain LLaMA's."""
    for name in names:
        if name.endswith((".qweight", ".qzeros", ".weight_packed")):
            raise UnusableInput(
                f"{path}: tensor {name} belongs to a quantised model, but quantization_config in config.json is "
                "missing or has no place for it; download it again, or take the same model in bfloat16 or float16 "
                "weights"
            )
        if name.endswith(".bias") or "lora_" in name:
            raise UnusableInput(
                f"{path}: tensor {name} belongs to no plain LLaMA; biases do not run here, and LoRA adapters have to "
                "be merged into the weights first"
            )
