"""Drafts for tests: trees of any shape with tokens of any kind, or what the model will say with wrong siblings."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from llama.nodes.tree import Tree


def random_shape(rows: int, nodes: int, depth: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Parents and depths, int64 ``[rows, nodes]``, at most ``depth`` deep; a chain where that is all the nodes."""
    if depth == nodes - 1:
        depths = torch.arange(nodes).repeat(rows, 1)
        return (depths - 1).clamp(min=0), depths
    parents, depths = torch.zeros(rows, nodes, dtype=torch.int64), torch.zeros(rows, nodes, dtype=torch.int64)
    for row in range(rows):
        for node in range(1, nodes):
            shallow = [above for above in range(node) if depths[row, above] < depth]
            parents[row, node] = shallow[int(torch.randint(len(shallow), (), generator=generator))]
            depths[row, node] = depths[row, parents[row, node]] + 1
    return parents, depths


class RandomTreeDraft:
    """Any tree, of tokens that mean nothing; some of its nodes are padding."""

    def __init__(self, nodes: int, depth: int, vocab: int, seed: int = 0) -> None:
        self.nodes, self.depth, self.room, self._vocab = nodes, depth, sys.maxsize, vocab
        self._random = torch.Generator().manual_seed(seed)

    def prepare(self, rows: int) -> None:
        pass

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        pass

    def propose(self, roots: Tensor, starts: Tensor) -> Tree:
        shape = len(roots), self.nodes
        parents, depths = random_shape(*shape, self.depth, self._random)
        tokens = torch.randint(0, self._vocab, shape, generator=self._random)
        real = torch.rand(shape, generator=self._random) < 0.9
        tokens[:, 0], real[:, 0] = roots, True
        return Tree(tokens, parents, depths, real)

    def accepted(self, starts: Tensor, path: Tensor, counts: Tensor, tokens: Tensor) -> None:
        pass


class OracleDraft(RandomTreeDraft):
    """Knows ``texts``, what follows each row's prompt, and says it on one way through a random tree; each node of it is
    wrong with ``error``, and all other nodes are wrong in most cases. Remembers how its trees fared."""

    def __init__(
        self, texts: Sequence[Sequence[int]], nodes: int, depth: int, vocab: int, error: float = 0.2, seed: int = 0
    ) -> None:
        super().__init__(nodes, depth, vocab, seed)
        self._texts, self._error = texts, error
        self._lengths = [0] * len(texts)
        self.taken: list[list[int]] = []

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        self._lengths = list(map(len, prompts))

    def propose(self, roots: Tensor, starts: Tensor) -> Tree:
        tree = super().propose(roots, starts)
        for row, start in enumerate(starts.tolist()):
            said = self._texts[row][start - self._lengths[row] + 1 :]
            leaf = int(tree.depths[row].argmax())
            while leaf:
                wrong = float(torch.rand((), generator=self._random)) < self._error
                depth = int(tree.depths[row, leaf])
                if depth <= len(said) and not wrong:
                    tree.tokens[row, leaf] = said[depth - 1]
                    tree.real[row, leaf] = True
                leaf = int(tree.parents[row, leaf])
        return tree

    def accepted(self, starts: Tensor, path: Tensor, counts: Tensor, tokens: Tensor) -> None:
        self.taken.append(counts.tolist())
