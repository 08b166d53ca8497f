"""Kinds of fields that a result is made of."""

from __future__ import annotations

from typing import Annotated, Generic, Literal, TypeAlias, TypeVar

from msgspec import Meta, Struct, UnsetType

T = TypeVar("T")
Later: TypeAlias = T | UnsetType
"""A part that the first programs of this schema version did not write: missing in their files, always in ours."""
Amount = Annotated[float, Meta(ge=0)]
Above0 = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=0)]
FromOne = Annotated[int, Meta(ge=1)]
Mode = Literal["mixed", "stream", "preload", "full"]


MOST_BELIEVED_PCT = 105.0
"""Of a ceiling: some 5 % are its own noise; what is beyond says that it was measured too low."""


def believed(pct: float | None) -> float | None:
    """A share of a ceiling as it is told: at most 100; None where it is more than noise above: that was no ceiling."""
    return None if pct is None or pct > MOST_BELIEVED_PCT else min(100.0, pct)


def says(description: str) -> Meta:
    """What a field means, for the schema and docs/JSON.md."""
    return Meta(description=description)


Texts = list[Annotated[str, says("one of them")]]


class Part(Struct, frozen=True):
    """One object of the JSON; its keys are written in the order of the fields."""


class ByPhase(Part, Generic[T], frozen=True, kw_only=True):
    prefill: Annotated[T, says("the passes over the prompts")]
    decode: Annotated[T, says("the passes after token 1")]
