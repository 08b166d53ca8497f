"""How long drafting takes, as the telemetry has it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llama.nodes.tree import Tree
from llama.speculation.draft import Draft
from wsm.engine.device import Event
from wsm.engine.telemetry import Telemetry


class TimedDraft:
    """A draft whose time on the device goes into ``telemetry``: that of a tree once the tree was verified."""

    def __init__(self, draft: Draft, telemetry: Telemetry) -> None:
        self.depth, self.nodes, self.room = draft.depth, draft.nodes, draft.room
        self.draft, self._telemetry = draft, telemetry
        self._proposed: tuple[Event | None, Event | None] = None, None

    def prepare(self, rows: int) -> None:
        self.draft.prepare(rows)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        self.draft.prefill(prompts)

    def propose(self, roots: Tensor, starts: Tensor) -> Tree:
        start = self._telemetry.mark()
        tree = self.draft.propose(roots, starts)
        self._proposed = start, self._telemetry.mark()
        return tree

    def accepted(self, starts: Tensor, path: Tensor, counts: Tensor, tokens: Tensor) -> None:
        self._telemetry.drafted(*self._proposed)
        start = self._telemetry.mark()
        self.draft.accepted(starts, path, counts, tokens)
        self._telemetry.drafted(start, self._telemetry.mark())
