"""A tree grows by cumulative probability alone, the same on every run, and what is verified of it is a tree."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama.nodes.tree import Tree
from llama.speculation.tree import best, children, grown_tree, likeliest
from wsm.layout.kv import KV_BLOCK_TOKENS

VOCAB = 7


def logits_after(path: tuple[int, ...], row: int) -> Tensor:
    """Of a made-up draft: any function of the path will do."""
    generator = torch.Generator().manual_seed(hash((row, *path)) % 2**31)
    return torch.randn(VOCAB, generator=generator) * 2


def grow(rows: int, depth: int, width: int) -> tuple[Tree, Tensor]:
    """As a model grows it; the logits of a node are those of its path."""
    tree = grown_tree(torch.zeros(rows, dtype=torch.int64), depth, width)
    sums = torch.zeros(rows, 1 + depth * width)
    for level in range(depth):
        begin, end = (0, 1) if level == 0 else (1 + (level - 1) * width, 1 + level * width)
        nodes = range(begin, end)
        logits = torch.stack([torch.stack([logits_after(path(tree, r, n), r) for n in nodes]) for r in range(rows)])
        found = slice(1 + level * width, 1 + (level + 1) * width)
        tree.tokens[:, found], parents, sums[:, found] = children(logits, sums[:, begin:end], width)
        tree.parents[:, found] = parents + begin
    return tree, sums


def path(tree: Tree, row: int, node: int) -> tuple[int, ...]:
    """Tokens from behind the root down to a node."""
    tokens: tuple[int, ...] = ()
    while node:
        tokens = (int(tree.tokens[row, node]), *tokens)
        node = int(tree.parents[row, node])
    return tokens


def sum_of(tokens: tuple[int, ...], row: int) -> float:
    return sum(float(logits_after(tokens[:n], row).log_softmax(0)[token]) for n, token in enumerate(tokens))


@pytest.mark.parametrize(("depth", "width"), [(4, 1), (3, 2), (2, 5), (5, 3)])
def test_each_level_has_the_likeliest_children_of_the_level_before(depth: int, width: int) -> None:
    tree, sums = grow(2, depth, width)
    for row in range(2):
        level: list[tuple[int, ...]] = [()]
        for number in range(depth):
            every = [(*before, token) for before, token in product(level, range(VOCAB))]
            level = sorted(every, key=lambda tokens: -sum_of(tokens, row))[:width]
            nodes = range(1 + number * width, 1 + (number + 1) * width)
            assert [path(tree, row, node) for node in nodes] == level
            expected = pytest.approx([sum_of(tokens, row) for tokens in level], abs=1e-5)
            assert sums[row, nodes.start : nodes.stop].tolist() == expected
            assert {int(tree.depths[row, node]) for node in nodes} == {number + 1}


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_what_is_verified_is_the_likeliest_and_a_tree(depth: int, width: int, data: st.DataObject) -> None:
    grown, sums = grow(2, depth, width)
    nodes = data.draw(st.integers(1, 1 + depth * width))
    starts = torch.tensor([data.draw(st.integers(0, KV_BLOCK_TOKENS - 1)) for _ in range(2)])
    tree, places = likeliest(grown, sums, starts, nodes)
    for row in range(2):
        room = KV_BLOCK_TOKENS - 1 - int(starts[row])
        kept = places[row].tolist()
        assert kept == sorted(set(kept))
        assert kept[0] == 0
        for node in range(nodes):
            assert path(tree, row, node) == path(grown, row, kept[node])
            assert bool(tree.real[row, node]) == (int(tree.depths[row, node]) <= room)
            assert int(tree.parents[row, node]) < node or node == 0
        left = [g for g in range(1, 1 + depth * width) if g not in kept and int(grown.depths[row, g]) <= room]
        mine = [float(sums[row, g]) for g in kept[1:]]
        if left and mine:
            assert all(tree.real[row]), "a node beyond the block is taken only where there is no other"
            assert max(float(sums[row, g]) for g in left) <= min(mine)


@given(
    st.lists(st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 1e-30, 2.0, math.inf]), min_size=1, max_size=30), st.data()
)
def test_of_equal_values_the_first_is_best(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    expected = sorted(range(len(values)), key=lambda place: -values[place])[:count]
    assert best(torch.tensor(values), count).tolist() == expected


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 5000), st.integers(1, 40), st.integers(0, 2**32))
def test_the_best_of_a_vocabulary_are_those_of_a_sort(rows: int, vocab: int, different: int, seed: int) -> None:
    """Of values of which many are equal, and some infinite."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-different, different, (rows, vocab), generator=generator).float()
    values[values == -different] = -math.inf
    count = min(1 + seed % 12, vocab)
    assert best(values, count).equal(values.sort(dim=-1, descending=True, stable=True).indices[:, :count])


def test_a_certain_token_is_behind_its_parent_and_a_broken_draft_still_gives_a_tree() -> None:
    certain = torch.full((1, 1, VOCAB), -1e4)
    certain[..., 3] = 1e4
    for logits in (certain, torch.full((1, 1, VOCAB), math.nan)):
        grown, sums = grown_tree(torch.tensor([5]), 3, 1), torch.zeros(1, 4)
        for level in range(3):
            at = slice(level + 1, level + 2)
            grown.tokens[:, at], _, sums[:, at] = children(logits, sums[:, level : level + 1], 1)
        tree, places = likeliest(grown, sums, torch.tensor([0]), 3)
        assert places.tolist() == [[0, 1, 2]]
        assert tree.parents.tolist() == [[0, 0, 1]]
        assert 0 <= int(tree.tokens.min()) <= int(tree.tokens.max()) < VOCAB
