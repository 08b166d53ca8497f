"""Decode passes: a token a row, or several nodes a row of which those are kept that the model itself draws."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llama.batch import TokenBatch, decode_batch
from llama.kv.cache import KVCache
from llama.model import Transformer
from llama.nodes.forward import node_logits
from llama.nodes.tree import Tree, node_batch, root_alone, within_block
from llama.sampling import Sampling, margins_, sample
from llama.speculation.accept import accept
from llama.speculation.draft import Draft
from wsm.errors import UnusableInput

Mark = Callable[[str], None]


class Decoding(NamedTuple):
    """What every decode pass needs."""

    model: Transformer
    kv: KVCache
    sampling: Sampling
    chunk_tokens: int
    observer: Mark


class New(NamedTuple):
    """New tokens, one list a row.

    ``margins``: of each, how far its logit was above the largest other; empty where nobody looked.
    """

    tokens: list[list[int]]
    margins: list[list[float]]


class Decoder(Protocol):
    """Gives the rows' next tokens, read back from the device in one copy."""

    def first(self, logits: Tensor) -> New:
        """Token 1 of each row, drawn from float32 ``[B, vocab]``."""

    def next(self) -> New:
        """Those of the next pass; UnusableInput where its logits are not finite."""


class TokenPasses:
    """One token a row and pass. ``positions``, int64 ``[B]``: where each row's first new token will stand."""

    def __init__(self, decoding: Decoding, positions: Tensor) -> None:
        self._decoding, self._positions = decoding, positions
        self._rows = torch.arange(len(positions), device=positions.device)
        self._picked = positions
        self._batch: TokenBatch | None = None

    def first(self, logits: Tensor) -> New:
        sound = torch.isfinite(logits).all()
        logits.masked_fill_(~sound, 0.0)  # a draw from anything else would be the device's own failure
        self._picked = sample(logits, self._rows, self._positions, **self._decoding.sampling)
        return _Coming(self._picked.unsqueeze(1), torch.ones_like(self._rows), sound).new(self._decoding)

    def next(self) -> New:
        model, kv, _, chunk_tokens, observer = self._decoding
        observer("pass")
        picked, positions, lengths = self._picked, self._positions, kv.lengths[: len(self._picked)]
        self._batch = self._batch.followed_by(picked) if self._batch else decode_batch(picked, positions, lengths)
        self._positions = positions + 1
        logits = model.forward(self._batch, kv, chunk_tokens=chunk_tokens, logits="last")
        observer("queued")
        return self.first(logits)


class _Drawn(NamedTuple):
    """The model's own token behind each of M nodes, int64 ``[B, M]``."""

    tokens: Tensor
    margins: Tensor | None
    """float32 ``[B, M]``: how far their logits are above the largest other; None above temperature 0."""
    sound: Tensor
    """bool ``[]``: whether all real nodes' logits are finite."""


class NodePasses:
    """``nodes`` a row and pass, of one shape with a draft and without; each row may take ``new_tokens``.

    Margins are looked at here and not in :class:`TokenPasses`: beside all that a tree takes their few kernels are
    nothing, and where another number of nodes gives other tokens they tell a near tie from an error.
    """

    def __init__(
        self, decoding: Decoding, positions: Tensor, nodes: int, new_tokens: int, draft: Draft | None = None
    ) -> None:
        self._decoding, self._nodes, self._draft = decoding, nodes, draft
        self._starts, self._ends = positions, positions + (new_tokens - 1)
        self._rows = torch.arange(len(positions), device=positions.device)
        self._roots = positions
        self._tree: Tree | None = None

    def first(self, logits: Tensor) -> New:
        ones = torch.ones_like(self._rows)
        drawn = self._draw(logits.unsqueeze(1), self._starts.unsqueeze(1), ones.unsqueeze(1).bool())
        self._roots = drawn.tokens.squeeze(1)
        coming = _Coming(drawn.tokens, ones, drawn.sound, drawn.margins)
        self._propose()
        return coming.new(self._decoding)

    def next(self) -> New:
        model, kv, _, _, observer = self._decoding
        observer("pass")
        starts, draft, tree = self._starts, self._draft, self._tree
        assert tree is not None
        batch = node_batch(tree, starts)
        drawn = self._draw(node_logits(model, batch, kv), batch.positions + 1, tree.real)
        path, counts, tokens = accept(tree, drawn.tokens, draft.depth if draft is not None else 0, self._ends - starts)
        kv.keep_nodes(starts, path, counts)
        if draft is not None:
            draft.accepted(starts, path, counts, tokens)
        last = tokens.gather(1, (counts - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        self._roots = torch.where(counts > 0, last, self._roots)
        self._starts = starts + counts
        margins = None if drawn.margins is None else drawn.margins.gather(1, path)
        coming = _Coming(tokens, counts, drawn.sound, margins)
        self._propose()
        observer("queued")
        new = coming.new(self._decoding)
        kv.grow(list(map(len, new.tokens)))
        return new

    def _propose(self) -> None:
        """The next pass's trees: queued before the host waits for this one's tokens, so that it queues the next pass
        while the device drafts. After the last pass nobody asks for them."""
        if self._draft is None:
            tree = root_alone(self._roots, self._nodes)
        else:
            tree = self._draft.propose(self._roots, self._starts)
        self._tree = within_block(tree, self._starts)

    def _draw(self, logits: Tensor, positions: Tensor, real: Tensor) -> _Drawn:
        finite = torch.isfinite(logits).all(dim=-1)
        logits.masked_fill_(~finite.unsqueeze(-1), 0.0)  # as above; padding may be anything
        rows = self._rows.unsqueeze(1).expand_as(positions)
        logits, sampling = logits.flatten(0, 1), self._decoding.sampling
        drawn = sample(logits, rows.flatten(), positions.flatten(), **sampling)
        margins = None
        if sampling["temperature"] == 0 and logits.shape[1] > 1:
            margins = margins_(logits, drawn).view(positions.shape)
        return _Drawn(drawn.view(positions.shape), margins, (finite | ~real).all())


class _Coming:
    """The first ``counts [B]`` of ``tokens`` and of ``margins``, ``[B, n]`` each, and whether their logits were finite:
    one copy to the host, in which floats are their bits."""

    def __init__(self, tokens: Tensor, counts: Tensor, sound: Tensor, margins: Tensor | None = None) -> None:
        parts = (tokens,) if margins is None else (tokens, margins.view(torch.int32).to(tokens.dtype))
        self._count, self._parts = tokens.shape[1], len(parts)
        found = torch.cat((*parts, counts.unsqueeze(1)), dim=1).flatten()
        self._numbers = torch.cat((found, sound.view(1).to(found.dtype)))
        self._there: torch.cuda.Event | None = None
        if found.is_cuda:
            host = torch.empty(self._numbers.shape, dtype=found.dtype, pin_memory=True)
            self._numbers = host.copy_(self._numbers, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(found.device))

    def new(self, decoding: Decoding) -> New:
        """Those of each row, once they are there; UnusableInput where their logits were not finite."""
        if self._there is not None:
            self._there.synchronize()
        *numbers, finite = self._numbers.tolist()
        if not finite:
            decoding.kv.spoilt = True
            raise UnusableInput(
                f"{decoding.model.config.name} gives logits that are not finite: its weights are damaged, or too large "
                "for the dtype; take the checkpoint again, or another --dtype"
            )
        width = self._count * self._parts + 1
        rows = [numbers[begin : begin + width] for begin in range(0, len(numbers), width)]
        bits = [row[self._count : self._count + row[-1]] for row in rows] if self._parts > 1 else []
        return New([row[: row[-1]] for row in rows], [list(_as_floats(row)) for row in bits])


def _as_floats(bits: list[int]) -> tuple[float, ...]:
    """The float32 numbers of these bits, int32."""
    return struct.unpack(f"{len(bits)}f", struct.pack(f"{len(bits)}i", *bits))
