"""What is counted of speculation. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain


@dataclass(slots=True)
class Counts:
    """Of one generation: its decode ``passes``, and how often a row's pass gave so many ``tokens``.

    A row that had ended before a pass does not count in it. The time of drafting is the telemetry's
    (:class:`wsm.engine.stretch.PhaseStats`).
    """

    passes: int = 0
    tokens: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, passes: int, accepted: Iterable[Iterable[int]]) -> Counts:
        """``accepted`` has, of each row, how many tokens it took from each pass until its end."""
        return cls(passes, Counter(chain.from_iterable(accepted)))

    @property
    def tokens_a_pass(self) -> float | None:
        """New tokens of a row's pass, on average; None without passes."""
        rows = self.tokens.total()
        return sum(tokens * times for tokens, times in self.tokens.items()) / rows if rows else None


@dataclass(slots=True)
class Speculation:
    """How a model speculates, and what came of it in the generation that was last.

    ``draft`` is what ``--draft`` names. A tree has ``nodes`` nodes, its root included, reaches ``depth`` tokens behind
    the root, and is grown ``width`` nodes a level: 1 is a chain. ``auto``: the depth was chosen here.
    """

    draft: str
    depth: int
    width: int
    nodes: int
    auto: bool = False
    counts: Counts = field(default_factory=Counts)
