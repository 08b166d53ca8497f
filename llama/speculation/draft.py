"""What proposes tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from llama.nodes.tree import Tree


class Draft(Protocol):
    """Proposes a tree of tokens for each of B rows; ``depth`` is the most below the root, ``nodes`` are those of a row.

    ``room`` is the most tokens that a row may have, prompt and new ones together.
    All tensors are on the device, of fixed shapes, and nothing is uploaded or read back after :meth:`prefill`.
    """

    depth: int
    nodes: int
    room: int

    def prepare(self, rows: int) -> None:
        """What is made once for so many rows is made now, before anything is timed."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """A generation begins: forget all, and take in the prompts, one a row."""

    def propose(self, roots: Tensor, starts: Tensor) -> Tree:
        """Trees ``[B, nodes]`` behind the rows' last tokens, which stand at ``starts``: int64 ``[B]`` each.

        They are asked for before the host knows whether a row goes on: those behind a generation's last tokens, within
        ``room`` too, are never verified, and the next call is :meth:`prefill`.
        """

    def accepted(self, starts: Tensor, path: Tensor, counts: Tensor, tokens: Tensor) -> None:
        """What the model made of the trees whose roots stood at ``starts``.

        Args:
            path: int64 ``[B, depth + 1]``, the nodes that were followed, the root (0) first.
            counts: int64 ``[B]``, how many of them count; 0 for a row that is at its end and stays where it is.
            tokens: int64 ``[B, depth + 1]``, the model's own token behind each of these nodes: the new tokens. The
                next root is the last that counts.
        """
