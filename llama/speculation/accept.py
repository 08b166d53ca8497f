"""Which nodes of a tree are accepted: those that the model itself draws."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llama.nodes.tree import Tree


class Accepted(NamedTuple):
    """The way down each of B trees that the model's own tokens took."""

    path: Tensor
    """int64 [B, depth + 1]: nodes, the root (0) first."""
    counts: Tensor
    """int64 [B]: how many of them count, and so how many tokens are new."""
    tokens: Tensor
    """int64 [B, depth + 1]: the model's own token behind each node of the path."""


def accept(tree: Tree, drawn: Tensor, depth: int, room: Tensor) -> Accepted:
    """Follow, from the root, the child that is the token which the model drew behind its parent (``drawn [B, N]``).

    The draw does not depend on the tree, so the tokens are those of a run without a draft, and so is their
    distribution. ``depth`` is the most steps; ``room``, int64 ``[B]``, how many new tokens a row may take: of a row
    without room no node counts.
    """
    count = tree.tokens.shape[1]
    index = torch.arange(count, device=drawn.device)
    below = tree.real & (index > 0)
    at = torch.zeros_like(room).unsqueeze(1)
    token = drawn.gather(1, at)
    path, tokens, going = [at], [token], torch.ones_like(at, dtype=torch.bool)
    counts = torch.ones_like(at)
    for _ in range(depth):
        fits = below & (tree.parents == at) & (tree.tokens == token)
        child = torch.where(fits, index, count).amin(dim=1, keepdim=True)  # of equal siblings the first
        going = going & (child < count)
        at = torch.where(going, child, at)
        token = drawn.gather(1, at)
        path.append(at)
        tokens.append(token)
        counts = counts + going
    return Accepted(torch.cat(path, 1), torch.minimum(counts.squeeze(1), room), torch.cat(tokens, 1))
