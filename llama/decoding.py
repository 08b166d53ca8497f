"""Decode passes: a token a row, or several nodes a row of which those are kept that the model itself draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llama.batch import TokenBatch, decode_batch
from llama.kv.cache import KVCache
from llama.model import Transformer
from llama.nodes.forward import node_logits
from llama.nodes.tree import node_batch, root_alone, within_block
from llama.sampling import Sampling, sample
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


class Decoder(Protocol):
    """Gives the rows' next tokens, one list a row, read back from the device in one copy."""

    def first(self, logits: Tensor) -> list[list[int]]:
        """Token 1 of each row, drawn from float32 ``[B, vocab]``."""

    def next(self) -> list[list[int]]:
        """Those of the next pass; UnusableInput where its logits are not finite."""


class TokenPasses:
    """One token a row and pass. ``positions``, int64 ``[B]``: where each row's first new token will stand."""

    def __init__(self, decoding: Decoding, positions: Tensor) -> None:
        self._decoding, self._positions = decoding, positions
        self._rows = torch.arange(len(positions), device=positions.device)
        self._picked = positions
        self._batch: TokenBatch | None = None

    def first(self, logits: Tensor) -> list[list[int]]:
        sound = torch.isfinite(logits).all()
        logits.masked_fill_(~sound, 0.0)  # a draw from anything else would be the device's own failure
        self._picked = sample(logits, self._rows, self._positions, **self._decoding.sampling)
        return _read_back(self._decoding.model, self._picked.unsqueeze(1), torch.ones_like(self._rows), sound)

    def next(self) -> list[list[int]]:
        model, kv, _, chunk_tokens, observer = self._decoding
        observer("pass")
        picked, positions, lengths = self._picked, self._positions, kv.lengths[: len(self._picked)]
        self._batch = self._batch.followed_by(picked) if self._batch else decode_batch(picked, positions, lengths)
        self._positions = positions + 1
        logits = model.forward(self._batch, kv, chunk_tokens=chunk_tokens, logits="last")
        observer("queued")
        return self.first(logits)


class NodePasses:
    """``nodes`` a row and pass, of one shape with a draft and without; each row may take ``new_tokens``."""

    def __init__(
        self, decoding: Decoding, positions: Tensor, nodes: int, new_tokens: int, draft: Draft | None = None
    ) -> None:
        self._decoding, self._nodes, self._draft = decoding, nodes, draft
        self._starts, self._ends = positions, positions + (new_tokens - 1)
        self._rows = torch.arange(len(positions), device=positions.device)
        self._roots = positions

    def first(self, logits: Tensor) -> list[list[int]]:
        ones = torch.ones_like(self._rows)
        drawn, sound = self._draw(logits.unsqueeze(1), self._starts.unsqueeze(1), ones.unsqueeze(1).bool())
        self._roots = drawn.squeeze(1)
        return _read_back(self._decoding.model, drawn, ones, sound)

    def next(self) -> list[list[int]]:
        model, kv, _, _, observer = self._decoding
        observer("pass")
        starts, draft = self._starts, self._draft
        tree = root_alone(self._roots, self._nodes) if draft is None else draft.propose(self._roots, starts)
        tree = within_block(tree, starts)
        batch = node_batch(tree, starts)
        drawn, sound = self._draw(node_logits(model, batch, kv), batch.positions + 1, tree.real)
        path, counts, tokens = accept(tree, drawn, draft.depth if draft is not None else 0, self._ends - starts)
        kv.keep_nodes(starts, path, counts)
        if draft is not None:
            draft.accepted(starts, path, counts, tokens)
        last = tokens.gather(1, (counts - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        self._roots = torch.where(counts > 0, last, self._roots)
        self._starts = starts + counts
        observer("queued")
        new = _read_back(model, tokens, counts, sound)
        kv.grow(list(map(len, new)))
        return new

    def _draw(self, logits: Tensor, positions: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own token behind each node, int64 ``[B, M]``, and whether all real nodes' logits are finite."""
        finite = torch.isfinite(logits).all(dim=-1)
        logits.masked_fill_(~finite.unsqueeze(-1), 0.0)  # as above; padding may be anything
        rows = self._rows.unsqueeze(1).expand_as(positions)
        drawn = sample(logits.flatten(0, 1), rows.flatten(), positions.flatten(), **self._decoding.sampling)
        return drawn.view(positions.shape), (finite | ~real).all()


def _read_back(model: Transformer, tokens: Tensor, counts: Tensor, sound: Tensor) -> list[list[int]]:
    """The first ``counts [B]`` of ``tokens [B, n]``, in one copy with whether their logits were finite."""
    found = torch.cat((tokens, counts.unsqueeze(1)), dim=1).flatten()
    *numbers, finite = torch.cat((found, sound.view(1).to(found.dtype))).tolist()
    if not finite:
        raise UnusableInput(
            f"{model.config.name} gives logits that are not finite: its weights are damaged, or too large for the "
            "dtype; take the checkpoint again, or another --dtype"
        )
    width = tokens.shape[1] + 1
    rows = [numbers[begin : begin + width] for begin in range(0, len(numbers), width)]
    return [row[: row[-1]] for row in rows]
