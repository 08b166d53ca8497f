"""Several formats in one model: a quantised checkpoint's matrices lie at rest as it has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

from wsm.formats import registry

if TYPE_CHECKING:
    from wsm.formats.format import WeightFormat

SEPARATOR = "+"
"""Between the names of the formats of a mix."""


@dataclass(frozen=True)
class Mix:
    """The formats that a checkpoint brings, by the full names of its matrices; the others are plain.

    Sizes follow from shapes, and nothing is encoded: the checkpoint has the bytes.
    """

    by_tensor: Mapping[str, str]
    exact = True

    @property
    def name(self) -> str:
        """As the manifest and the JSON spell it: ``q4_K+q6_K``."""
        return SEPARATOR.join(sorted(set(self.by_tensor.values())))


Formats = Union["WeightFormat", Mix]
"""How the matrices of a model lie at rest: all in one format, or each in its own."""


def format_of(formats: Formats | None, tensor: str) -> WeightFormat | None:
    """The format of the matrix of that full name; None where it is plain."""
    if not isinstance(formats, Mix):
        return formats
    name = formats.by_tensor.get(tensor)
    return None if name is None else registry.get(name)


def formats_named(name: str) -> dict[str, WeightFormat]:
    """The formats in a name, which may be a mix's; UnusableInput for one that is not known."""
    return {part: registry.get(part) for part in name.split(SEPARATOR)}


def columns_together(weight_format: WeightFormat) -> int:
    """How many weights of a row share a scale, and so cannot be parted; 1 where a whole row does, or none."""
    from wsm.formats.gguf_blocks import BlockType
    from wsm.formats.integer import Integer

    if isinstance(weight_format, BlockType):
        return weight_format.weights
    return weight_format.group or 1 if isinstance(weight_format, Integer) else 1
