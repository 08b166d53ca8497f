"""The command line that says in full what ``--auto`` chose, to keep and to share."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from bench.options.flags import VERBS

SCRIPT = "bench_infer.py"


def kept_command(argv: Sequence[str], chosen: Sequence[str]) -> str:
    """``argv`` without ``--auto`` and without what was chosen anew, then the choice (``--flag value`` each)."""
    flags = [text.split(" ", 1) for text in chosen]
    replaced = {flag for flag, _ in flags}
    words = list(argv[1:] if argv and argv[0] in VERBS else argv)
    kept: list[str] = []
    while words:
        word = words.pop(0)
        name, has_value, _ = word.partition("=")
        if name in replaced:
            if not has_value:
                words.pop(0)
        elif word != "--auto":
            kept.append(word)
    return shlex.join(["python", SCRIPT, *kept, *(word for pair in flags for word in pair)])
