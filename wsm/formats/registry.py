"""The formats by name. Imports no torch before a format is asked for."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from wsm.errors import UnusableInput
from wsm.option import meant

if TYPE_CHECKING:
    from wsm.formats.format import WeightFormat

NAMES = ("exact", "fp8", "int8", "int4", "int4-g64", "int4-g32")
"""What weights can be put into; :func:`get` also knows the family members that imports need."""
BLOCK_TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_K", "q5_K", "q6_K")
"""GGUF's, which come from such a file, or are random."""
ALL = (*NAMES, *BLOCK_TYPES)
"""What `--weight-format` knows beside a plain dtype."""


@cache
def get(name: str) -> WeightFormat:
    """The format called ``name``; UnusableInput, with the list and the nearest name, if there is none."""
    from wsm.formats.exact import Exact
    from wsm.formats.fp8 import Float8
    from wsm.formats.gguf_blocks import BlockType
    from wsm.formats.integer import Integer

    for family in (Exact, Float8, Integer, BlockType):
        if (found := family.named(name)) is not None:
            return found
    raise UnusableInput(f"the weight format {name:.60} is not known; there are {', '.join(ALL)}{meant(name[:60], ALL)}")
