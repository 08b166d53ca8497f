"""How deep, how wide and how large a draft's trees are. Imports no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from wsm.errors import UnusableInput

NGRAM = "ngram"
DEFAULT_NODES = 16
"""Nodes of a row where neither ``--verify-rows`` nor ``--draft-depth`` says how many."""
FIRST_DEPTH = 8
"""Of a draft model, until a warm-up has shown how much of its time the link hides."""
SPREAD = 2
"""A tree grows so many times the nodes that are verified: which are the likeliest is not known before."""
MOST_WIDTH = 16
"""More nodes at once would cost a draft more than its weights' way through the GPU."""


class TreeShape(NamedTuple):
    """A tree reaches ``depth`` tokens behind its root, is grown ``width`` nodes a level, and has ``nodes`` in the end,
    the root among them; a ``width`` of 1 is a chain."""

    depth: int
    width: int
    nodes: int

    @property
    def grown(self) -> int:
        """Nodes before the likeliest are chosen."""
        return 1 + self.depth * self.width


class Speculating(NamedTuple):
    """What the flags say: ``draft``, ``depth`` (None: auto), ``width`` (None: as many as fill the nodes), ``nodes``."""

    draft: str
    depth: int | None
    width: int | None
    nodes: int

    @property
    def first(self) -> TreeShape:
        """The shape at the start; it stays unless the depth is auto and the draft a model."""
        depth = self.nodes - 1 if self.draft == NGRAM else min(self.nodes - 1, FIRST_DEPTH)
        return self.at(self.depth or depth)

    @property
    def may_change(self) -> bool:
        return self.depth is None and self.draft != NGRAM

    @property
    def possible(self) -> list[TreeShape]:
        """All shapes that there may be."""
        return [self.at(depth) for depth in range(1, self.nodes)] if self.may_change else [self.first]

    def at(self, depth: int) -> TreeShape:
        """The shape of that depth."""
        width = self.width or (1 if self.draft == NGRAM else width_for(depth, self.nodes))
        return TreeShape(depth, width, min(self.nodes, 1 + depth * width))


def width_for(depth: int, nodes: int) -> int:
    """Nodes a level where the user does not say: a chain if ``nodes`` hold no more, else enough to choose from."""
    return 1 if nodes <= depth + 1 else min(nodes - 1, MOST_WIDTH, SPREAD * -(-(nodes - 1) // depth))


def nodes_for(draft: str | None, depth: int | Literal["auto"], rows: int | None) -> int:
    """Nodes of a row in every decode pass, where ``--verify-rows`` may be left out."""
    if rows is not None or draft is None:
        return rows or 1
    return DEFAULT_NODES if depth == "auto" else depth + 1


def speculating(
    draft: str | None, depth: int | Literal["auto"], width: int | None, rows: int | None
) -> Speculating | None:
    """What ``--draft``, ``--draft-depth``, ``--draft-width`` and ``--verify-rows`` say; None without a draft.

    UnusableInput where they contradict each other.
    """
    if draft is None:
        given = {"--draft-depth": depth != "auto", "--draft-width": width is not None}
        if flags := [flag for flag, is_given in given.items() if is_given]:
            raise UnusableInput(f"{' and '.join(flags)} without --draft: name a draft, or leave {flags[0]} out")
        return None
    nodes = nodes_for(draft, depth, rows)
    if nodes < 2:
        raise UnusableInput(f"--verify-rows {nodes} has no room for a draft's tokens: with --draft give at least 2")
    if draft == NGRAM and width not in (None, 1):
        raise UnusableInput(f"--draft-width {width}: ngram proposes a chain, no tree; leave the flag out")
    for flag, value in (("--draft-depth", 0 if depth == "auto" else depth), ("--draft-width", width or 0)):
        if value >= nodes:
            raise UnusableInput(
                f"{flag} {value} does not go into --verify-rows {nodes}: raise the second to {value + 1}, or lower the "
                "first"
            )
    return Speculating(draft, None if depth == "auto" else depth, width, nodes)
