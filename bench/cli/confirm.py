"""A question before something is lost."""

from __future__ import annotations

import select
import sys

from wsm import stop
from wsm.errors import UnusableInput


def confirmed(question: str, yes: bool) -> bool:
    """The answer to ``question``, with ``yes`` without asking; UnusableInput where nobody is there to answer."""
    if yes:
        return True
    if sys.stdin is None or not sys.stdin.isatty():
        raise UnusableInput(f"{question} There is no terminal to ask on: --yes confirms; nothing was written")
    print(f"{question} [y/N] ", end="", flush=True)
    while not select.select([sys.stdin], [], [], stop.LOOK_S)[0]:
        stop.check()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
