"""Acceptance goes down the tree with the model's own tokens, as far as they are in it and the row has room."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.nodes.tree import Tree
from llama.speculation.accept import accept
from tests.llama.speculation.drafts import random_shape


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(0, 5))
def test_the_path_is_that_of_a_plain_walk(seed: int, nodes: int, depth: int) -> None:
    random = torch.Generator().manual_seed(seed)
    rows = 3
    parents, depths = random_shape(rows, nodes, max(depth, 1), random)
    tokens, drawn = (torch.randint(0, 3, (rows, nodes), generator=random) for _ in range(2))
    real = torch.rand(rows, nodes, generator=random) < 0.8
    real[:, 0] = True
    room = torch.randint(0, 5, (rows,), generator=random)
    found = accept(Tree(tokens, parents, depths, real), drawn, depth, room)
    for row in range(rows):
        node, path = 0, [0]
        for _ in range(depth):
            children = [
                child
                for child in range(1, nodes)
                if real[row, child] and parents[row, child] == node and tokens[row, child] == drawn[row, node]
            ]
            if not children:
                break
            node = children[0]
            path.append(node)
        assert int(found.counts[row]) == min(len(path), int(room[row]))
        assert found.path[row, : len(path)].tolist() == path
        assert found.tokens[row, : len(path)].tolist() == drawn[row, path].tolist()
