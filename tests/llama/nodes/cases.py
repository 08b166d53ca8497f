"""Node attention in every head geometry, and what must not change a bit of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llama.config import PRESETS
from llama.nodes.tree import NodeBatch, Tree, node_batch
from tests.llama.speculation.drafts import random_shape

GEOMETRIES = sorted({(c.n_heads, c.n_kv_heads, c.head_dim) for c in PRESETS.values()} | {(9, 3, 64), (4, 2, 24)})
"""Heads, KV heads and head_dim of the presets, of SmolLM2 and of the tests' own model."""
NODES, COLUMNS = 5, 768
STARTS = (600, 3, 255)


class Case(NamedTuple):
    """The arguments of ``attend_nodes``."""

    q: Tensor
    keys: Tensor
    values: Tensor
    batch: NodeBatch

    @classmethod
    def random(cls, n_heads: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Case:
        """Random trees of three rows whose roots stand anywhere."""
        random = torch.Generator().manual_seed(n_heads * head_dim)
        records = torch.randn(len(STARTS), n_kv_heads, COLUMNS, 2, head_dim, generator=random).to(dtype)
        keys, values = records.unbind(-2)
        q = torch.randn(len(STARTS), NODES, n_heads, head_dim, generator=random).to(dtype)
        parents, depths = random_shape(len(STARTS), NODES, 4, random)
        real = torch.ones_like(parents, dtype=torch.bool)
        real[:, -1] = False
        batch = node_batch(Tree(parents, parents, depths, real), torch.tensor(STARTS))
        return cls(q, keys, values, batch)

    def of_rows(self, order: Tensor) -> Case:
        batch = NodeBatch(*(tensor[order] for tensor in self.batch))
        return Case(self.q[order], self.keys[order], self.values[order], batch)

    def of_nodes(self, order: Tensor) -> Case:
        batch = NodeBatch(*(tensor[:, order] for tensor in self.batch[:4]), self.batch.prefix)
        return Case(self.q[:, order], self.keys, self.values, batch)


def permuted(case: Case) -> Iterator[tuple[Case, Callable[[Tensor], Tensor]]]:
    """The case told otherwise, and how its result has to be told then."""
    rows, nodes = case.q.shape[:2]
    for seed in range(2):
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(rows, generator=random)
        yield case.of_rows(order), lambda out, order=order: out[order]
        among = torch.randperm(nodes, generator=random)
        yield case.of_nodes(among), lambda out, among=among: out[:, among]
        # Other nodes beside one that is kept, in another place.
        other = case.of_nodes(torch.full((nodes,), int(among[0])))
        yield other._replace(q=other.q), lambda out, among=among: out[:, among[:1].expand(nodes)]
        # The KV of nodes in other columns: as a tree of another shape would have it.
        columns = torch.randperm(nodes, generator=random)
        yield moved(case, columns), lambda out: out
    masked = case.keys.clone(), case.values.clone()
    seen = torch.zeros(rows, COLUMNS + 1, dtype=torch.bool)
    seen.scatter_(1, case.batch.window.flatten(1) % (COLUMNS + 1), True)
    seen = seen[:, :COLUMNS] | (torch.arange(COLUMNS) < case.batch.prefix.unsqueeze(1))
    for tensor in masked:
        tensor.masked_fill_(~seen[:, None, :, None], 1e4)
    yield Case(case.q, *masked, case.batch), lambda out: out
    for tensor in masked:
        tensor.masked_fill_(~seen[:, None, :, None], float("nan"))
    yield Case(case.q, *masked, case.batch), lambda out: out


def moved(case: Case, columns: Tensor) -> Case:
    """Node i's key and value at column ``start + columns[i]``, and windows that say so."""
    keys, values, window = case.keys.clone(), case.values.clone(), case.batch.window.clone()
    for row, start in enumerate(STARTS):
        for kept, source in ((keys, case.keys), (values, case.values)):
            kept[row, :, start + columns] = source[row, :, start : start + len(columns)]
        own = (window[row] >= start) & (window[row] < start + len(columns))
        window[row] = torch.where(own, start + columns[(window[row] - start) * own], window[row])
    return Case(case.q, keys, values, case.batch._replace(window=window))
