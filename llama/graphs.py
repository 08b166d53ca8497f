"""CUDA graphs of the decode pass, where no weight moves: without them a small model waits for its kernels' launches."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from llama.batch import Segment, TokenBatch
from llama.kv.cache import KVCache, attended_tokens
from llama.model import Transformer


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    residual: Tensor  # [rows, dim] behind the last layer


class DecodeGraphs:
    """Captured decode passes, one for each number of rows and of attended positions.

    A replay runs the kernels of :meth:`Transformer.layers` in their order, on the same shapes: its results are
    bit-equal. Tokens and positions stay where they were at the capture; everything else follows from them.
    """

    def __init__(self, model: Transformer, kv: KVCache) -> None:
        if not model.weights.resident:
            raise ValueError("a graph needs weights that stay where they are")
        self._model, self._kv = model, kv
        self._tokens = torch.zeros(kv.batch, dtype=torch.int64, device=model.device)
        self._positions = torch.zeros_like(self._tokens)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, int], _Graph] = {}

    @property
    def captured(self) -> list[tuple[int, int]]:
        """Rows and attended positions of each graph."""
        return list(self._graphs)

    def prepare(self, rows: int, shortest: int, longest: int, chunk_tokens: int) -> None:
        """Capture what decoding ``rows`` rows will need whose longest row grows from ``shortest`` to ``longest``.

        The cache must be empty: a capture writes a token into each row.
        """
        length, wanted = shortest, list[int]()
        while length <= longest:
            wanted.append(attended_tokens(length, self._kv.tokens))
            length = wanted[-1] + 1
        for tokens in reversed(wanted):  # the largest first: the others fit into its memory
            if (rows, tokens) not in self._graphs:
                self._graphs[rows, tokens] = self._capture(rows, min(tokens, longest), chunk_tokens)

    def _capture(self, rows: int, length: int, chunk_tokens: int) -> _Graph:
        model = self._model
        self._tokens.zero_()
        self._positions.fill_(length - 1)
        segments = tuple(Segment(row, length - 1, 1, row) for row in range(rows))
        places = torch.arange(rows, device=model.device)
        batch = TokenBatch(self._tokens[:rows], self._positions[:rows], places, segments)
        with model.weights.acquire_all() as groups:
            acquire = lambda group: contextlib.nullcontext(groups[group])  # noqa: E731
            model.layers(batch, self._kv, acquire, chunk_tokens)  # libraries take their workspaces outside the graph
            torch.cuda.synchronize(model.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                residual = model.layers(batch, self._kv, acquire, chunk_tokens)
        return _Graph(graph, residual)

    def replayed(self, batch: TokenBatch) -> Tensor | None:
        """The residual ``[rows, dim]`` of a decode pass, valid until the next one; None where no graph fits it."""
        rows = len(batch.segments)
        if any(segment.length != 1 or segment.row != place for place, segment in enumerate(batch.segments)):
            return None
        tokens = attended_tokens(max(segment.end_pos for segment in batch.segments), self._kv.tokens)
        captured = self._graphs.get((rows, tokens))
        if captured is None:
            return None
        self._tokens[:rows].copy_(batch.tokens)
        self._positions[:rows].copy_(batch.positions)
        with self._model.weights.acquire_all():
            captured.graph.replay()
        return captured.residual

    def close(self) -> None:
        """Free the graphs; the model goes on without them."""
        self._graphs.clear()
        self._model.graphs = None
