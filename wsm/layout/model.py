"""What is known here of a model: numbers, names, and where its tensors can be read. Nothing of what it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from wsm.layout.groups import Encoded, GroupId, Kind, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from wsm.formats.format import Plane, WeightFormat


class Shard(NamedTuple):
    """Which of ``size`` equal shares of the model this is."""

    rank: int = 0
    size: int = 1


WHOLE = Shard()


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that weights come from; ``digest`` is a sample of its content, cheap at any size."""

    name: str
    size: int
    digest: str


class ModelShape(Protocol):
    """The numbers that memory and time follow from, and the names and shapes of the tensors."""

    embedding: ClassVar[str]
    """The name of the token embedding among the globals."""
    fused: ClassVar[tuple[str, ...]]
    """Matrices of an attn group that are one product, and so have to be one behind the other."""

    @property
    def name(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def ffn_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def tied_embeddings(self) -> bool: ...

    def specs(self, kind: Kind | None) -> tuple[TensorSpec, ...]:
        """The tensors of a group of ``kind`` (None: the globals), in the order in which they are stored."""

    def full_name(self, group: GroupId | None, short: str) -> str:
        """The checkpoint's name of a tensor; ``group`` is None for the globals."""

    def with_layers(self, count: int) -> ModelShape:
        """The same of ``count`` layers."""

    def share(self, ranks: int) -> ModelShape:
        """The shape of one of ``ranks`` equal shares; raises UnusableInput if it cannot be cut evenly."""

    def to_json(self) -> dict[str, Any]:
        """All that describes the model, for a manifest."""

    def from_json(self, fields: Mapping[str, Any], /) -> ModelShape:
        """The inverse of :meth:`to_json`; raises UnusableInput for what makes no model."""


ReadShape = Callable[[Mapping[str, Any]], ModelShape]
"""The inverse of :meth:`ModelShape.to_json`; raises UnusableInput for what makes no model."""


class TensorSource(Protocol):
    """A checkpoint, or a rank's share of it: named tensors, lazily."""

    dtype: torch.dtype
    """Of the stored weights."""
    directory: Path | None
    """None for weights that are in no file."""
    has_weights: bool
    """Whether there is anything to read; a directory without its weights has a shape and no more."""

    @property
    def config(self) -> ModelShape: ...

    def sources(self) -> tuple[SourceFile, ...]:
        """The files behind it; for synthetic weights, their recipe."""

    def own_files(self) -> list[Path]:
        """All files of the checkpoint, what is beside the weights included: nothing may be written over them."""

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill ``out`` (the tensor's shape, any float dtype) with the tensor of that full name; thread-safe.

        Raises UnusableInput if the model has no such tensor, or one of another shape.
        """

    def encode_into(self, name: str, out: Encoded, weight_format: WeightFormat) -> None:
        """Fill ``out`` with what :meth:`encode` gives, where its sizes are known."""

    def encode(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        weight_format: WeightFormat,
        importance: Tensor | None = None,
    ) -> Mapping[str, Tensor] | None:
        """The planes of the matrix of that full name, taken as of ``dtype``; None where it stays plain; thread-safe.

        With the ``importance`` of its inputs it is encoded on their device.
        """

    def planes(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, weight_format: WeightFormat
    ) -> tuple[Plane, ...] | None:
        """Of which planes :meth:`encode` will give; None where it will give None. Cheaper, if it can be."""

    def first_row(self, name: str, dtype: torch.dtype) -> Tensor:
        """The first row of a matrix, or a whole vector, without reading the rest."""

    def share(self, shard: Shard) -> TensorSource:
        """What a rank holds of it; itself where there is only one rank."""
