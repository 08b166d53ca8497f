"""How a tree grows from a draft's probabilities: level by level, the likeliest first, the same on every run.

Pure functions of tensors on the device, of fixed shapes. A grown tree has the root and ``width`` nodes a level, each
level behind the one before; the likeliest of all of them are verified.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.nodes.tree import Tree, within_block
from wsm.layout.kv import KV_BLOCK_TOKENS

_AT_ONCE = 256
"""Values of which the largest is looked at first, where there are many."""


def best(values: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest of float32 ``[..., n]``, the largest first, of equal ones the first; int64.

    ``topk`` alone may take any of equal ones, and takes long for a vocabulary. The ``count`` largest are in as many
    stretches at most: those whose own largest values are, again of equal ones the first.
    """
    n = values.shape[-1]
    if n <= _AT_ONCE * count:
        return _best(values, count)
    if n % _AT_ONCE:
        values = F.pad(values, (0, -n % _AT_ONCE), value=-math.inf)
    stretches = values.unflatten(-1, (-1, _AT_ONCE))
    kept = _best(stretches.amax(-1), count).sort(-1).values
    inside = stretches.gather(-2, kept.unsqueeze(-1).expand(*kept.shape, _AT_ONCE)).flatten(-2)
    found = _best(inside, count)
    return (kept.gather(-1, found // _AT_ONCE) * _AT_ONCE + found % _AT_ONCE).clamp(max=n - 1)


def _best(values: Tensor, count: int) -> Tensor:
    """The same of few: no two are equal where value and place make one whole number."""
    bits = (values + 0.0).contiguous().view(torch.int32)  # 0.0: there is a -0.0, too
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    places = torch.arange(values.shape[-1], device=values.device)
    return (ordered * 2**32 + (2**32 - 1 - places)).topk(count, dim=-1).indices


def grown_tree(roots: Tensor, depth: int, width: int) -> Tree:
    """A tree of roots, int64 ``[B]``, before it has grown: a chain of level after level where parents are not known."""
    rows, count = roots.shape[0], 1 + depth * width
    depths = (torch.arange(count, device=roots.device) + width - 1) // width
    parents = ((depths - 2) * width + 1).clamp(min=0).expand(rows, -1).clone()
    tokens = roots.unsqueeze(1).repeat(1, count)
    return Tree(tokens, parents, depths.expand(rows, -1), torch.ones_like(tokens, dtype=torch.bool))


def children(logits: Tensor, sums: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The next level: the ``width`` likeliest children of all nodes of a level, the likeliest first.

    ``logits`` float32 ``[B, m, vocab]`` behind each node of the level, ``sums`` float32 ``[B, m]`` the log-probability
    of the path to it. The children's tokens, their parents (0 to m - 1) and sums, ``[B, width]`` each.
    """
    rows, nodes, vocab = logits.shape
    count = min(width, vocab)
    tokens = best(logits, count)
    likely = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
    # Not above its parent's, whatever rounding does: so the likeliest nodes of a tree have all their ancestors.
    likely = likely.nan_to_num(nan=-math.inf).clamp(max=0.0)
    every = (sums.unsqueeze(-1) + likely).view(rows, nodes * count)
    taken = best(every, width)
    return tokens.view(rows, -1).gather(1, taken), taken // count, every.gather(1, taken)


def likeliest(grown: Tree, sums: Tensor, starts: Tensor, nodes: int) -> tuple[Tree, Tensor]:
    """The root and the ``nodes - 1`` likeliest others, and where each was in ``grown``: int64 ``[B, nodes]``.

    ``sums`` float32 ``[B, G]`` are of all nodes. Nodes beyond the root's KV block are taken last, and are not real. A
    node stands behind its parent, since levels stand one behind the other.
    """
    beyond = starts.unsqueeze(1) % KV_BLOCK_TOKENS + grown.depths >= KV_BLOCK_TOKENS
    sums = sums.masked_fill(beyond, -math.inf)
    sums[:, 0] = math.inf
    kept = best(sums, nodes).sort(dim=1).values
    chosen = torch.zeros_like(grown.real).scatter_(1, kept, True)
    place = chosen.cumsum(1) - 1  # in the new tree, of those that are chosen
    parents = place.gather(1, grown.parents.gather(1, kept)).clamp(min=0)
    tree = Tree(grown.tokens.gather(1, kept), parents, grown.depths.gather(1, kept), grown.real.gather(1, kept))
    return within_block(tree, starts), kept


def padded(tree: Tree, nodes: int) -> Tree:
    """The tree with as many nodes; those that it lacks are not real."""
    more = (0, nodes - tree.tokens.shape[1])
    return Tree(*(F.pad(tensor, more) for tensor in tree))
