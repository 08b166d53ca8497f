"""What every draft offers, and how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from llama.speculation.nodes import Tree
    from wsm.engine.telemetry import Telemetry


class Draft(Protocol):
    """Who guesses the next tokens of every row. From :meth:`prefill` on nothing is uploaded, and no host waits.

    ``depth`` is how far behind its root a tree may reach, ``nodes`` how many nodes it has, the root included.
    """

    depth: int
    nodes: int

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """A generation begins, from these prompts, one a row."""

    def propose(self, roots: Tensor, starts: Tensor) -> Tree:
        """A tree for each row behind its root: the row's last token, at position ``starts``; int64 ``[B]`` each."""

    def accepted(self, starts: Tensor, path: Tensor, counts: Tensor, tokens: Tensor) -> None:
        """What became of the trees that were proposed last, whose roots were at ``starts``.

        ``path`` int64 ``[B, depth + 1]``: the accepted nodes, the root first; ``counts`` int64 ``[B]`` are as many as
        count, the root with them; ``tokens`` int64 ``[B, depth + 1]`` are the row's new tokens, ``counts`` of them, the
        last of which is the next root.
        """


class TimedDraft:
    """A draft whose time on the device goes into ``telemetry``."""

    def __init__(self, draft: Draft, telemetry: Telemetry) -> None:
        self.depth, self.nodes = draft.depth, draft.nodes
        self.draft, self._telemetry = draft, telemetry

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        self.draft.prefill(prompts)

    def propose(self, roots: Tensor, starts: Tensor) -> Tree:
        start = self._telemetry.mark()
        tree = self.draft.propose(roots, starts)
        self._telemetry.drafted(start, self._telemetry.mark())
        return tree

    def accepted(self, starts: Tensor, path: Tensor, counts: Tensor, tokens: Tensor) -> None:
        start = self._telemetry.mark()
        self.draft.accepted(starts, path, counts, tokens)
        self._telemetry.drafted(start, self._telemetry.mark())
