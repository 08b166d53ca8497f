"""What a node attends to: the row's tokens, its ancestors and itself, each at its own absolute position."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.nodes.tree import NOT_ATTENDED, Tree, node_batch, root_alone, within_block
from wsm.layout.kv import KV_BLOCK_TOKENS as BLOCK


@st.composite
def trees(draw: st.DrawFn) -> tuple[Tree, torch.Tensor]:
    """Random trees of two rows, some nodes not real, roots anywhere in a block."""
    count = draw(st.integers(1, 12))
    parents, depths = [], []
    for _ in range(2):
        above, deep = [0], [0]
        for node in range(1, count):
            above.append(draw(st.integers(0, node - 1)))
            deep.append(deep[above[-1]] + 1)
        parents.append(above)
        depths.append(deep)
    real = [[True, *(draw(st.booleans()) for _ in range(count - 1))] for _ in range(2)]
    starts = [draw(st.one_of(st.integers(0, 600), st.integers(BLOCK - 5, BLOCK + 2))) for _ in range(2)]
    tokens = torch.arange(2 * count).view(2, count)
    return Tree(tokens, torch.tensor(parents), torch.tensor(depths), torch.tensor(real)), torch.tensor(starts)


def expected_window(tree: Tree, row: int, node: int, start: int) -> list[int]:
    begin = start - start % BLOCK
    window = [begin + place if begin + place < start else NOT_ATTENDED for place in range(BLOCK)]
    if not bool(tree.real[row, node]):
        window[start - begin] = start + node
        return window
    while True:
        window[start - begin + int(tree.depths[row, node])] = start + node
        if node == 0:
            return window
        node = int(tree.parents[row, node])


@settings(deadline=None, max_examples=60)
@given(trees())
def test_a_node_attends_to_its_row_its_ancestors_and_itself(drawn: tuple[Tree, torch.Tensor]) -> None:
    tree, starts = drawn
    whole, kept = node_batch(tree, starts), within_block(tree, starts)
    assert whole.prefix.tolist() == [int(start) // BLOCK * BLOCK for start in starts]
    for row, start in enumerate(starts.tolist()):
        for node in range(tree.tokens.shape[1]):
            assert whole.columns[row, node] == start + node
            depth = int(kept.depths[row, node]) if kept.real[row, node] else 0
            assert whole.positions[row, node] == start + depth
            assert whole.window[row, node].tolist() == expected_window(kept, row, node, start)


@settings(deadline=None, max_examples=60)
@given(trees())
def test_a_tree_ends_at_its_block_and_below_a_node_that_is_not_real(drawn: tuple[Tree, torch.Tensor]) -> None:
    tree, starts = drawn
    kept = within_block(tree, starts)
    for row, start in enumerate(starts.tolist()):
        alive = list[bool]()
        for node in range(tree.tokens.shape[1]):
            inside = start % BLOCK + int(tree.depths[row, node]) < BLOCK
            above = node == 0 or alive[int(tree.parents[row, node])]
            alive.append(bool(tree.real[row, node]) and inside and above)
        assert kept.real[row].tolist() == alive


def test_without_a_draft_the_root_is_the_only_real_node() -> None:
    alone = root_alone(torch.tensor([7, 9]), 3)
    assert alone.tokens[:, 0].tolist() == [7, 9]
    assert alone.real.tolist() == [[True, False, False]] * 2
