"""Trees of proposed tokens, and what the model has to know to compute their nodes; all on the device, nothing uploaded.

A node's key and value lie at a column of their own behind the row's tokens: the root, the row's last token, at
``start``, node i at ``start + i``. Its absolute position is ``start + depth``. It attends to the row's tokens, its
ancestors and itself: the whole KV blocks before the root's together, and the root's block through a window that is
ordered by absolute position. So a node's keys are summed in the same order whatever the tree's shape; hence a tree ends
where the root's block does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wsm.layout.kv import KV_BLOCK_TOKENS

NOT_ATTENDED = -1


class Tree(NamedTuple):
    """What a draft proposes for each of B rows: N nodes, the root at 0, every parent before its children."""

    tokens: Tensor
    """int64 [B, N]; the root's is the row's last token, whose KV is not yet in the cache."""
    parents: Tensor
    """int64 [B, N]: index of the parent, 0 for the root."""
    depths: Tensor
    """int64 [B, N]: 0 for the root."""
    real: Tensor
    """bool [B, N]; the others are padding, for fixed shapes: their tokens, parents and depths do not count."""


class NodeBatch(NamedTuple):
    """What the model computes at once: M nodes a row, all of a tree's or some."""

    tokens: Tensor
    """int64 [B, M]"""
    positions: Tensor
    """int64 [B, M]: absolute ones, for the rotary embedding."""
    columns: Tensor
    """int64 [B, M]: where in the row's KV a node's key and value go."""
    window: Tensor
    """int64 [B, M, KV_BLOCK_TOKENS]: the column that holds, for this node, each position of the root's block."""
    prefix: Tensor
    """int64 [B]: tokens before the root's block, attended in whole blocks."""


def root_alone(roots: Tensor, nodes: int) -> Tree:
    """The tree ``[B, nodes]`` of a pass without a draft: the rows' last tokens, int64 ``[B]``, and padding."""
    tokens = roots.unsqueeze(1).expand(-1, nodes)
    nothing = torch.zeros_like(tokens)
    return Tree(tokens, nothing, nothing, torch.arange(nodes, device=roots.device).expand_as(tokens) == 0)


def within_block(tree: Tree, starts: Tensor) -> Tree:
    """The tree without the nodes beyond the root's KV block, and without children of nodes that are not real."""
    real = tree.real & (starts.unsqueeze(1) % KV_BLOCK_TOKENS + tree.depths < KV_BLOCK_TOKENS)
    return tree._replace(real=~(_lineage(tree.parents) & ~real.unsqueeze(1)).any(-1))


def node_batch(tree: Tree, starts: Tensor) -> NodeBatch:
    """The batch of a tree whose roots stand at ``starts`` (int64 ``[B]``).

    Nodes that are not real, or that :func:`within_block` would drop, are computed as siblings of the root: whatever
    their numbers are, nobody asks for them.
    """
    tree = within_block(tree, starts)
    own = torch.eye(tree.tokens.shape[1], dtype=torch.bool, device=starts.device)
    attended = torch.where(tree.real.unsqueeze(2), _lineage(tree.parents), own)
    return NodePlaces(starts, tree.depths * tree.real).batch(tree.tokens, slice(None), attended)


class NodePlaces:
    """Where nodes of ``depths``, int64 ``[B, N]``, have their keys, behind roots at ``starts``, int64 ``[B]``."""

    def __init__(self, starts: Tensor, depths: Tensor) -> None:
        starts = starts.unsqueeze(1)
        prefix = starts - starts % KV_BLOCK_TOKENS
        self._positions, self._prefix = starts + depths, prefix.squeeze(1)
        self._in_block = (starts % KV_BLOCK_TOKENS + depths).unsqueeze(1)
        self._columns = starts + torch.arange(depths.shape[1], device=starts.device)
        # One more than the block has: the place of what a node does not attend to.
        committed = prefix + torch.arange(KV_BLOCK_TOKENS + 1, device=starts.device)
        self._committed = committed.masked_fill(committed >= starts, NOT_ATTENDED).unsqueeze(1)

    def batch(self, tokens: Tensor, nodes: slice, attended: Tensor) -> NodeBatch:
        """Of some nodes: their ``tokens [B, M]``, and which of all they attend to, bool ``[B, M, N]``."""
        window = self._committed.repeat(1, tokens.shape[1], 1)
        places = torch.where(attended, self._in_block, KV_BLOCK_TOKENS)
        window.scatter_(2, places, self._columns.unsqueeze(1).expand(attended.shape))
        inside = window[..., :KV_BLOCK_TOKENS].contiguous()
        return NodeBatch(tokens, self._positions[:, nodes], self._columns[:, nodes], inside, self._prefix)


def _lineage(parents: Tensor) -> Tensor:
    """Of each node its ancestors and itself, bool ``[B, N, N]``; each round doubles how far up a node looks."""
    rows, count = parents.shape
    found = torch.eye(count, dtype=torch.bool, device=parents.device).expand(rows, -1, -1)
    above = parents
    for _ in range((count - 1).bit_length()):
        found = found | found.gather(1, above.unsqueeze(2).expand(-1, -1, count))
        above = above.gather(1, above)
    return found
