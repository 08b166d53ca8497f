"""Where a text is cut before a tokenizer merges bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's (meta-llama/llama3, tokenizer.py)."""

MOST_CHARS, LONGEST_RUN = 400_000, 25_000
_RUN = re.compile(r"\s+|\S+")


def digestible_pieces(text: str) -> Iterator[str]:
    """Cuts where tiktoken would overflow or slow down: every 400 000 characters, and runs longer than 25 000.

    A run is of whitespace alone or of anything else alone. The limits are Meta's, so the ids are too.
    """
    for start in range(0, len(text), MOST_CHARS):
        chunk = text[start : start + MOST_CHARS]
        cuts = [cut for run in _RUN.finditer(chunk) for cut in range(run.start(), run.end(), LONGEST_RUN)[1:]]
        yield from (chunk[a:b] for a, b in zip([0, *cuts], [*cuts, len(chunk)], strict=True))
