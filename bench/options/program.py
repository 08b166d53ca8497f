"""How this program was called, for commands that it prints. Imports the standard library alone."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

_SCRIPT = Path(__file__).resolve().parents[2] / "bench_infer.py"
_ENTRY = "bench-infer"


def called(ranks: int = 1) -> list[str]:
    """The words that call it again as it was called: the interpreter (or torchrun beside it) and the script."""
    script, python = Path(sys.argv[0]), Path(sys.executable or "python3")
    if script.name == _ENTRY and ranks == 1:
        return [_shown(script)]
    words = [_shown(python)]
    if ranks > 1:
        words = [_shown(python.with_name("torchrun")), "--nproc-per-node", str(ranks)]
    return [*words, sys.argv[0] if script.name in (_SCRIPT.name, _ENTRY) else _shown(_SCRIPT)]


def lacks(name: str | None) -> str:
    """The sentence for a package that is missing."""
    return (
        f"{name} is not installed in {sys.executable}: run .venv/bin/python {_SCRIPT.name}, or `make bench` once, "
        "which makes it"
    )


def _shown(path: Path) -> str:
    """Relative to the current folder where it lies below it."""
    with contextlib.suppress(ValueError, OSError):
        return str(path.relative_to(os.getcwd()))
    return str(path)
