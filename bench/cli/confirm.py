"""A question before something is lost."""

from __future__ import annotations

import sys

from wsm.errors import UnusableInput


def confirmed(question: str, yes: bool) -> bool:
    """The answer to ``question``, with ``yes`` without asking; UnusableInput where nobody is there to answer."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UnusableInput(f"{question} There is no terminal to ask on: --yes confirms; nothing was written")
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
