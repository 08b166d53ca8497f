"""CUDA graphs of the decode pass, where no weight moves: without them a small model waits for its kernels' launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llama.batch import Segment, TokenBatch
from llama.kv.cache import KVCache, attended_tokens
from llama.products import Acquire, ProductSource

Layers = Callable[[TokenBatch, KVCache, Acquire, int], Tensor]
"""``Transformer.layers``."""


class DecodeGraphs:
    """Captured decode passes, one for each number of rows and of attended positions.

    A replay runs the kernels of ``Transformer.layers`` in their order, on the same shapes: its results are bit-equal.
    Tokens and positions stay where they were at the capture; everything else follows from them.

    Args:
        groups: of ``resident`` weights, since a graph needs them to stay where they are.

    ``captured`` has, for each number of rows and of attended positions, the graph and the residual ``[rows, dim]``
    behind the last layer.
    """

    def __init__(self, groups: ProductSource, kv: KVCache, device: torch.device) -> None:
        self._groups, self._kv, self._device = groups, kv, device
        self._tokens = torch.zeros(kv.batch, dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._tokens)
        self._pool = torch.cuda.graph_pool_handle()
        self.captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def prepare(self, layers: Layers, rows: int, shortest: int, longest: int, chunk_tokens: int) -> None:
        """Capture what decoding ``rows`` rows will need whose longest row grows from ``shortest`` to ``longest``.

        The cache must be empty: a capture writes a token into each row.
        """
        length, wanted = shortest, list[int]()
        while length <= longest:
            wanted.append(attended_tokens(length, self._kv.tokens))
            length = wanted[-1] + 1
        for tokens in reversed(wanted):  # the largest first: the others fit into its memory
            if (rows, tokens) not in self.captured:
                self.captured[rows, tokens] = self._capture(layers, rows, min(tokens, longest), chunk_tokens)

    def _capture(
        self, layers: Layers, rows: int, length: int, chunk_tokens: int
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        self._tokens.zero_()
        self._positions.fill_(length - 1)
        segments = tuple(Segment(row, length - 1, 1, row) for row in range(rows))
        places = torch.arange(rows, device=self._device)
        batch = TokenBatch(self._tokens[:rows], self._positions[:rows], places, segments)
        with self._groups.acquire_all() as acquire:
            layers(batch, self._kv, acquire, chunk_tokens)  # libraries take their workspaces outside the graph
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                residual = layers(batch, self._kv, acquire, chunk_tokens)
        return graph, residual

    def replayed(self, batch: TokenBatch) -> Tensor | None:
        """The residual ``[rows, dim]`` of a decode pass, valid until the next one; None where no graph fits it."""
        rows = len(batch.segments)
        tokens = attended_tokens(max(segment.end_pos for segment in batch.segments), self._kv.tokens)
        in_order = all(segment.length == 1 and segment.row == place for place, segment in enumerate(batch.segments))
        if not in_order or (rows, tokens) not in self.captured:
            return None
        graph, residual = self.captured[rows, tokens]
        self._tokens[:rows].copy_(batch.tokens)
        self._positions[:rows].copy_(batch.positions)
        with self._groups.acquire_all():
            graph.replay()
        return residual
