"""Words beside numbers."""

from __future__ import annotations


def plural(n: int, one: str, many: str | None = None) -> str:
    """The noun that stands behind ``n``: ``one``, or ``many`` (with an s, where that is not given)."""
    return one if n == 1 else many or f"{one}s"


def counted(n: int, one: str, many: str | None = None) -> str:
    """``1 round``, ``2 rounds``."""
    return f"{n} {plural(n, one, many)}"
