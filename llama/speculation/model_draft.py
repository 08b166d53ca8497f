"""A LLaMA as a draft: wholly on the device, with KV of its own that is kept in step with what was accepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama.batch import prefill_batch, waves
from llama.kv.cache import KVCache
from llama.model import Transformer
from llama.nodes.forward import node_layers
from llama.nodes.tree import NodeBatch, NodePlaces, Tree
from llama.products import Acquire
from llama.speculation.shape import TreeShape
from llama.speculation.tree import children, grown_tree, likeliest, padded
from wsm.layout.kv import KV_BLOCK_TOKENS


class _Proposal(NamedTuple):
    """A tree, and where each of its nodes was in the grown one: int64 ``[B, shape.nodes]``."""

    tree: Tree
    places: Tensor


class _Captured(NamedTuple):
    """The growth of as many trees as there are ``roots``, as one CUDA graph; all tensors stay where they are."""

    graph: torch.cuda.CUDAGraph
    roots: Tensor
    starts: Tensor
    proposal: _Proposal


class ModelDraft:
    """Grows trees from the probabilities of ``model``, whose weights are resident.

    Every level is computed, the last one too, so what is accepted has its keys and values in ``kv`` already: they are
    moved to where the row's tokens are. On a GPU the growth of a whole tree is one captured graph.

    Args:
        kv: has room for ``shape.grown`` columns behind a row's last token.
        nodes: of a proposal, padding included.
        chunk_tokens: prompt tokens that are computed at once.
        wave_rows: rows of a pass of the prefill.
    """

    def __init__(
        self, model: Transformer, kv: KVCache, shape: TreeShape, nodes: int, *, chunk_tokens: int, wave_rows: int
    ) -> None:
        self.shape, self.depth, self.nodes = shape, shape.depth, nodes
        self.model, self.kv = model, kv
        self.room = min(kv.tokens - (shape.grown - 1), model.max_tokens)
        self._chunk_tokens, self._wave_rows = chunk_tokens, wave_rows
        self._captured: dict[int, _Captured] = {}
        # Of all graphs: only the last proposal is asked for, so they may use each other's memory.
        self._pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None
        self._last: _Proposal | None = None

    def prepare(self, rows: int) -> None:
        """On a GPU growth is captured here; that writes into the cache."""
        if self.model.device.type == "cuda" and rows not in self._captured:
            self._captured[rows] = self._capture(rows)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        self.kv.reset()
        for rows in waves(len(prompts), self._wave_rows):
            batch = prefill_batch([prompts[row] for row in rows], rows, self.model.device)
            self.model.forward(batch, self.kv, chunk_tokens=self._chunk_tokens, logits="last")

    def propose(self, roots: Tensor, starts: Tensor) -> Tree:
        captured = self._captured.get(len(roots))
        if captured is None:
            self._last = self._grow(roots, starts, self.model.groups.acquire)
        else:
            captured.roots.copy_(roots)
            captured.starts.copy_(starts)
            with self.model.groups.acquire_all():
                captured.graph.replay()
            self._last = captured.proposal
        return self._last.tree

    def accepted(self, starts: Tensor, path: Tensor, counts: Tensor, tokens: Tensor) -> None:
        assert self._last is not None
        self.kv.keep_nodes(starts, self._last.places.gather(1, path), counts)

    @torch.inference_mode()
    def reshaped(self, shape: TreeShape) -> ModelDraft:
        """The same draft, growing other trees, as ready as this one was; this one is of no use any more."""
        portions = {"chunk_tokens": self._chunk_tokens, "wave_rows": self._wave_rows}
        counts = list(self._captured)
        self._captured.clear()  # their memory is free for the others
        self._last = None
        other = ModelDraft(self.model, self.kv, shape, self.nodes, **portions)
        for rows in counts:
            other.prepare(rows)
        return other

    def _grow(self, roots: Tensor, starts: Tensor, acquire: Acquire) -> _Proposal:
        depth, width, nodes = self.shape
        grown = grown_tree(roots, depth, width)
        sums = torch.zeros(grown.tokens.shape, dtype=torch.float32, device=roots.device)
        real = starts.unsqueeze(1) % KV_BLOCK_TOKENS + grown.depths < KV_BLOCK_TOKENS
        places = NodePlaces(starts, grown.depths * real)
        own = torch.eye(real.shape[1], dtype=torch.bool, device=roots.device)
        level, lineage = slice(0, 1), own[:1].expand(len(roots), -1, -1)  # of a level: itself and all above
        for _ in range(depth):
            logits = self._level(places.batch(grown.tokens[:, level], level, lineage), acquire)
            below = slice(level.stop, level.stop + width)
            grown.tokens[:, below], parents, sums[:, below] = children(logits, sums[:, level], width)
            grown.parents[:, below] = parents + level.start
            above = lineage.gather(1, parents.unsqueeze(2).expand(-1, -1, real.shape[1]))
            # What is beyond the block is computed alone: nobody asks for it.
            level, lineage = below, above & real[:, below].unsqueeze(2) | own[below]
        node_layers(self.model, places.batch(grown.tokens[:, level], level, lineage), self.kv, acquire)
        tree, kept = likeliest(grown, sums, starts, nodes)
        return _Proposal(padded(tree, self.nodes), kept)

    def _level(self, batch: NodeBatch, acquire: Acquire) -> Tensor:
        """float32 ``[B, M, vocab]`` behind each node of a level."""
        h = node_layers(self.model, batch, self.kv, acquire)[: batch.tokens.numel()]
        return self.model.head(h, len(h)).view(*batch.tokens.shape, -1)

    def _capture(self, rows: int) -> _Captured:
        device = self.model.device
        roots, starts = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        with self.model.groups.acquire_all() as acquire:
            self._grow(roots, starts, acquire)  # libraries take their workspaces outside the graph
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                proposal = self._grow(roots, starts, acquire)
        return _Captured(graph, roots, starts, proposal)
