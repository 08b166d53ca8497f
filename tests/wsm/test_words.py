"""Numbers and their nouns: one of a thing is never said to be several, nor in brackets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from wsm.words import counted, plural

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (counted(1, "round"), "1 round"),
        (counted(0, "round"), "0 rounds"),
        (counted(2, "round"), "2 rounds"),
        (counted(1, "process", "processes"), "1 process"),
        (counted(3, "process", "processes"), "3 processes"),
        (plural(1, "is", "are"), "is"),
        (plural(2, "is", "are"), "are"),
    ],
)
def test_a_noun_follows_its_number(said: str, expected: str) -> None:
    assert said == expected


def test_no_sentence_of_the_harness_has_a_plural_in_brackets() -> None:
    for top in ("bench", "wsm"):
        for path in (ROOT / top).rglob("*.py"):
            found = re.search(r"\} \w+\((?:s|es)\)", path.read_text(encoding="utf-8"))
            assert found is None, f"{path}: {found and found[0]}: wsm.words.counted makes it"
