"""Formats have one name each, and one that is not known is answered with the list."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.wsm.formats.matrices import FORMATS
from wsm.errors import UnusableInput
from wsm.formats.registry import ALL, BLOCK_TYPES, get


@pytest.mark.parametrize("name", [*FORMATS, *BLOCK_TYPES])
def test_a_format_is_called_what_it_was_asked_by(name: str) -> None:
    assert get(name).name == name
    assert get(name).exact == (name == "exact")


@pytest.mark.parametrize(
    "name", ["int3", "int4-g128", "int4-g16", "int4-zero", "int8-sym", "int8-bfloat16", "fp8-row", "q4_k", "Q4_0", ""]
)
def test_another_spelling_is_refused(name: str) -> None:
    with pytest.raises(UnusableInput, match=f"the weight format {name} is not known; there are {', '.join(ALL)}"):
        get(name)


def test_a_near_miss_is_answered_with_the_nearest() -> None:
    for asked, nearest in (("exakt", "exact"), ("int3", "int4"), ("int9", "int8")):
        with pytest.raises(UnusableInput, match=rf"did you mean {nearest}\?"):
            get(asked)


def test_the_names_are_known_without_torch() -> None:
    code = "import sys, wsm.formats.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
